"""Stage `choose`: for every arm the values of its best trial, or, without tuning, the values as given."""

from __future__ import annotations

import sys
from typing import Any

from maskdm import paths
from maskdm.config import Params
from maskdm.data.arrays import ImageArrays
from maskdm.errors import UserError
from maskdm.protocol import differences
from maskdm.publishing import publish_description, publish_folder
from maskdm.stages.inputs import read_json
from maskdm.stages.session import stage_session

GIVEN = "given"


def run(params: Params) -> None:
    """Write results/chosen/ARM.json for every arm.

    Raises:
        UserError: a trial is missing, stale, or not comparable with the others.
    """
    chosen = {arm: _choose(params, arm) for arm in params.arms}
    with stage_session(params, "choose", output=paths.CHOSEN) as session:
        if session.is_to_do:
            with publish_folder(paths.CHOSEN) as folder:
                for arm, choice in chosen.items():
                    publish_description(folder / paths.chosen(arm).name, choice)
            tags = {f"chosen.{arm}": choice["trial"] or "none: all failed" for arm, choice in chosen.items()}
            session.tracked.tags(**tags)
            session.record["num_trials"] = len(params.tuning.trials) if params.tuning.enabled else 1


def _choose(params: Params, arm: str) -> dict[str, Any]:
    """The choice alone: a trial more that is not chosen must leave the file, and so the arm's training, as it is."""
    tuning = params.tuning
    if not tuning.enabled:
        return {"arm": arm, "trial": GIVEN, "values": {}}
    data_sha256 = ImageArrays.open(paths.DATA).sha256
    tried = {trial: _read_trial(params, arm, trial, data_sha256) for trial in tuning.trials}
    finished = {trial: result for trial, result in tried.items() if result["failed"] is None}
    if not finished:  # the other arms can run; this one's pretraining will say why it can't
        reasons = "; ".join(f"{trial}: {result['failed']}" for trial, result in tried.items())
        print(f"every trial of arm {arm} has failed: {reasons}", file=sys.stderr)
        return {"arm": arm, "trial": None, "values": {}, "failed": reasons}
    one, *rest = finished.values()
    if differing := [text for other in rest for text in differences(one["protocol"] or {}, other["protocol"] or {})]:
        raise UserError(
            f"the trials of arm {arm} were scored by different protocols ({differing[0]}); run first, for each of "
            f"them: maskdm tune --arm {arm} --trial TRIAL"
        )
    best = min(finished, key=lambda trial: finished[trial][tuning.metric])
    return {"arm": arm, "trial": best, "values": tuning.trials[best]}


def _read_trial(params: Params, arm: str, trial: str, data_sha256: str) -> dict[str, Any]:
    tuning, again = params.tuning, f"run first: maskdm tune --arm {arm} --trial {trial}"
    path = paths.trial(arm, trial)
    if not path.is_file():
        raise UserError(f"{path} is missing; {again}")
    result: dict[str, Any] = read_json(path, "tune")
    asked = (True, tuning.trials[trial], tuning.seed, tuning.budget_fraction)
    if tuple(result[key] for key in ("trained", "values", "seed", "budget_fraction")) != asked:
        raise UserError(f"{path} was made with other values than params.yaml names; {again}")
    if result["data_sha256"] != data_sha256:
        raise UserError(f"{path} was scored against other data than results/data; {again}")
    return result
