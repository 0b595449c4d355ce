"""What every stage is: its version, output and inputs; and whether its output is what params.yaml asks for.

The stamp of an output (`stamps`) says what it was made from; a `Job` says what it would be made from now. Engines may
start a stage as often as they like: it works only where the two differ. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from maskdm.base.checksums import checked, file_sha256
from maskdm.base.errors import UserError
from maskdm.config import paths
from maskdm.config.runs import Run, resolve, shared_values
from maskdm.config.schema import Params
from maskdm.config.stamps import Stamp, missing_files, read_stamp

# Raised when a stage's code computes something else (not when a comment changes: a training of days must survive that).
# dvc.yaml and the Snakefile carry them too: DVC runs a stage again when its command changes.
STAGE_VERSIONS = {
    "prepare": 5,
    "features": 5,
    "scale": 6,
    "tune": 6,
    "choose": 3,
    "pretrain": 7,
    "finetune": 6,
    "sample": 6,
    "evaluate": 5,
    "report": 6,
}
ARM_STAGES = ("pretrain", "finetune", "sample", "evaluate")  # take --arm and --seed
MANIFEST = "manifest.json"
EVERYTHING = "(or everything: dvc repro)"


class OutdatedError(UserError):
    """An output is missing, or not what params.yaml asks for.

    Args:
        job: that makes it. If what that one reads is missing or out of date itself, the error is about this.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.reason = job.first, job.first.why_outdated()
        super().__init__(f"{self.reason}; run first: {self.job.command}   {EVERYTHING}")


@dataclass(frozen=True)
class Input:
    """Something that a stage reads.

    Attributes:
        name: for the stamp.
        digest: of its content; None where it is not there.
        job: that makes it; None for a file of the user's.
    """

    name: str
    digest: Callable[[], str | None]
    job: Job | None = None


@dataclass(frozen=True)
class Job:
    """One run of one stage.

    Attributes:
        jobs: all of the experiment, to find others.
        stage: its name.
        arm: where it works on one.
        seed: of the arm's run.
        trial: of the arm's tuning.
    """

    jobs: Jobs = field(repr=False, compare=False)
    stage: str
    arm: str | None = None
    seed: int | None = None
    trial: str | None = None

    @property
    def params(self) -> Params:
        """The experiment."""
        return self.jobs.params

    @cached_property
    def run(self) -> Run:
        """The arm and seed, or the trial, with the values that were chosen for it.

        Raises:
            OutdatedError: the choice is missing or out of date.
            UserError: no trial could be chosen.
        """
        assert self.arm is not None
        return self.jobs.run_of(self.arm, self.seed, self.trial)

    @property
    def name(self) -> str:
        """For files: `pretrain-patch-m50-seed-0`."""
        return paths.name_of(self.stage, self.arm, self.seed, self.trial)

    @property
    def title(self) -> str:
        """For messages: `pretrain patch-m50 seed 0`."""
        which = f"trial {self.trial}" if self.trial is not None else f"seed {self.seed}"
        return self.stage if self.arm is None else f"{self.stage} {self.arm} {which}"

    @property
    def words(self) -> list[str]:
        """The words after `maskdm` that run it."""
        which = ["--trial", self.trial] if self.trial is not None else ["--seed", str(self.seed)]
        return [self.stage] if self.arm is None else [self.stage, "--arm", self.arm, *which]

    @property
    def command(self) -> str:
        """What to type."""
        return " ".join(["maskdm", *self.words])

    @property
    def output(self) -> Path:
        """The folder or file that it makes."""
        if self.arm is None:
            return OUTPUTS[self.stage]
        if self.trial is not None:
            return paths.trial(self.arm, self.trial)
        assert self.seed is not None
        return OUTPUTS_OF_A_RUN[self.stage](self.arm, self.seed)

    @property
    def record(self) -> Path:
        """Time, machine and provenance: what differs between equal runs."""
        return paths.record(self.stage, self.arm, self.seed, self.trial)

    @property
    def lock(self) -> Path:
        """Held by the process that works on it."""
        return paths.work(self.output) / "lock"

    @property
    def values(self) -> dict[str, Any]:
        """Exactly the values of params.yaml that its result depends on."""
        return shared_values(self.stage, self.params) if self.arm is None else self.run.values(self.stage)

    @cached_property
    def inputs(self) -> list[Input]:
        """What it reads."""
        return list(INPUTS[self.stage](self))

    def wanted(self) -> Stamp:
        """The stamp that its output would have now, but for what is in it."""
        inputs = {one.name: one.digest() for one in self.inputs}
        return Stamp(self.stage, STAGE_VERSIONS[self.stage], self.values, inputs)

    def why_outdated(self) -> str:
        """Why its output is not what params.yaml asks for, with the path; empty where it is."""
        return self.jobs.why_outdated(self)

    @property
    def first(self) -> Job:
        """What to run first where its output is out of date: this, or what makes an input that is out of date."""
        return self.jobs.first_of(self)

    def require_inputs(self) -> None:
        """Raises: OutdatedError, if an input is missing or out of date; the report does without what is missing."""
        for one in self.inputs:
            if one.job is not None and self.stage != "report" and one.job.why_outdated():
                raise OutdatedError(one.job)


class Jobs:
    """Every job of an experiment; what is found out about one is remembered.

    Args:
        params: the experiment.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self._found: dict[tuple[Any, ...], Job] = {}
        self._runs: dict[tuple[Any, ...], Run] = {}
        self._outdated: dict[Job, tuple[str, Job]] = {}  # why, and what to run first

    def find(self, stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None) -> Job:
        """The job of a stage."""
        key = (stage, arm, seed, trial)
        if key not in self._found:
            self._found[key] = Job(self, *key)
        return self._found[key]

    def all(self) -> Iterator[Job]:
        """Every job, each behind those that it needs."""
        params = self.params
        yield from (self.find(stage) for stage in ("prepare", "features", "scale"))
        yield from (self.find("tune", arm, trial=trial) for arm in params.arms for trial in params.tuning.trials)
        yield self.find("choose")
        for stage in ARM_STAGES:
            yield from (self.find(stage, arm, seed) for arm in params.arms for seed in params.seeds)
        yield self.find("report")

    def run_of(self, arm: str, seed: int | None, trial: str | None = None) -> Run:
        """An arm and seed, or a trial, resolved with the values that were chosen for it.

        Raises:
            OutdatedError: the choice is missing or out of date.
            UserError: no trial could be chosen.
        """
        key = (arm, seed, trial)
        if key not in self._runs:
            chosen = None if trial is not None else self.chosen_values(arm)
            self._runs[key] = resolve(self.params, arm, seed or 0, trial, chosen)
        return self._runs[key]

    def chosen_values(self, arm: str) -> dict[str, Any] | None:
        """The values of the trial that was chosen for an arm; None where nothing is tuned.

        Raises:
            OutdatedError: the choice is missing or out of date.
            UserError: no trial could be chosen.
        """
        if not self.params.tuning.enabled:
            return None
        choose = self.find("choose")
        self._require_choice(choose, arm)
        try:
            choice = checked(json.loads(paths.chosen(arm).read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{paths.chosen(arm)} is damaged ({error}); run first: {choose.command} --force") from None
        if choice["trial"] is None:
            raise UserError(
                f"every trial of arm {arm} has failed ({choice['failed']}): it can't run; give tuning.trials smaller "
                "learning rates, or remove the arm"
            )
        return dict(choice["values"])

    def _require_choice(self, choose: Job, arm: str) -> None:
        """Raises: OutdatedError, if an arm's choice would be another now; other arms' trials do not matter to it."""
        trials = [self.find("tune", arm, trial=trial) for trial in self.params.tuning.trials]
        for trial in trials:
            if trial.why_outdated():
                raise OutdatedError(trial)
        made = read_stamp(choose.output)
        if (
            made is None
            or made.version != STAGE_VERSIONS["choose"]
            or made.values["tuning"] != choose.values["tuning"]
            or any(made.inputs.get(str(trial.output)) != _content(trial) for trial in trials)
            or missing_files(choose.output, made)
        ):
            raise OutdatedError(choose)

    def why_outdated(self, job: Job) -> str:
        """Why the output of a job is not what params.yaml asks for; empty where it is."""
        return self._look_at(job)[0]

    def first_of(self, job: Job) -> Job:
        """What to run first where the output of a job is out of date."""
        return self._look_at(job)[1]

    def forget(self) -> None:
        """Look at all files anew."""
        self._found, self._runs, self._outdated = {}, {}, {}

    def _look_at(self, job: Job) -> tuple[str, Job]:
        if job not in self._outdated:
            try:
                self._outdated[job] = self._compare(job), job
            except OutdatedError as error:
                self._outdated[job] = f"{job.output} is out of date: {error.reason}", error.job
        return self._outdated[job]

    def _compare(self, job: Job) -> str:
        """Raises: OutdatedError, if an input is missing or out of date."""
        if not job.output.exists():
            return f"{job.output} is missing"
        if (stamp := read_stamp(job.output)) is None:
            return f"{job.output} is damaged or of an older version: no stamp says what it was made from"
        try:
            if job.stage != "report":
                job.require_inputs()
            wanted = job.wanted()
        except OutdatedError:
            raise
        except UserError as error:
            return f"{job.output} is out of date: {error}"
        if stamp.key != _as_before(wanted, stamp, job).key:
            return f"{job.output} is out of date: {stamp.differences(wanted) or 'it was made by another stage'}"
        if not job.record.is_file() and job.stage != "report":
            return f"{job.record} is missing"
        return missing_files(job.output, stamp)


def _as_before(wanted: Stamp, stamp: Stamp, job: Job) -> Stamp:
    """A file of the user's that has gone since is taken for what it was: the output that was made from it is there."""
    gone = [one.name for one in job.inputs if one.job is None and wanted.inputs[one.name] is None]
    inputs = wanted.inputs | {name: stamp.inputs[name] for name in gone if name in stamp.inputs}
    return Stamp(wanted.stage, wanted.version, wanted.values, inputs)


def _content(job: Job) -> str | None:
    """The digest of an output."""
    stamp = read_stamp(job.output)
    return None if stamp is None else stamp.content


def _output(job: Job) -> Input:
    return Input(str(job.output), lambda: _content(job), job)


def _data(job: Job, folder: Path = paths.DATA) -> Input:
    """A dataset; its pixels and labels count, not where they came from."""

    def digest() -> str | None:
        try:
            return str(json.loads((folder / MANIFEST).read_bytes())["sha256"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    return Input(str(folder), digest, job.jobs.find("prepare"))


def _real_images(job: Job) -> Iterator[Input]:
    yield _data(job)
    if job.params.dataset.held_out:
        yield _data(job, paths.HELD_OUT)


def _pretrained_on(job: Job) -> Iterator[Input]:
    """The images of pretraining, and the weights that it starts from."""
    config = job.run.params.pretrain_of(job.run.arm)
    yield _data(job, paths.DATA if config.dataset is None else paths.pretrain_data(config.dataset))
    if config.checkpoint is not None:
        yield _checkpoint(Path(config.checkpoint))


def _checkpoint(folder: Path) -> Input:
    """The weights of an exported model; its config.json has their hash, which the stage checks."""

    def digest() -> str | None:
        try:
            config = json.loads((folder / "config.json").read_bytes())
            return str(config["weights"][config["which"]]["sha256"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    return Input("pretrain.checkpoint", digest)


def _users_file(name: str, file: Path) -> Input:
    def digest() -> str | None:
        try:
            return file_sha256(file)
        except OSError:
            return None

    return Input(name, digest)


def _of_features(job: Job) -> Iterator[Input]:
    yield from _real_images(job)
    if job.params.evaluation.weights:
        yield _users_file("evaluation.weights", Path(job.params.evaluation.weights))


def _of_scale(job: Job) -> Iterator[Input]:
    yield _data(job)
    yield _output(job.jobs.find("features"))


def _of_tune(job: Job) -> Iterator[Input]:
    yield from _of_scale(job)
    yield from _pretrained_on(job)


def _of_choose(job: Job) -> Iterator[Input]:
    trials = job.params.tuning.trials
    return (_output(job.jobs.find("tune", arm, trial=trial)) for arm in job.params.arms for trial in trials)


def _of_finetune(job: Job) -> Iterator[Input]:
    yield _data(job)
    yield _output(job.jobs.find("pretrain", job.arm, job.seed))


def _of_sample(job: Job) -> Iterator[Input]:
    yield _output(job.jobs.find("finetune", job.arm, job.seed))
    if job.run.has_primer:
        yield _output(job.jobs.find("pretrain", job.arm, job.seed))


def _of_evaluate(job: Job) -> Iterator[Input]:
    yield _data(job)
    yield from (_output(job.jobs.find(stage)) for stage in ("features", "scale"))
    yield from (_output(job.jobs.find(stage, job.arm, job.seed)) for stage in ("finetune", "sample"))


def _of_report(job: Job) -> Iterator[Input]:
    """All outputs, and their records: the report shows times."""
    for other in job.jobs.all():
        if other.stage != "report":
            yield _output(other)
            yield Input(str(other.record), _users_file("", other.record).digest, other)


INPUTS: dict[str, Callable[[Job], Iterator[Input]]] = {
    "prepare": lambda job: iter(()),
    "features": _of_features,
    "scale": _of_scale,
    "tune": _of_tune,
    "choose": _of_choose,
    "pretrain": _pretrained_on,
    "finetune": _of_finetune,
    "sample": _of_sample,
    "evaluate": _of_evaluate,
    "report": _of_report,
}
OUTPUTS = {
    "prepare": paths.DATA,
    "features": paths.FEATURES,
    "scale": paths.SCALE,
    "choose": paths.CHOSEN,
    "report": paths.REPORT,
}
OUTPUTS_OF_A_RUN: dict[str, Callable[[str, int], Path]] = {
    "pretrain": paths.pretrain,
    "finetune": paths.finetune,
    "sample": paths.samples,
    "evaluate": paths.metrics,
}
