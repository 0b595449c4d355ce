"""What the report reads: the results of every arm and seed of params.yaml; what is missing has a reason and a command.

Stamps already say that an output exists and what it was made from. Reading finds the rest: files of the right size
whose bits have changed, damaged records (stamps do not cover records), and files that may not be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm.base.checksums import checked, file_sha256
from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.config.jobs import EVERYTHING, MANIFEST, Job, Jobs, OutdatedError
from maskdm.config.paths import ARM_STAGES, GIVEN
from maskdm.config.stamps import read_stamp
from maskdm.scoring.headline import DISTANCE, flat_scores
from maskdm.scoring.protocol import Protocol

MAX_SHOWN = 64  # images of a panel in samples.png
FORCE = " --force"  # for damage that no stamp can see: without it the stage says that its output is up to date


class UnusableError(Exception):
    """A result cannot be shown: `reason` says why, with the file; `command` makes it again."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(f"{reason}: run `{command}`")
        self.reason, self.command = reason, command


@dataclass(frozen=True)
class Missing:
    """A result that params.yaml asks for and the report lacks: why, with the file, and the command that makes it."""

    arm: str
    seed: int
    reason: str
    command: str

    @property
    def text(self) -> str:
        """A line for people."""
        return f"{self.arm}, seed {self.seed}: {self.reason}; run `{self.command}`"


@dataclass(frozen=True)
class Trial:
    """One trial of one arm's tuning.

    Attributes:
        values: what it overrides, by dotted path.
        failed: why its training failed; None: it did not.
        scores: by metric, at the end of the trial's budget; None where there is no such score.
        wall_seconds: of training, sampling and scoring; None without a record.
    """

    arm: str
    name: str
    values: dict[str, Any]
    failed: str | None
    scores: dict[str, float | None]
    wall_seconds: float | None


@dataclass(frozen=True)
class Choice:
    """Where an arm's hyperparameters come from.

    Attributes:
        trial: the name of the chosen trial; None: all have failed, and the arm is missing.
        values: what it overrides, by dotted path.
        trials: all trials, in the order of params.yaml; empty: the values were given, not tuned.
    """

    arm: str
    trial: str | None
    values: dict[str, Any]
    trials: list[Trial]

    @property
    def num_trials(self) -> int:
        """The number of trials to choose from; 1: the values were given."""
        return max(len(self.trials), 1)


@dataclass(frozen=True)
class Run:
    """The results of one arm with one seed.

    Attributes:
        metrics: as the stage `evaluate` wrote them.
        pretrain_curve: columns of curve.csv, and device_seconds, data_wait_seconds and peak_memory_gib.
        finetune_curve: likewise; all columns but the step count from the start of pretraining.
        samples: (N, H, W, C) uint8, the first of the final milestone.
        wall_seconds: by stage of an arm.
    """

    arm: str
    seed: int
    metrics: dict[str, Any]
    pretrain_record: dict[str, Any]
    finetune_record: dict[str, Any]
    pretrain_curve: pd.DataFrame
    finetune_curve: pd.DataFrame
    samples: np.ndarray
    wall_seconds: dict[str, float]


@dataclass(frozen=True)
class Results:
    """Everything that the report shows.

    Attributes:
        real: (N, H, W, C) uint8, spread over the first shard.
        scale: the content of scale.json: `floor` and `untrained` scores, and their protocol.
        runs: in the order of params.yaml.
        choices: by arm, where its hyperparameters come from; arms that are not tuned yet are not in it.
        missing: what params.yaml asks for and is not among `runs`.
    """

    manifest: dict[str, Any]
    prepare_record: dict[str, Any]
    features_record: dict[str, Any]
    real: np.ndarray
    scale: dict[str, Any]
    runs: list[Run]
    choices: dict[str, Choice]
    missing: list[Missing]

    @property
    def protocol(self) -> Protocol:
        """What all scores are of: every arm that is shown was scored with the data and features of this scale."""
        return Protocol.from_dict(self.scale["protocol"])

    @property
    def flips(self) -> dict[str, float]:
        """By arm, the probability with which training flipped images."""
        return {run.arm: float(run.metrics["flip"]) for run in self.runs}

    @property
    def distances(self) -> list[str]:
        """The columns of the distances of points, which all runs have; none where no points are scored."""
        scored = [flat_scores(scores) for run in self.runs for scores in run.metrics["milestones"].values()]
        return [name for name in scored[0] if name.startswith(DISTANCE) and all(name in one for one in scored)]

    def scale_of(self, name: str) -> dict[str, float]:
        """A score at both ends of the scale: `floor` and `untrained`."""
        points: dict[str, Any] = self.scale.get("distances", {})
        of_points = {"floor": points.get("floor", {}).get("mean", {}), "untrained": points.get("untrained", {})}
        return {end: float(flat_scores({**self.scale[end], "distances": of_points[end]})[name]) for end in of_points}

    @property
    def tuning_wall_seconds(self) -> dict[str, float]:
        """By arm, the seconds of its trials; arms without trials are not in it."""
        tuned = {arm: choice.trials for arm, choice in self.choices.items() if choice.trials}
        return {arm: sum(trial.wall_seconds or 0.0 for trial in trials) for arm, trials in tuned.items()}


def read_results(params: Params) -> Results:
    """Read the results of every arm and seed of params.yaml; results of removed arms are ignored.

    Raises:
        UserError: no arm can be shown, or something that all of them need is damaged.
    """
    jobs, runs, missing = Jobs(params), list[Run](), list[Missing]()
    for arm, seed in product(params.arms, params.seeds):
        try:
            runs.append(_read_run(jobs, arm, seed))
        except UnusableError as error:
            missing.append(Missing(arm, seed, error.reason, error.command))
    if not runs:
        raise UserError(
            "there is nothing to report: none of the arms of params.yaml has results that can be shown; the first, "
            f"{missing[0].text}   {EVERYTHING}"
        )
    # An arm is shown if its stamps say that it is up to date. Then the data, features, scale and choice that it was
    # made from are up to date too; all but the choice are the same for all arms.
    try:
        manifest = _read_json(paths.DATA / MANIFEST, "maskdm prepare")
        shard = open_images(paths.DATA / manifest["shards"][0]["file"], params.dataset.shape, "maskdm prepare")
        return Results(
            manifest,
            prepare_record=_read_json(paths.record("prepare"), "maskdm prepare"),
            features_record=_read_json(paths.record("features"), "maskdm features"),
            # Spread over the shard: a folder tree is read class by class, and its first images would be one class.
            real=np.array(shard[np.unique(np.linspace(0, len(shard) - 1, MAX_SHOWN).astype(int))]),
            scale=_read_json(paths.SCALE, "maskdm scale"),
            runs=runs,
            choices=_read_choices(jobs),
            missing=missing,
        )
    except UnusableError as error:
        raise UserError(str(error)) from error


def milestone_key(fraction: float) -> str:
    """How a milestone is named in files."""
    return f"{fraction:.3f}"


def open_images(file: Path, shape: tuple[int, int, int], made_by: str) -> np.ndarray:
    """uint8 images (N, H, W, C), memory-mapped, because they may be many.

    Raises:
        UnusableError: they are missing, unreadable, or of another shape.
    """
    with _reading(file, made_by):
        images: np.ndarray = np.load(file, mmap_mode="r")
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise ValueError(f"expected uint8 images {shape}, got {images.dtype} {images.shape}")
        return images


@contextmanager
def _reading(file: Path, made_by: str) -> Iterator[None]:
    """Raises: UnusableError, for any error in the block."""
    try:
        yield
    except Exception as error:  # NumPy and pandas may raise almost anything for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnusableError(f"{file} cannot be read ({reason})", made_by + FORCE) from error


def _read_json(file: Path, made_by: str) -> dict[str, Any]:
    with _reading(file, made_by):
        return dict(checked(json.loads(file.read_bytes())))


def _read_run(jobs: Jobs, arm: str, seed: int) -> Run:
    found = {stage: jobs.find(stage, arm, seed) for stage in ARM_STAGES}
    for job in found.values():  # in their order: the first one that is out of date is reported
        if reason := job.why_outdated():
            raise UnusableError(reason, job.first.command)
    records = {stage: _read_json(job.record, job.command) for stage, job in found.items()}
    sample, evaluate = found["sample"], found["evaluate"]
    final = sample.output / f"milestone-{milestone_key(jobs.params.budget.milestones[-1])}.npy"
    samples = open_images(final, jobs.params.dataset.shape, sample.command)
    return Run(
        arm,
        seed,
        metrics=_read_json(evaluate.output, evaluate.command),
        pretrain_record=records["pretrain"],
        finetune_record=records["finetune"],
        pretrain_curve=_read_curve(found["pretrain"], records["pretrain"], {}),
        finetune_curve=_read_curve(found["finetune"], records["finetune"], records["pretrain"]),
        samples=np.array(samples[:MAX_SHOWN]),
        wall_seconds={stage: float(record["wall_seconds"]) for stage, record in records.items()},
    )


def _read_curve(job: Job, record: dict[str, Any], before: dict[str, Any]) -> pd.DataFrame:
    """A curve with the seconds and memory of its rows; `before` is the record of the previous stage."""
    file, stamp = job.output / paths.CURVE, read_stamp(job.output)
    with _reading(file, job.command):
        if stamp is None or file_sha256(file) != stamp.files[file.name]["sha256"]:
            raise ValueError("it is not the file that was written: its sha256 differs")
        curve = pd.read_csv(file, dtype="float64")
    cumulative = ["device_seconds", "data_wait_seconds"]
    timings = pd.DataFrame(record["timings"], columns=["step", *cumulative, "peak_memory_gib"]).astype("float64")
    for column in cumulative:
        timings[column] += before.get(column, 0.0)
    peaks = [timing["peak_memory_gib"] for timing in before.get("timings", [])]
    timings["peak_memory_gib"] = timings["peak_memory_gib"].clip(lower=max(peaks, default=0.0)).cummax()  # if resumed
    if not set(curve["step"]) <= set(timings["step"]):  # the output was copied here without its record
        raise UnusableError(f"{file} and the timings of its record are of different runs", job.command + FORCE)
    return curve.merge(timings, on="step", how="left")


def _read_choices(jobs: Jobs) -> dict[str, Choice]:
    params, choices = jobs.params, {}
    for arm in params.arms:
        try:
            jobs.chosen_values(arm)
        except OutdatedError:
            continue  # then no run of this arm is up to date either
        except UserError:
            pass  # all its trials have failed: they are shown
        if not params.tuning.enabled:
            choices[arm] = Choice(arm, GIVEN, {}, [])
            continue
        trials = [_read_trial(jobs.find("tune", arm, trial=name)) for name in params.tuning.trials]
        chosen = _read_json(paths.chosen(arm), jobs.find("choose").command)
        choices[arm] = Choice(arm, chosen["trial"], chosen["values"], trials)
    return choices


def _read_trial(job: Job) -> Trial:
    found, tuning, name = _read_json(job.output, job.command), job.params.tuning, str(job.trial)
    try:
        wall_seconds = float(_read_json(job.record, job.command)["wall_seconds"])
    except UnusableError:
        wall_seconds = None  # the trial is shown without them
    values = tuning.trials[name]  # the file may have others that mean the same to this arm
    scores = {metric: found.get(metric) for metric in ("kid", "fid", str(tuning.metric))}
    return Trial(found["arm"], name, values, found["failed"], scores, wall_seconds)
