"""What tuning left behind: the values that each arm runs with, and every trial they were chosen from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.config import Params
from maskdm.formats import ORIGIN_KEYS
from maskdm.protocol import differences
from maskdm.report.files import UnusableError, read_json

CHOICE_KEYS = ("trial", "values")
TRIAL_KEYS = ("values", "seed", "budget_fraction", "trained", "failed", "fid", "kid")
CHOOSE = "maskdm choose"


@dataclass(frozen=True)
class Trial:
    """One trial of one arm.

    Attributes:
        values: what it overrides, by dotted path.
        failed: why it has no scores, if it was trained in vain.
        fid: at the end of the trial's budget; None without scores.
        kid: likewise.
        wall_seconds: of training, sampling and scoring; None without a record.
        protocol: what its scores are of; empty without scores, or where none was recorded.
    """

    arm: str
    name: str
    values: dict[str, Any]
    failed: str | None
    fid: float | None
    kid: float | None
    wall_seconds: float | None
    protocol: dict[str, Any] = field(default_factory=dict)

    def score(self, metric: str) -> float | None:
        """What trials are compared by; lower is better; None: it failed."""
        return self.kid if metric == "kid" else self.fid


@dataclass(frozen=True)
class Choice:
    """How an arm came by its hyperparameters.

    Attributes:
        trial: the name of the chosen one.
        values: what it overrides, by dotted path.
        trials: what it was chosen from, in the order of params.yaml; empty: the values were given.
    """

    arm: str
    trial: str
    values: dict[str, Any]
    trials: list[Trial]

    @property
    def is_tuned(self) -> bool:
        """Whether there was anything to choose from."""
        return bool(self.trials)

    @property
    def num_trials(self) -> int:
        """From how many trials it was chosen; 1 means that the values were given, not tuned."""
        return max(len(self.trials), 1)

    @property
    def wall_seconds(self) -> float:
        """What all trials took."""
        return sum(trial.wall_seconds or 0.0 for trial in self.trials)


def read_choice(params: Params, arm: str, trials: list[Trial]) -> Choice:
    """The choice made for an arm.

    Args:
        params: the experiment.
        arm: its key.
        trials: of the arm; empty without tuning.

    Raises:
        UnusableError: it is missing, unreadable, would be another with params.yaml and the trials as they are, or
            the trials were scored by different protocols.
    """
    scored = [trial for trial in trials if trial.fid is not None]
    for trial in scored[1:]:
        require_equal_protocols(trial, scored[0].protocol, f"that of trial {scored[0].name}")
    file = paths.chosen(arm)
    chosen = read_json(file, CHOOSE, CHOICE_KEYS)
    asked: dict[str, Any] = {"values": {}}
    if params.tuning.enabled:
        scores = {trial.name: score for trial in trials if (score := trial.score(params.tuning.metric)) is not None}
        best = min(scores, key=lambda name: scores[name], default=None)
        asked = {"trial": best, "values": params.tuning.trials.get(best or "")}
    _require_equal(file, chosen, asked, CHOOSE)
    return Choice(arm, chosen["trial"], chosen["values"], trials)


def read_trial(params: Params, arm: str, name: str, origin: dict[str, Any]) -> Trial:
    """One trial of an arm.

    Args:
        params: the experiment.
        arm: its key.
        name: of the trial.
        origin: the extractor and data that its scores must come from.

    Raises:
        UnusableError: it is missing, unreadable, stale or not comparable.
    """
    file, made_by = paths.trial(arm, name), f"maskdm tune --arm {arm} --trial {name}"
    found, tuning = read_json(file, made_by, TRIAL_KEYS), params.tuning
    asked = {"values": tuning.trials[name], "seed": tuning.seed, "budget_fraction": tuning.budget_fraction}
    _require_equal(file, found, asked, made_by)
    if found["fid"] is not None:
        _require_equal(file, found, {key: origin[key] for key in ORIGIN_KEYS}, made_by)
    protocol = {} if found["fid"] is None else dict(found.get("protocol") or {})
    scores = (found["failed"], found["fid"], found["kid"])
    return Trial(arm, name, found["values"], *scores, _wall_seconds(arm, name), protocol)


def require_equal_protocols(trial: Trial, protocol: dict[str, Any], whose: str) -> None:
    """A trial is comparable only with what was scored as it was.

    Args:
        trial: with scores.
        protocol: as plain values; empty where none was recorded.
        whose: for the message.

    Raises:
        UnusableError: they differ.
    """
    if differing := list(differences(trial.protocol, protocol)):
        raise UnusableError(
            f"{paths.trial(trial.arm, trial.name)} was scored by another protocol than {whose}: {differing[0]}",
            f"maskdm tune --arm {trial.arm} --trial {trial.name}",
        )


def _wall_seconds(arm: str, name: str) -> float | None:
    """The seconds are a courtesy: a trial counts without them."""
    try:
        record = read_json(paths.record("tune", arm, trial=name), "", ("wall_seconds",))
    except UnusableError:
        return None
    return float(record["wall_seconds"])


def _require_equal(file: Path, found: dict[str, Any], asked: dict[str, Any], made_by: str) -> None:
    for key, wanted in asked.items():
        if found.get(key) != wanted:
            raise UnusableError(f"{file} is stale: {key} is {found.get(key)}, now it would be {wanted}", made_by)
