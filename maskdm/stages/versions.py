"""Versions of what the stages compute, carried in the engines' command lines.

The engines rerun a stage when its command changes. A stage's version is raised when its code changes what it
computes (not when a comment changes: a training run of days must survive that), here and in the command lines of
dvc.yaml and the Snakemake rules; the tests pin what each version computes and that all three agree.
"""

from __future__ import annotations

STAGE_VERSIONS = {
    "prepare": 2,
    "features": 3,
    "scale": 3,
    "tune": 3,
    "choose": 2,
    "pretrain": 3,
    "finetune": 4,
    "sample": 3,
    "evaluate": 2,
    "report": 2,
}
