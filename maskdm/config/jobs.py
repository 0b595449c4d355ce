"""The runs of all stages: version, output and inputs of each, and whether its output is what params.yaml asks for.

The stamp of an output (`stamps`) says what it was made from; a `Job` says what it would be made from now. Engines may
start a stage as often as they like: it works only if the two differ. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from maskdm.base.checksums import checked, file_sha256
from maskdm.base.errors import UserError
from maskdm.config import paths
from maskdm.config.paths import ARM_STAGES as ARM_STAGES  # take --arm and --seed
from maskdm.config.runs import Run, resolve, shared_values
from maskdm.config.schema import Params
from maskdm.config.stamps import Stamp, missing_files, read_stamp

# Raise a version when the stage computes something else, not when its code only reads differently: outputs of older
# versions are made again. dvc.yaml and the Snakefile contain the versions too, because DVC compares commands.
STAGE_VERSIONS = {
    "prepare": 6,
    "features": 5,
    "scale": 6,
    "tune": 6,
    "choose": 3,
    "pretrain": 7,
    "finetune": 6,
    "sample": 6,
    "evaluate": 5,
    "report": 8,
}
OUTPUTS = {
    "prepare": paths.DATA,
    "features": paths.FEATURES,
    "scale": paths.SCALE,
    "choose": paths.CHOSEN,
    "report": paths.REPORT,
}
OUTPUTS_OF_A_RUN: dict[str, Callable[[str, Any], Path]] = {  # of an arm, and its trial or seed
    "tune": paths.trial,
    "pretrain": paths.pretrain,
    "finetune": paths.finetune,
    "sample": paths.samples,
    "evaluate": paths.metrics,
}
MANIFEST = "manifest.json"
EVERYTHING = "(or everything: dvc repro)"


class OutdatedError(UserError):
    """An output is missing, or is not what params.yaml asks for.

    Args:
        job: the job that makes it. If one of its own inputs is missing or out of date, the error is about that one.
    """

    def __init__(self, job: Job) -> None:
        self.job, reason = job.first, job.first.why_outdated()
        super().__init__(f"{reason}; run first: {self.job.command}   {EVERYTHING}", reason)


@dataclass(frozen=True)
class Input:
    """Something that a stage reads.

    Attributes:
        name: its name in the stamp.
        digest: returns the digest of its content; None if it is missing.
        job: the job that makes it; None for a file of the user.
    """

    name: str
    digest: Callable[[], str | None]
    job: Job | None = None


@dataclass(frozen=True)
class Job:
    """One run of one stage; it caches what it reads from files.

    Attributes:
        jobs: all jobs of the experiment.
        stage: the name of the stage.
        arm: the key of the arm; None for a stage of the whole experiment.
        seed: the seed of the arm's run.
        trial: the name of the trial of the arm's tuning.
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

    @property
    def run(self) -> Run:
        """The arm and seed, or the trial, with the values that were chosen for the arm.

        Raises:
            OutdatedError: the choice is missing or out of date.
            UserError: no trial could be chosen.
        """
        assert self.arm is not None
        return self.jobs.run_of(self.arm, self.seed, self.trial)

    @property
    def name(self) -> str:
        """A name for files: `pretrain-patch-m50-seed-0`."""
        return paths.name_of(self.stage, self.arm, self.seed, self.trial)

    @property
    def title(self) -> str:
        """A name for messages: `pretrain patch-m50 seed 0`."""
        which = f"trial {self.trial}" if self.trial is not None else f"seed {self.seed}"
        return self.stage if self.arm is None else f"{self.stage} {self.arm} {which}"

    @property
    def words(self) -> list[str]:
        """The command line that runs it, without `maskdm`."""
        which = ["--trial", self.trial] if self.trial is not None else ["--seed", str(self.seed)]
        return [self.stage] if self.arm is None else [self.stage, "--arm", self.arm, *which]

    @property
    def command(self) -> str:
        """The command line that runs it."""
        return " ".join(["maskdm", *self.words])

    @property
    def output(self) -> Path:
        """The folder or file that it makes."""
        if self.arm is None:
            return OUTPUTS[self.stage]
        return OUTPUTS_OF_A_RUN[self.stage](self.arm, self.seed if self.trial is None else self.trial)

    @property
    def record(self) -> Path:
        """The file with time, machine and provenance: what differs between equal runs."""
        return paths.record(self.stage, self.arm, self.seed, self.trial)

    @property
    def lock(self) -> Path:
        """The lock file that a process holds while it works on it."""
        return paths.work(self.output) / "lock"

    @property
    def values(self) -> dict[str, Any]:
        """Exactly the values of params.yaml that its result depends on."""
        return shared_values(self.stage, self.params) if self.arm is None else self.run.values(self.stage)

    @cached_property
    def inputs(self) -> list[Input]:
        """What it reads."""
        return list(_inputs(self) if self.arm is None else _inputs_of_a_run(self))

    def wanted(self) -> Stamp:
        """The stamp that its output would have now, without the content."""
        inputs = {one.name: one.digest() for one in self.inputs}
        return Stamp(self.stage, STAGE_VERSIONS[self.stage], self.values, inputs)

    def require_inputs(self) -> None:
        """Raise an OutdatedError if an input is missing or out of date; the report leaves out what is missing."""
        for one in self.inputs if self.stage != "report" else ():
            if one.job is not None and one.job.why_outdated():
                raise OutdatedError(one.job)

    def why_outdated(self) -> str:
        """Why its output is not what params.yaml asks for, with the path; empty if it is up to date."""
        return self._comparison[0]

    @property
    def first(self) -> Job:
        """The job to run first if the output is out of date: this one, or the one that makes an outdated input."""
        return self._comparison[1]

    @cached_property
    def _comparison(self) -> tuple[str, Job]:
        try:
            return self._compare(), self
        except OutdatedError as error:
            return f"{self.output} is out of date: {error.reason}", error.job

    def _compare(self) -> str:
        """Compare the stamp of the output with the wanted one.

        Raises:
            OutdatedError: an input is missing or out of date.
        """
        if not self.output.exists():
            return f"{self.output} is missing"
        if (stamp := read_stamp(self.output)) is None:
            return f"{self.output} is damaged or of an older version: no stamp says what it was made from"
        try:
            self.require_inputs()
            wanted = self.wanted()
        except OutdatedError:
            raise
        except UserError as error:
            return f"{self.output} is out of date: {error}"
        for one in self.inputs:  # a file of the user that was removed since is taken to be unchanged
            if one.job is None and wanted.inputs[one.name] is None and one.name in stamp.inputs:
                wanted.inputs[one.name] = stamp.inputs[one.name]
        if stamp.key != wanted.key:
            return f"{self.output} is out of date: {stamp.differences(wanted) or 'it was made by another stage'}"
        if not self.record.is_file() and self.stage != "report":
            return f"{self.record} is missing"
        return missing_files(self.output, stamp)


class Jobs:
    """All jobs of an experiment, cached together with what they have read from files.

    Args:
        params: the experiment.
    """

    def __init__(self, params: Params) -> None:
        self.params = params
        self._jobs: dict[tuple[Any, ...], Job] = {}
        self._runs: dict[tuple[Any, ...], Run] = {}

    def find(self, stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None) -> Job:
        """The job of a stage."""
        key = (stage, arm, seed, trial)
        return self._jobs.setdefault(key, Job(self, *key))

    def all(self) -> Iterator[Job]:
        """Every job, after the jobs that it depends on."""
        params = self.params
        yield from (self.find(stage) for stage in ("prepare", "features", "scale"))
        yield from (self.find("tune", arm, trial=trial) for arm in params.arms for trial in params.tuning.trials)
        yield self.find("choose")
        for stage in ARM_STAGES:
            yield from (self.find(stage, arm, seed) for arm in params.arms for seed in params.seeds)
        yield self.find("report")

    def forget(self) -> None:
        """Drop the caches: all files are read again."""
        self._jobs, self._runs = {}, {}

    def run_of(self, arm: str, seed: int | None, trial: str | None = None) -> Run:
        """An arm and seed, or a trial, resolved with the values that were chosen for the arm.

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
        """The values of the trial that was chosen for an arm; None if nothing is tuned.

        Raises:
            OutdatedError: the choice is missing or out of date.
            UserError: no trial could be chosen, or the choice is damaged.
        """
        if not self.params.tuning.enabled:
            return None
        self._require_choice(arm)
        try:
            choice = checked(json.loads(paths.chosen(arm).read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            command = self.find("choose").command
            raise UserError(f"{paths.chosen(arm)} is damaged ({error}); run first: {command} --force") from None
        if choice["trial"] is None:
            raise UserError(
                f"every trial of arm {arm} has failed ({choice['failed']}): the arm can't run; give tuning.trials "
                "smaller learning rates, or remove the arm"
            )
        return dict(choice["values"])

    def _require_choice(self, arm: str) -> None:
        """Raise an OutdatedError if an arm's choice could differ now; trials of other arms do not matter."""
        trials = [_output(self.find("tune", arm, trial=trial)) for trial in self.params.tuning.trials]
        for trial in trials:
            if trial.job is not None and trial.job.why_outdated():
                raise OutdatedError(trial.job)
        choose = self.find("choose")
        made = read_stamp(choose.output)
        if (
            made is None
            or made.version != STAGE_VERSIONS["choose"]
            or made.values["tuning"] != choose.values["tuning"]
            or any(made.inputs.get(trial.name) != trial.digest() for trial in trials)
            or missing_files(choose.output, made)
        ):
            raise OutdatedError(choose)


def _inputs(job: Job) -> Iterator[Input]:
    """The inputs of a stage of the whole experiment."""
    find, params = job.jobs.find, job.params
    match job.stage:
        case "features":
            yield _data(job)
            if params.dataset.held_out:
                yield _data(job, paths.HELD_OUT)
            if weights := params.evaluation.weights:
                yield _file("evaluation.weights", Path(weights))
        case "scale":
            yield from (_data(job), _output(find("features")))
        case "choose":
            for arm in params.arms:
                yield from (_output(find("tune", arm, trial=trial)) for trial in params.tuning.trials)
        case "report":  # it shows times, so it also reads the records
            for other in list(job.jobs.all())[:-1]:
                yield from (_output(other), _file(str(other.record), other.record, other))


def _inputs_of_a_run(job: Job) -> Iterator[Input]:
    """The inputs of a stage of an arm and seed, or of a trial."""
    of_all, of_arm = job.jobs.find, partial(job.jobs.find, arm=job.arm, seed=job.seed)
    match job.stage:
        case "tune":
            yield from (_data(job), _output(of_all("features")), *_pretrained_on(job))
        case "pretrain":
            yield from _pretrained_on(job)
        case "finetune":
            yield from (_data(job), _output(of_arm("pretrain")))
        case "sample":
            yield from (_output(of_arm(stage)) for stage in ("finetune", *["pretrain"] * job.run.has_primer))
        case "evaluate":
            yield from (_data(job), _output(of_all("features")), _output(of_all("scale")))
            yield from (_output(of_arm("finetune")), _output(of_arm("sample")))


def _pretrained_on(job: Job) -> Iterator[Input]:
    """The images of pretraining, and the weights that it starts from."""
    config = job.run.params.pretrain_of(job.run.arm)
    yield _data(job, paths.DATA if config.dataset is None else paths.pretrain_data(config.dataset))
    if config.checkpoint is not None:  # config.json has the hash of the weights, which the stage verifies
        file = Path(config.checkpoint) / "config.json"
        yield Input("pretrain.checkpoint", lambda: _json_value(file, lambda it: it["weights"][it["which"]]["sha256"]))


def _output(job: Job) -> Input:
    """The output of another job."""

    def digest() -> str | None:
        stamp = read_stamp(job.output)
        return None if stamp is None else stamp.content

    return Input(str(job.output), digest, job)


def _data(job: Job, folder: Path = paths.DATA) -> Input:
    """A prepared dataset; its digest covers pixels and labels, not where they came from."""
    return Input(str(folder), lambda: _json_value(folder / MANIFEST, lambda it: it["sha256"]), job.jobs.find("prepare"))


def _file(name: str, file: Path, job: Job | None = None) -> Input:
    def digest() -> str | None:
        try:
            return file_sha256(file)
        except OSError:
            return None

    return Input(name, digest, job)


def _json_value(file: Path, of: Callable[[Any], Any]) -> str | None:
    """A value from a JSON file; None if the file or the value is missing."""
    try:
        return str(of(json.loads(file.read_bytes())))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
