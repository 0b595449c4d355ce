"""Stage `choose`: the values of every arm's best trial; without tuning, the values of params.yaml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from maskdm.base.publishing import publish_description
from maskdm.config import paths
from maskdm.config.paths import GIVEN
from maskdm.data.inputs import read_json
from maskdm.stages.runner import Task


def run(task: Task, folder: Path) -> None:
    """Write ARM.json for every arm: its best trial and the values that it changed."""
    params = task.params
    chosen = {arm: _choose(task, arm) for arm in params.arms}
    for arm, choice in chosen.items():
        publish_description(folder / paths.chosen(arm).name, choice)
    task.record["chosen"] = {arm: choice["trial"] or "none: all failed" for arm, choice in chosen.items()}
    task.record["num_trials"] = max(1, len(params.tuning.trials))


def _choose(task: Task, arm: str) -> dict[str, Any]:
    tuning = task.params.tuning
    if not tuning.enabled:
        return {"arm": arm, "trial": GIVEN, "values": {}}
    tried = {trial: read_json(paths.trial(arm, trial), "tune") for trial in tuning.trials}
    finished = {trial: result for trial, result in tried.items() if result["failed"] is None}
    if not finished:  # other arms can run; the pretraining of this one reports why it can't
        reasons = "; ".join(f"{trial}: {result['failed']}" for trial, result in tried.items())
        print(f"every trial of arm {arm} has failed: {reasons}", file=sys.stderr)
        return {"arm": arm, "trial": None, "values": {}, "failed": reasons}
    best = min(finished, key=lambda trial: finished[trial][tuning.metric])
    return {"arm": arm, "trial": best, "values": tuning.trials[best]}
