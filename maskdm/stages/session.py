"""What every stage does around its work: log to MLflow, time itself, say where its result comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maskdm import paths
from maskdm.config import Params, Section
from maskdm.data.arrays import ImageArrays
from maskdm.publishing import one_writer, publish_json
from maskdm.records import measured
from maskdm.tracking import StageRun, stage_run, trial_params


@contextmanager
def stage_session(
    params: Params, stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None
) -> Iterator[tuple[StageRun, dict[str, Any]]]:
    """Track, time and record a stage.

    The record is written to results/records when the block ends well. Only the report has none there: it depends
    on all records.

    Yields:
        the MLflow run of the stage, and its record, a flat dict that the block may add to.
    """
    which = () if arm is None else (arm, f"seed {seed}" if trial is None else f"trial {trial}")
    lock = one_writer(paths.lock(stage, arm, seed, trial), " ".join((stage, *which)))
    with lock, stage_run(params, stage, arm, seed, trial) as tracked:
        tracked.params(**_given(params, stage, arm, trial))
        record: dict[str, Any] = {"stage": stage, "arm": arm, "seed": seed, "trial": trial}
        with measured(params, record):
            yield tracked, record
        record["data_sha256"] = ImageArrays.open(paths.DATA).sha256
        if stage != "report":
            publish_json(paths.record(stage, arm, seed, trial), record)
        tracked.log(0, wall_seconds=record["wall_seconds"], peak_memory_gib=record["peak_memory_gib"])
        tracked.tags(**_origin(record))


def _given(params: Params, stage: str, arm: str | None, trial: str | None) -> dict[str, Any]:
    """The section of params.yaml that a stage is about; of an arm, as the arm merges it."""
    if stage in ("pretrain", "finetune"):
        assert arm is not None
        merged = params.pretrain_of(arm) if stage == "pretrain" else params.finetune_of(arm)
        return {**params.arm(arm).model_dump(include={"strategy", "mask_rate", "block_size"}), **merged.model_dump()}
    if trial is not None:
        assert arm is not None
        return dict(trial_params(params, arm, trial))
    sections: dict[str, Section] = {
        "prepare": params.dataset,
        "features": params.evaluation,
        "scale": params.sampling,
        "choose": params.tuning,
        "sample": params.sampling,
        "evaluate": params.evaluation,
        "report": params.budget,
    }
    return sections[stage].model_dump()


def _origin(record: dict[str, Any]) -> dict[str, Any]:
    """Commit, data, params and versions, as tags."""
    keys = ("git_commit", "git_dirty", "params_fingerprint", "data_sha256")
    plain = {key: record[key] for key in keys if record[key] is not None}  # outside git there is no commit
    return {**plain, **{f"version.{name}": version for name, version in record["versions"].items()}}
