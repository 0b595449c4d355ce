"""What the report reads: enumerated from params.yaml, never globbed; what cannot be shown is named with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm import paths
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.formats import ARM_STAGES, ORIGIN_KEYS, TRAINING_STAGES
from maskdm.headline import DISTANCE, flat_scores
from maskdm.protocol import Protocol, differences
from maskdm.report.files import UnusableError, open_images, read_curve, read_json, require
from maskdm.report.tuning import Choice, read_choice, read_trial, require_equal_protocols

SCORES = ("fid", "kid", "kid_std", "precision", "recall", "num_samples")
MILESTONE_KEYS = ("step", "flops", "images_seen", "tokens_seen", *SCORES)
MASK_KEYS = ("strategy", "mask_rate", "block_size")
MadeWith = dict[str, str]  # fingerprints of the params behind a result
MADE_WITH_KEYS = ("trained_with", "scored_with")
METRICS_KEYS = (*MASK_KEYS, *MADE_WITH_KEYS, "realised_mask_rate", *ORIGIN_KEYS, "milestones")
TIMED_KEYS = ("wall_seconds", "device_seconds", "data_wait_seconds", "timings")
TIMING_COLUMNS = ("step", "device_seconds", "data_wait_seconds", "peak_memory_gib")
MAX_SHOWN = 64  # images of a panel in samples.png, at most
MAX_DIFFERENCES = 5  # of two protocols, told


@dataclass(frozen=True)
class Missing:
    """A result that params.yaml asks for and the report does without.

    Attributes:
        arm: None where it belongs to no arm.
        seed: None where it belongs to no seed.
        reason: what is wrong, with the file.
        command: what makes it.
    """

    arm: str | None
    seed: int | None
    reason: str
    command: str

    @property
    def what(self) -> str:
        """The arm and seed, as people say it."""
        if self.arm is None:
            return "every arm"
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"


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

    @property
    def file(self) -> Path:
        """Where the metrics come from."""
        return paths.metrics(self.arm, self.seed)


@dataclass(frozen=True)
class Results:
    """Everything the report shows.

    Attributes:
        real: (N, H, W, C) uint8, spread over the first shard.
        scale: the content of scale.json: `floor` and `untrained` scores; None when it is missing.
        runs: in the order of params.yaml.
        choices: by arm, how it came by its hyperparameters.
        missing: what is asked for and not among these.
        protocol: what every score is of; None where none was recorded.
    """

    manifest: dict[str, Any]
    prepare_record: dict[str, Any]
    features_record: dict[str, Any]
    real: np.ndarray
    scale: dict[str, Any] | None
    runs: list[Run]
    choices: dict[str, Choice]
    missing: list[Missing]
    protocol: Protocol | None = None

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records that say what made the numbers."""
        of_runs = [r for run in self.runs for r in (run.pretrain_record, run.finetune_record)]
        return [self.prepare_record, self.features_record, *of_runs]

    @property
    def flips(self) -> dict[str, float]:
        """By arm, the probability with which training flipped images; empty if it is not known of all."""
        known = {run.arm: float(run.metrics["flip"]) for run in self.runs if "flip" in run.metrics}
        return known if all("flip" in run.metrics for run in self.runs) else {}

    @property
    def distances(self) -> list[str]:
        """The columns of the distances of points, which all runs have; none where no points are scored."""
        scored = [flat_scores(scores) for run in self.runs for scores in run.metrics["milestones"].values()]
        return [name for name in scored[0] if name.startswith(DISTANCE) and all(name in one for one in scored)]

    def scale_of(self, name: str) -> dict[str, float]:
        """What both ends of the scale get of a score: `floor` and `untrained`; empty where that is not known."""
        if self.scale is None:
            return {}
        points: dict[str, Any] = self.scale.get("distances", {})
        of_points = {"floor": points.get("floor", {}).get("mean", {}), "untrained": points.get("untrained", {})}
        ends = {end: flat_scores({**self.scale[end], "distances": of_points[end]}) for end in of_points}
        return {end: float(scores[name]) for end, scores in ends.items() if name in scores}

    @property
    def tuning_wall_seconds(self) -> dict[str, float]:
        """By arm, what its trials took; without the arms that had none."""
        return {arm: choice.wall_seconds for arm, choice in self.choices.items() if choice.trials}


class _Missed:
    """Collects what is missing while the rest is read."""

    def __init__(self) -> None:
        self.found: list[Missing] = []

    def add(self, error: UnusableError, arm: str | None = None, seed: int | None = None) -> None:
        self.found.append(Missing(arm, seed, error.reason, error.command))


def read_results(params: Params) -> Results:
    """Read the results of every arm and seed of params.yaml; those of removed arms are not looked at.

    Raises:
        UserError: the data or the real images' features are unknown, no arm can be shown, or scores are of different
            protocols.
    """
    try:
        manifest = read_json(paths.DATA / "manifest.json", "maskdm prepare", ("count", "sha256", "shards"))
        prepare = read_json(paths.record("prepare"), "maskdm prepare", ("wall_seconds",))
        features = read_json(paths.record("features"), "maskdm features", ("wall_seconds", *ORIGIN_KEYS))
        real = _read_real(manifest)
    except UnusableError as error:
        raise UserError(str(error)) from error
    origin = {**{key: features[key] for key in ORIGIN_KEYS}, "data_sha256": manifest["sha256"]}
    missed = _Missed()
    scale = _read_scale(origin, missed)
    choices = _read_choices(params, origin, missed)
    runs = _read_runs(params, choices, origin, missed)
    if not runs:
        raise UserError(_nothing_left(missed.found))
    protocol = _one_protocol(scale, runs)
    choices = _comparable_choices(choices, protocol, missed)
    return Results(manifest, prepare, features, real, scale, runs, choices, missed.found, protocol)


def milestone_key(fraction: float) -> str:
    """How a milestone is named in files."""
    return f"{fraction:.3f}"


def command(stage: str, arm: str, seed: int) -> str:
    """The command that makes what a stage leaves behind for an arm and seed."""
    return f"maskdm {stage} --arm {arm} --seed {seed}"


def _nothing_left(missing: list[Missing]) -> str:
    first = next(m for m in missing if m.seed is not None)
    return (
        f"there is nothing to report: none of the arms of params.yaml has results that can be shown; the first, "
        f"{first.what}: {first.reason}; run `{first.command}`   (or everything: dvc repro)"
    )


def _read_scale(origin: dict[str, Any], missed: _Missed) -> dict[str, Any] | None:
    try:
        scale = read_json(paths.SCALE, "maskdm scale", ("floor", "untrained", *ORIGIN_KEYS))
        for name in ("floor", "untrained"):
            require(scale[name], SCORES, f"{name} in {paths.SCALE}", "maskdm scale")
        _check_origin(scale, origin, paths.SCALE, "maskdm scale")
        _check_protocol(scale, paths.SCALE, "maskdm scale")
    except UnusableError as error:
        missed.add(error)
        return None
    return scale


def _read_choices(params: Params, origin: dict[str, Any], missed: _Missed) -> dict[str, Choice]:
    """Where a trial is missing, how the arm's values came about is not known."""
    choices = {}
    for arm in params.arms:
        try:
            trials = [read_trial(params, arm, name, origin) for name in _trial_names(params)]
            choices[arm] = read_choice(params, arm, trials)
        except UnusableError as error:
            missed.add(error, arm)
    return choices


def _comparable_choices(choices: dict[str, Choice], protocol: Protocol | None, missed: _Missed) -> dict[str, Choice]:
    """The choices from trials that were scored as the arms were: the others say nothing of the arms' numbers."""
    comparable = {}
    for arm, choice in choices.items():
        try:
            for trial in choice.trials:
                if trial.fid is not None:
                    require_equal_protocols(trial, {} if protocol is None else protocol.as_dict(), "the arms'")
            comparable[arm] = choice
        except UnusableError as error:
            missed.add(error, arm)
    return comparable


def _trial_names(params: Params) -> list[str]:
    return list(params.tuning.trials) if params.tuning.enabled else []


def _read_runs(params: Params, choices: dict[str, Choice], origin: dict[str, Any], missed: _Missed) -> list[Run]:
    runs = []
    for arm in params.arms:
        made_with = _made_with(params, choices, arm)
        for seed in params.seeds:
            try:
                runs.append(_read_run(params, arm, seed, made_with, origin))
            except UnusableError as error:
                missed.add(error, arm, seed)
    return runs


def _read_run(params: Params, arm: str, seed: int, made_with: MadeWith | None, origin: dict[str, Any]) -> Run:
    records = {  # in the order of the stages: the first that has not run is the one to name
        stage: read_json(
            paths.record(stage, arm, seed),
            command(stage, arm, seed),
            TIMED_KEYS if stage in TRAINING_STAGES else ("wall_seconds",),
        )
        for stage in ARM_STAGES
    }
    pretrain, finetune = records["pretrain"], records["finetune"]
    pretrain_curve = _timed(paths.pretrain(arm, seed), pretrain, {}, command("pretrain", arm, seed))
    finetune_curve = _timed(paths.finetune(arm, seed), finetune, pretrain, command("finetune", arm, seed))
    metrics = _read_metrics(params, arm, seed, made_with, origin)
    _check_steps(params, metrics, finetune_curve, arm, seed)
    final = paths.samples(arm, seed) / f"milestone-{milestone_key(params.budget.milestones[-1])}.npy"
    return Run(
        arm,
        seed,
        metrics=metrics,
        pretrain_record=pretrain,
        finetune_record=finetune,
        pretrain_curve=pretrain_curve,
        finetune_curve=finetune_curve,
        samples=np.array(open_images(final, command("sample", arm, seed))[:MAX_SHOWN]),
        wall_seconds={stage: float(record["wall_seconds"]) for stage, record in records.items()},
    )


def _timed(folder: Path, record: dict[str, Any], before: dict[str, Any], made_by: str) -> pd.DataFrame:
    """A curve with the seconds and memory of its rows; `before` is the record of the stage before."""
    file = folder / "curve.csv"
    curve = read_curve(file, made_by)
    timings = pd.DataFrame(record["timings"], columns=list(TIMING_COLUMNS)).astype("float64")
    for column in ("device_seconds", "data_wait_seconds"):
        timings[column] += before.get(column, 0.0)
    peaks = [timing["peak_memory_gib"] for timing in before.get("timings", [])]
    timings["peak_memory_gib"] = timings["peak_memory_gib"].clip(lower=max(peaks, default=0.0)).cummax()  # if resumed
    if not set(curve["step"]) <= set(timings["step"]):
        raise UnusableError(f"{file} and the timings of its record are of different runs", made_by)
    return curve.merge(timings, on="step", how="left")


def _read_metrics(
    params: Params, arm: str, seed: int, made_with: MadeWith | None, origin: dict[str, Any]
) -> dict[str, Any]:
    file, made_by = paths.metrics(arm, seed), command("evaluate", arm, seed)
    metrics = read_json(file, made_by, METRICS_KEYS)
    for key in MASK_KEYS:
        asked = getattr(params.arm(arm), key)
        if metrics[key] != asked:
            reason = f"{file} is stale: it was made with {key} {metrics[key]}, params.yaml has {asked}"
            raise UnusableError(reason, command("pretrain", arm, seed))
    _check_origin(metrics, origin, file, made_by)
    _check_protocol(metrics, file, made_by)
    if made_with is not None:
        _check_made_with(metrics, made_with, file, arm, seed)
    for fraction in params.budget.milestones:
        milestone: Any = (metrics["milestones"] or {}).get(milestone_key(fraction))
        where = f"milestone {milestone_key(fraction)} in {file}"
        require(milestone, MILESTONE_KEYS, where, made_by)
        if milestone["num_samples"] != params.sampling.num_samples:
            raise UnusableError(
                f"{where} was scored with {milestone['num_samples']} samples, params.yaml has "
                f"{params.sampling.num_samples}, and FID depends on their number",
                command("sample", arm, seed),
            )
    return metrics


def _made_with(params: Params, choices: dict[str, Choice], arm: str) -> MadeWith | None:
    """What results of an arm must have been made with; None where it is not known which values were chosen for it."""
    if params.tuning.enabled:
        if (choice := choices.get(arm)) is None:
            return None
        params = params.with_values(arm, choice.values)
    return {"trained_with": params.trained_with(arm), "scored_with": params.scored_with}


def _check_made_with(metrics: dict[str, Any], made_with: MadeWith, file: Path, arm: str, seed: int) -> None:
    what = {
        "trained_with": ("model, diffusion, budget, training or the arm's values have changed since", "pretrain"),
        "scored_with": ("sampling or evaluation has changed since", "sample"),
    }
    for key, (reason, stage) in what.items():
        if metrics[key] != made_with[key]:
            raise UnusableError(f"{file} is stale: {reason}", command(stage, arm, seed))


def _check_steps(params: Params, metrics: dict[str, Any], curve: pd.DataFrame, arm: str, seed: int) -> None:
    """Every milestone must be a row of the curve: its seconds are there."""
    for fraction in params.budget.milestones:
        step = metrics["milestones"][milestone_key(fraction)]["step"]
        if step not in set(curve["step"]):
            raise UnusableError(
                f"{paths.finetune(arm, seed) / 'curve.csv'} has no row for step {step}, which "
                f"{paths.metrics(arm, seed)} says is milestone {milestone_key(fraction)}",
                command("finetune", arm, seed),
            )


def _check_origin(scores: dict[str, Any], origin: dict[str, Any], file: Path, made_by: str) -> None:
    """Scores may be compared only if they are of the same data, by the same extractor."""
    for key in ORIGIN_KEYS:
        if scores[key] != origin[key]:
            reason = f"{file} is not comparable with results/features and results/data now"
            raise UnusableError(f"{reason}: its {key} is {scores[key]}, theirs {origin[key]}", made_by)


def _one_protocol(scale: dict[str, Any] | None, runs: list[Run]) -> Protocol | None:
    """The protocol of all scores; None where none was recorded.

    Raises:
        UserError: they have different ones.
    """
    of_runs = {f"{run.arm}, seed {run.seed}": (run.metrics, command("evaluate", run.arm, run.seed)) for run in runs}
    scores = {**of_runs, **({} if scale is None else {"the scale": (scale, "maskdm scale")})}
    first, *others = scores
    protocol = scores[first][0].get("protocol")
    for name in others:
        found, made_by = scores[name][0].get("protocol"), scores[name][1]
        if differing := list(differences(protocol or {}, found or {})):
            more = len(differing) - MAX_DIFFERENCES
            said = [*differing[:MAX_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
            raise UserError(
                f"numbers of different protocols are not put into one table: {first} and {name} differ in "
                f"{'; '.join(said)}. Run again what was scored otherwise: `{scores[first][1]}` or `{made_by}`"
            )
    return Protocol.from_dict(protocol) if protocol else None


def _check_protocol(scores: dict[str, Any], file: Path, made_by: str) -> None:
    if scores.get("protocol"):
        try:
            Protocol.from_dict(scores["protocol"])
        except ValueError as error:
            raise UnusableError(f"the protocol in {file} can't be read ({error})", made_by) from None


def _read_real(manifest: dict[str, Any]) -> np.ndarray:
    shard = open_images(paths.DATA / manifest["shards"][0]["file"], "maskdm prepare")
    # Spread over the shard: a folder tree is read class by class, and its first images would be one class.
    return np.array(shard[np.unique(np.linspace(0, len(shard) - 1, MAX_SHOWN).astype(int))])
