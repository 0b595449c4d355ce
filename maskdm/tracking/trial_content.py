"""What the run of a trial of an arm's hyperparameters carries, from the file that the stage `tune` wrote."""

from __future__ import annotations

from pathlib import Path

from maskdm.config import Params, Section, paths, resolve
from maskdm.scoring.headline import SCORE_KEYS
from maskdm.tracking.dataset import read_dataset
from maskdm.tracking.run_content import RunContent, only_numbers, read_json

SCORES = [key for key in SCORE_KEYS if key != "num_samples"]  # no key that training logs by step as well
FINAL = 100  # percent of the trial's budget, as in arm runs


def tuned_paths(params: Params) -> list[str]:
    """Every parameter that some trial changes, by dotted path."""
    return sorted({path for values in params.tuning.trials.values() for path in values})


def trial_params(params: Params, arm: str, trial: str) -> dict[str, str]:
    """What a trial runs with, of the parameters that some trial changes: its own values, or the arm's.

    Args:
        params: the experiment.
        arm: the arm's key.
        trial: the trial's name.
    """
    tried = resolve(params, arm, seed=0, chosen=params.tuning.trials[trial])
    sections: dict[str, Section] = {"training": tried.params.training, "finetune": tried.finetune.config}
    if params.arm(arm).strategy != "none":
        sections["pretrain"] = tried.pretrain.config
    values = {path: path.partition(".") for path in tuned_paths(params)}
    used = {path: getattr(sections[at], key) for path, (at, _, key) in values.items() if at in sections}
    return {"arm": arm, "trial": trial, **{path: str(value) for path, value in used.items()}}


def read_trial(arm: str, trial: str, given: dict[str, str], base: Path = Path()) -> RunContent:
    """Gather what results/ holds of a trial; nothing where it was not run.

    Args:
        arm: the arm's key.
        trial: the trial's name.
        given: its `trial_params`.
        base: the folder that results/ is in.

    Raises:
        ValueError: a file is not what its stage writes.
    """
    result = read_json(base / paths.trial(arm, trial))
    if not result:
        return RunContent({})
    record = read_json(base / paths.record("tune", arm, trial=trial))
    content = RunContent(given | {"budget_fraction": str(result["budget_fraction"])}, dataset=read_dataset(base))
    scores = only_numbers({key: result.get(key) for key in SCORES})
    content.points = {(key, FINAL): value for key, value in scores.items()}
    content.measures = only_numbers({"wall_seconds": record.get("wall_seconds")})
    content.status = "FAILED" if result.get("failed") else "FINISHED"
    content.tags = {"failed": str(result["failed"])} if result.get("failed") else {}
    if scores:
        content.add_protocol(result)
    if result.get("data_sha256"):
        content.tags["data_sha256"] = str(result["data_sha256"])
    content.add_provenance(record)
    return content
