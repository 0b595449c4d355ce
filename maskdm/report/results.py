"""What the report reads: enumerated from params.yaml, never globbed; what cannot be shown is named with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.config.formats import ARM_STAGES
from maskdm.config.jobs import MANIFEST, Job, Jobs, OutdatedError
from maskdm.report.files import FORCE, UnusableError, open_images, read_curve, read_json, require_current
from maskdm.report.tuning import Choice, read_choice
from maskdm.scoring.headline import DISTANCE, flat_scores
from maskdm.scoring.protocol import Protocol

MILESTONE_KEYS = (
    *("step", "flops", "images_seen", "tokens_seen"),
    *("fid", "kid", "kid_std", "precision", "recall", "num_samples"),
)
TIMING_COLUMNS = ("step", "device_seconds", "data_wait_seconds", "peak_memory_gib")
MAX_SHOWN = 64  # images of a panel in samples.png, at most


@dataclass(frozen=True)
class Missing:
    """A result that params.yaml asks for and the report does without.

    Attributes:
        arm: its key.
        seed: of its run.
        reason: what is wrong, with the file.
        command: what makes it.
    """

    arm: str
    seed: int
    reason: str
    command: str

    @property
    def what(self) -> str:
        """The arm and seed, as people say it."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """What one arm with one seed left behind.

    The curves have the columns of curve.csv and of `TIMING_COLUMNS`, cumulative from the start of pretraining on,
    the step alone from the start of the stage on.
    """

    arm: str
    seed: int
    metrics: dict[str, Any]
    pretrain_record: dict[str, Any]
    finetune_record: dict[str, Any]
    pretrain_curve: pd.DataFrame
    finetune_curve: pd.DataFrame
    samples: np.ndarray  # (N, H, W, C) uint8, the first of the final milestone
    wall_seconds: dict[str, float]  # of pretrain, finetune, sample and evaluate


@dataclass(frozen=True)
class Results:
    """Everything the report shows.

    Attributes:
        real: (N, H, W, C) uint8, spread over the first shard.
        scale: the content of scale.json: `floor` and `untrained` scores, and their protocol.
        runs: in the order of params.yaml.
        choices: by arm, how it came by its hyperparameters; without missing arms that are not tuned yet.
        missing: what is asked for and not among these.
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
        """What every score is of: those of the arms that are shown were made with this scale's data and features."""
        return Protocol.from_dict(self.scale["protocol"])

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records that say what made the numbers."""
        of_runs = [r for run in self.runs for r in (run.pretrain_record, run.finetune_record)]
        return [self.prepare_record, self.features_record, *of_runs]

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
        """What both ends of the scale get of a score: `floor` and `untrained`."""
        points: dict[str, Any] = self.scale.get("distances", {})
        of_points = {"floor": points.get("floor", {}).get("mean", {}), "untrained": points.get("untrained", {})}
        ends = {end: flat_scores({**self.scale[end], "distances": of_points[end]}) for end in of_points}
        return {end: float(scores[name]) for end, scores in ends.items()}

    @property
    def tuning_wall_seconds(self) -> dict[str, float]:
        """By arm, what its trials took; without the arms that had none."""
        return {arm: choice.wall_seconds for arm, choice in self.choices.items() if choice.trials}


def read_results(params: Params) -> Results:
    """Read the results of every arm and seed of params.yaml; those of removed arms are not looked at.

    Raises:
        UserError: no arm can be shown, or what all of them were made from is damaged.
    """
    jobs, missing = Jobs(params), list[Missing]()
    # An arm is shown if its stamps say that it is current. Then the data, features, scale and choice that it was made
    # from are current, too, and but for the choice the same for all arms.
    runs = _read_runs(jobs, missing)
    if not runs:
        raise UserError(_nothing_left(missing))
    try:
        manifest = read_json(paths.DATA / MANIFEST, "maskdm prepare")
        return Results(
            manifest,
            prepare_record=read_json(paths.record("prepare"), "maskdm prepare"),
            features_record=read_json(paths.record("features"), "maskdm features"),
            real=_read_real(params, manifest),
            scale=read_json(paths.SCALE, "maskdm scale"),
            runs=runs,
            choices=_read_choices(jobs),
            missing=missing,
        )
    except UnusableError as error:
        raise UserError(str(error)) from error


def milestone_key(fraction: float) -> str:
    """How a milestone is named in files."""
    return f"{fraction:.3f}"


def _nothing_left(missing: list[Missing]) -> str:
    first = missing[0]
    return (
        f"there is nothing to report: none of the arms of params.yaml has results that can be shown; the first, "
        f"{first.what}: {first.reason}; run `{first.command}`   (or everything: dvc repro)"
    )


def _read_runs(jobs: Jobs, missing: list[Missing]) -> list[Run]:
    runs = []
    for arm in jobs.params.arms:
        for seed in jobs.params.seeds:
            try:
                runs.append(_read_run(jobs, arm, seed))
            except UnusableError as error:
                missing.append(Missing(arm, seed, error.reason, error.command))
    return runs


def _read_run(jobs: Jobs, arm: str, seed: int) -> Run:
    found = {stage: jobs.find(stage, arm, seed) for stage in ARM_STAGES}
    for job in found.values():  # in their order: the first that has not run is the one to name
        require_current(job)
    records = {stage: read_json(job.record, job.command) for stage, job in found.items()}
    pretrain, finetune = records["pretrain"], records["finetune"]
    final = found["sample"].output / f"milestone-{milestone_key(jobs.params.budget.milestones[-1])}.npy"
    samples = open_images(final, jobs.params.dataset.shape, found["sample"].command)
    return Run(
        arm,
        seed,
        metrics=read_json(found["evaluate"].output, found["evaluate"].command),
        pretrain_record=pretrain,
        finetune_record=finetune,
        pretrain_curve=_timed(found["pretrain"], pretrain, {}),
        finetune_curve=_timed(found["finetune"], finetune, pretrain),
        samples=np.array(samples[:MAX_SHOWN]),
        wall_seconds={stage: float(record["wall_seconds"]) for stage, record in records.items()},
    )


def _read_choices(jobs: Jobs) -> dict[str, Choice]:
    choices = {}
    for arm in jobs.params.arms:
        try:
            jobs.chosen_values(arm)
        except OutdatedError:
            continue  # then no run of it is current either
        except UserError:
            pass  # all its trials have failed, which are shown
        choices[arm] = read_choice(jobs, arm)
    return choices


def _timed(job: Job, record: dict[str, Any], before: dict[str, Any]) -> pd.DataFrame:
    """A curve with the seconds and memory of its rows; `before` is the record of the stage before."""
    curve = read_curve(job)
    timings = pd.DataFrame(record["timings"], columns=list(TIMING_COLUMNS)).astype("float64")
    for column in ("device_seconds", "data_wait_seconds"):
        timings[column] += before.get(column, 0.0)
    peaks = [timing["peak_memory_gib"] for timing in before.get("timings", [])]
    timings["peak_memory_gib"] = timings["peak_memory_gib"].clip(lower=max(peaks, default=0.0)).cummax()  # if resumed
    if not set(curve["step"]) <= set(timings["step"]):  # an output was copied here without its record
        reason = f"{job.output / 'curve.csv'} and the timings of its record are of different runs"
        raise UnusableError(reason, job.command + FORCE)
    return curve.merge(timings, on="step", how="left")


def _read_real(params: Params, manifest: dict[str, Any]) -> np.ndarray:
    shard = open_images(paths.DATA / manifest["shards"][0]["file"], params.dataset.shape, "maskdm prepare")
    # Spread over the shard: a folder tree is read class by class, and its first images would be one class.
    return np.array(shard[np.unique(np.linspace(0, len(shard) - 1, MAX_SHOWN).astype(int))])
