"""What tuning left behind: the values that each arm runs with, and every trial they were chosen from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maskdm.config import paths
from maskdm.config.formats import GIVEN
from maskdm.config.jobs import Job, Jobs
from maskdm.report.files import UnusableError, read_json


@dataclass(frozen=True)
class Trial:
    """One trial of one arm.

    Attributes:
        values: what it overrides, by dotted path.
        failed: why it has no scores, if it was trained in vain.
        fid: at the end of the trial's budget; None without scores.
        kid: likewise.
        wall_seconds: of training, sampling and scoring; None without a record.
    """

    arm: str
    name: str
    values: dict[str, Any]
    failed: str | None
    fid: float | None
    kid: float | None
    wall_seconds: float | None

    def score(self, metric: str) -> float | None:
        """What trials are compared by; lower is better; None: it failed."""
        return self.kid if metric == "kid" else self.fid


@dataclass(frozen=True)
class Choice:
    """How an arm came by its hyperparameters.

    Attributes:
        trial: the name of the chosen one; None: all have failed, and the arm is missing.
        values: what it overrides, by dotted path.
        trials: what it was chosen from, in the order of params.yaml; empty: the values were given.
    """

    arm: str
    trial: str | None
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


def read_choice(jobs: Jobs, arm: str) -> Choice:
    """The choice made for an arm, which is current, and what it was made from.

    Raises:
        UnusableError: a file is damaged.
    """
    if not jobs.params.tuning.enabled:
        return Choice(arm, GIVEN, {}, [])
    trials = [_read_trial(jobs.find("tune", arm, trial=name)) for name in jobs.params.tuning.trials]
    chosen = read_json(paths.chosen(arm), jobs.find("choose").command)
    return Choice(arm, chosen["trial"], chosen["values"], trials)


def _read_trial(job: Job) -> Trial:
    found = read_json(job.output, job.command)
    assert job.trial is not None
    scores = {key: found[key] for key in ("arm", "failed", "fid", "kid")}
    values = job.params.tuning.trials[job.trial]  # the file's may be others that mean the same to this arm
    return Trial(name=job.trial, values=values, wall_seconds=_wall_seconds(job), **scores)


def _wall_seconds(job: Job) -> float | None:
    """The seconds are a courtesy: a trial counts without them."""
    try:
        return float(read_json(job.record, job.command)["wall_seconds"])
    except UnusableError:
        return None
