"""Versions of what the stages compute, carried in the engines' command lines.

The engines rerun a stage when its command changes. A stage's version is raised when its code changes what it
computes (not when a comment changes: a training run of days must survive that), here and in the command lines of
dvc.yaml and the Snakemake rules; the tests pin what each version computes and that all three agree.
"""

from __future__ import annotations

STAGE_VERSIONS = {
    "prepare": 4,
    "features": 4,
    "scale": 5,
    "tune": 5,
    "choose": 2,
    "pretrain": 6,
    "finetune": 5,
    "sample": 5,
    "evaluate": 4,
    "report": 5,
}
