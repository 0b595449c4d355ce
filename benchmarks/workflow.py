"""`workflow`: what a stage costs beside its work, how fast commands start, and a `dvc repro` with nothing to do."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import ROOT
from benchmarks.timing import Rounds, Spread, Task, interleave
from maskdm.cli import main
from maskdm.config import load_params
from maskdm.config.jobs import ARM_STAGES, Jobs

TINY = ROOT / "experiments" / "tiny" / "params.yaml"
ENGINE_FILES = ("dvc.yaml", "params.yaml", "Snakefile", "workflow", "profiles", ".dvcignore")  # as a checkout has them
ARM = "patch-m50"
# In the order of the pipeline; `tune` is pretrain to evaluate in one.
STAGES = ("prepare", "features", "scale", "choose", "pretrain", "finetune", "sample", "evaluate", "report")
STARTS = ("maskdm --help", "maskdm validate")
TARGETS = {
    **{typed: Target(f"{typed}: seconds", None, 0.4) for typed in STARTS},
    "one": Target("dvc repro with nothing to do: seconds more than with one stage (strict)", None, 1.0),
    "list": Target("dvc repro with nothing to do: seconds more than `dvc stage list` there", None, 1.0),
}
TRIVIAL = {"stages": {"one": {"cmd": "echo 1 > one", "outs": ["one"]}}}


def run(settings: Settings) -> Outcome:
    """Stages one by one, then commands."""
    stages = ("prepare", "choose") if settings.is_quick else STAGES
    tables, targets = [_stages(settings, stages)], list[Target]()
    starts, rounds = _starts(settings)
    tables.append(starts)
    targets += [TARGETS[typed].measured(rounds.of(typed).median) for typed in STARTS]
    if not settings.is_quick:
        table, dvc_targets = _dvc(settings)
        tables.append(table)
        targets += dvc_targets
    return Outcome(tables, targets)


class Project:
    """A folder with experiments/tiny's params.yaml, changed for benchmarks: no tracking, nothing tuned.

    Args:
        folder: made.
        arms: of the experiment.
    """

    def __init__(self, folder: Path, arms: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
        content |= {"arms": arms, "tracking": {"enabled": False}}
        content["tuning"]["trials"] = {}
        (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def forget(self) -> None:
        """Remove all that stages have made."""
        for place in ("results", ".work"):
            shutil.rmtree(self.folder / place, ignore_errors=True)

    def seconds_of(self, *words: str) -> float:
        """Run a command; its wall seconds."""
        started = time.perf_counter()
        command(words, self.folder)
        return time.perf_counter() - started

    def record(self, stage: str) -> dict[str, Any]:
        """What a stage has recorded; nothing for the report."""
        name = f"{stage}-{ARM}-seed-0" if stage in ARM_STAGES else stage
        path = self.folder / "results" / "records" / f"{name}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def command(words: Sequence[str], folder: Path) -> str:
    """Run a command that must end well; what it printed."""
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """For engines: `maskdm` is this environment's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "PATH": path}


def words_of(stage: str) -> list[str]:
    """How a stage is typed."""
    return ["maskdm", stage, *(("--arm", ARM, "--seed", "0") if stage in ARM_STAGES else ())]


class _StageClock:
    """Runs the stages in turn, again and again from nothing, and keeps what their records say."""

    def __init__(self, project: Project, stages: Sequence[str]) -> None:
        self._project, self._first = project, stages[0]
        self.records: dict[str, list[dict[str, Any]]] = {stage: [] for stage in stages}

    def run(self, stage: str) -> float:
        """Run a stage of a round; the first of a round begins with an empty folder."""
        if stage == self._first:
            self._project.forget()
        seconds = self._project.seconds_of(*words_of(stage))
        self.records[stage].append(self._project.record(stage))
        return seconds

    def task(self, stage: str) -> Task:
        """A stage as something to be timed."""
        return Task(lambda _: self.run(stage))

    def spread(self, stage: str, key: str) -> Spread | None:
        """A value of the stage's records, the warming up left out; None where they have none."""
        values = [record[key] for record in self.records[stage][1:] if key in record]
        return Spread(tuple(values)) if values else None


def _stages(settings: Settings, stages: Sequence[str]) -> Table:
    project = Project(settings.folder / "stages", {ARM: _arms()[ARM]})
    clock = _StageClock(project, stages)
    rounds = interleave({stage: clock.task(stage) for stage in stages}, settings.rounds, "workflow: stages")
    rows = [_stage_row(stage, rounds, clock) for stage in stages]
    note = (
        "work: steps of training, else what the stage's own record says that it took from opening its inputs on; the "
        "report has no record. The rest is starting Python, importing, checking and publishing. Tracking is off."
    )
    return Table("a stage of experiments/tiny: wall seconds of the command against its work", rows, note)


def _stage_row(stage: str, rounds: Rounds, clock: _StageClock) -> dict[str, Cell]:
    wall, inside = rounds.of(stage), clock.spread(stage, "wall_seconds")
    work = clock.spread(stage, "device_seconds") or inside
    beside = None
    if work is not None:
        beside = Spread(tuple(all_of_it - own for all_of_it, own in zip(wall.raw, work.raw, strict=True)))
    return {"stage": stage, "wall s": wall, "inside the stage s": inside, "work s": work, "beside it s": beside}


def _starts(settings: Settings) -> tuple[Table, Rounds]:
    project = Project(settings.folder / "starts", _arms())
    commands = ("python -c pass", *STARTS, "maskdm plan --help")
    tasks = {typed: _command_task(project, typed) for typed in commands}
    rounds = interleave(tasks, settings.rounds, "workflow: start")
    rows: list[dict[str, Cell]] = [{"command": typed, "s": rounds.of(typed)} for typed in commands]
    return Table("start-up", rows), rounds


def _command_task(project: Project, typed: str) -> Task:
    return Task(lambda _: project.seconds_of(*typed.split()))


def _dvc(settings: Settings) -> tuple[Table, list[Target]]:
    """A `dvc repro` with nothing to do, on the default's arms, against DVC's own start.

    That is a `dvc repro` of one `echo`, the stricter one; or, in the same folder, `dvc stage list`, which loads every
    dvc.yaml as `dvc repro` does, and asks for no file's state.
    """
    ours, trivial = _finished_project(settings.folder / "ours"), _trivial_project(settings.folder / "trivial")
    tasks = {
        "dvc --version": _command_task(ours, "dvc --version"),
        "one": _command_task(trivial, "dvc repro"),
        "list": _command_task(ours, "dvc stage list"),
        "ours": _command_task(ours, "dvc repro"),
    }
    rounds = interleave(tasks, settings.rounds, "workflow: dvc")
    names = {
        "dvc --version": "dvc --version",
        "one": "dvc repro, one stage, nothing to do",
        "list": f"dvc stage list, the default's {len(_arms())} arms",
        "ours": f"dvc repro, the default's {len(_arms())} arms, nothing to do",
    }
    rows: list[dict[str, Cell]] = [{"command": typed, "s": rounds.of(name)} for name, typed in names.items()]
    added = {own: _added(rounds, "ours", own) for own in ("one", "list")}
    rows += [{"command": f"the last more than: {names[own]}", "s": more} for own, more in added.items()]
    return Table("DVC", rows), [TARGETS[own].measured(more.median) for own, more in added.items()]


def _added(rounds: Rounds, whole: str, own: str) -> Spread:
    """Seconds of a task more than of another, round by round."""
    pairs = zip(rounds.seconds[whole], rounds.seconds[own], strict=True)
    return Spread(tuple(more - less for more, less in pairs))


def _finished_project(folder: Path) -> Project:
    """A DVC project with the default's arms on experiments/tiny, all stages done and known to DVC."""
    project = Project(folder, _arms())
    for name in ENGINE_FILES:
        source = ROOT / name
        if name != "params.yaml":
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    started = time.monotonic()
    worker = multiprocessing.get_context("spawn").Process(target=_run_stages, args=(folder,))
    worker.start()
    worker.join()
    if worker.exitcode != 0:
        raise SystemExit(f"the stages of a finished project have ended with {worker.exitcode}")
    command(["dvc", "init", "--quiet", "--no-scm"], folder)
    command(["dvc", "commit", "--force"], folder)
    if "Data and pipelines are up to date" not in (said := command(["dvc", "repro"], folder)):
        raise SystemExit(f"dvc repro has found something to do in a finished project:\n{said[-2000:]}")
    print(f"made a finished project in {time.monotonic() - started:.0f} s", flush=True)
    return project


def _run_stages(folder: Path) -> None:
    """Run every stage of a folder's experiment, in a process of its own: one import of PyTorch serves them all."""
    with contextlib.chdir(folder), (folder / "said.txt").open("w") as said:
        for job in Jobs(load_params()).all():
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main(job.words)
            if code != 0:
                raise SystemExit(f"{job.command} ended with {code}:\n{(folder / 'said.txt').read_text()[-2000:]}")


def _trivial_project(folder: Path) -> Project:
    project = Project(folder, {ARM: _arms()[ARM]})
    (folder / "dvc.yaml").write_text(yaml.safe_dump(TRIVIAL), encoding="utf-8")
    command(["dvc", "init", "--quiet", "--no-scm"], folder)
    command(["dvc", "repro"], folder)
    return project


def _arms() -> dict[str, Any]:
    """The default experiment's arms: they fit experiments/tiny, whose grid is the same."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return dict(content["arms"])
