"""What every stage does around its work: one writer, kept work, MLflow, its time, and where its result comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.checksums import values_sha256
from maskdm.config import Params, Section
from maskdm.data.arrays import ImageArrays
from maskdm.publishing import one_writer, publish_description
from maskdm.records import measured
from maskdm.stages.versions import STAGE_VERSIONS
from maskdm.tracking import StageRun, stage_run, trial_params
from maskdm.work import Work, plain

Run = tuple[str, str | None, int | None, str | None]  # stage, arm, seed, trial


@dataclass
class Session:
    """A run of a stage.

    Attributes:
        is_to_do: False where the stage's work is there already: its outputs are in place.
        folder: the work folder, where what a killed process goes on from is kept; gone when the stage is done.
        tracked: the MLflow run of the stage.
        record: flat values that the stage may add to; published when it ends well.
    """

    is_to_do: bool
    folder: Path
    tracked: StageRun = field(default_factory=StageRun)
    record: dict[str, Any] = field(default_factory=dict)


@contextmanager
def stage_session(
    params: Params,
    stage: str,
    arm: str | None = None,
    seed: int | None = None,
    trial: str | None = None,
    *,
    output: Path,
    inputs: Mapping[str, Any] | None = None,
) -> Iterator[Session]:
    """Let one process at a time run a stage; track, time and record it, and keep what it has finished.

    The record is written to results/records when the block ends well. Only the report has none there: it depends
    on all records.

    Args:
        params: the experiment.
        stage: its name.
        arm: where it works on one.
        seed: of the arm's run.
        trial: of the arm's tuning.
        output: what the stage publishes.
        inputs: all that the output depends on; sections and plain values. With them, output and record are kept:
            running the stage again for equal inputs takes a second. None where they can't be told in full, or there
            is little to keep.

    Raises:
        UserError: a place can't be written.
    """
    run = (stage, arm, seed, trial)
    what = " ".join(str(part) for part in (stage, arm, _which(seed, trial)) if part is not None)
    given = plain({"stage": stage, "stage_version": STAGE_VERSIONS[stage], **(inputs or {"params": params})})
    with one_writer(paths.lock(*run), what) as turn:
        work = None if inputs is None else Work.claim(output, what, given)
        if work is not None and work.restore():
            by = f"process {turn.waited_for} has done it" if turn.waited_for else "done before with the same inputs"
            _say(f"{what}: {by}; its results are kept in {work.folder}")
            yield Session(False, work.folder)
        elif work is None and turn.found_done == values_sha256(given) and _is_there(output, paths.record(*run), stage):
            _say(f"{what}: process {turn.waited_for} has done it")
            yield Session(False, paths.WORK)
        else:
            yield from _tracked(params, run, work)
            if work is not None:
                work.keep([output, paths.record(*run)])
        turn.done(values_sha256(given))


def _is_there(output: Path, record: Path, stage: str) -> bool:
    """Whether what another process has published is there still: an engine may have cleared it for this one."""
    return output.exists() and (stage == "report" or record.exists())


def _tracked(params: Params, run: Run, work: Work | None) -> Iterator[Session]:
    """The block itself, tracked, timed and recorded."""
    stage, arm, seed, trial = run
    with stage_run(params, *run, key=None if work is None else work.key) as tracked:
        tracked.params(**_given(params, stage, arm, trial))
        record: dict[str, Any] = {"stage": stage, "arm": arm, "seed": seed, "trial": trial}
        with measured(params, record):
            yield Session(True, paths.WORK if work is None else work.folder, tracked, record)
        record["starts"] = 1 if work is None else work.starts
        record["data_sha256"] = ImageArrays.open(paths.DATA).sha256
        if stage != "report":
            publish_description(paths.record(*run), record)
        tracked.log(0, wall_seconds=record["wall_seconds"], peak_memory_gib=record["peak_memory_gib"])
        tracked.tags(**_origin(record))


def _which(seed: int | None, trial: str | None) -> str | None:
    if trial is not None:
        return f"trial {trial}"
    return None if seed is None else f"seed {seed}"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


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
    plain_values = {key: record[key] for key in keys if record[key] is not None}  # outside git there is no commit
    return {**plain_values, **{f"version.{name}": version for name, version in record["versions"].items()}}
