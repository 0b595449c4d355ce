"""`workflow`: start-up of commands, idle DVC; `workflow-default`: the default experiment through both engines."""

from __future__ import annotations

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
from benchmarks.shapes import ROOT, Settings, default_params
from benchmarks.timing import Task, interleave

ENGINE_FILES = ("dvc.yaml", "Snakefile", "workflow", "profiles", ".dvcignore")
ARM = "patch-m50"
STARTS = ("maskdm --help", "maskdm validate")
ENGINES = {"dvc repro": ["dvc", "repro"], "snakemake --cores 2": ["snakemake", "--cores", "2"]}
TARGETS = {
    **{typed: Target(f"{typed}: seconds", 0.4) for typed in STARTS},
    "one": Target("dvc repro with nothing to do: seconds more than with one stage (strict)", 1.0),
    "list": Target("dvc repro with nothing to do: seconds more than `dvc stage list` there", 1.0),
    "seconds": Target("default: seconds of dvc repro", 300.0),
    "speedup": Target("default: dvc repro over snakemake --cores 2", 1.5, "at least"),
}
TRIVIAL = {"stages": {"one": {"cmd": "echo 1 > one", "outs": ["one"]}}}


def run(settings: Settings) -> Outcome:
    """Measure the start of commands, and DVC with nothing to do."""
    project = _make_project(settings.folder / "starts", default_params()["arms"])
    commands = ("python -c pass", *STARTS, "maskdm plan --help")
    tasks = {typed: _command_task(typed.split(), project) for typed in commands}
    rounds = interleave(tasks, settings.rounds, "workflow: start")
    starts = Table("start-up", [{"command": typed, "s": rounds.of(typed)} for typed in commands])
    targets = [TARGETS[typed].measured(rounds.of(typed).median) for typed in STARTS]
    if settings.is_quick:
        return Outcome([starts], targets, ["DVC: left out by --quick"])
    table, dvc_targets = _dvc(settings)
    return Outcome([starts, table], targets + dvc_targets)


def run_default(settings: Settings) -> Outcome:
    """Measure the default experiment in both engines from nothing to the report; `--quick` takes experiments/tiny.

    The engines alternate in going first: two rounds or more are fair to both.
    """
    tasks = {engine: Task(_EngineRun(settings, engine)) for engine in ENGINES}
    rounds = interleave(tasks, settings.rounds, "workflow-default")
    rows: list[dict[str, Cell]] = [{"engine": engine, "s": rounds.of(engine)} for engine in ENGINES]
    speedup = rounds.ratio("dvc repro", "snakemake --cores 2")
    rows.append({"engine": "dvc repro over snakemake --cores 2", "s": speedup})
    seconds = TARGETS["seconds"].measured(rounds.of("dvc repro").median)
    targets = [seconds, TARGETS["speedup"].measured(speedup.median)]
    return Outcome([Table("the default experiment, one thread per stage, tracking on", rows)], targets)


def command(words: Sequence[str], folder: Path) -> str:
    """Run a command that must succeed; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # engines start `maskdm`
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


class _EngineRun:
    """Runs an engine once in a fresh copy of the project; the first run, warming up, is of experiments/tiny."""

    def __init__(self, settings: Settings, engine: str) -> None:
        self._settings, self._engine, self._count = settings, engine, 0

    def __call__(self, _: int) -> float:
        self._count += 1
        is_tiny = self._count == 1 or self._settings.is_quick
        folder = self._settings.folder / f"{self._engine.split()[0]}-{self._count}"
        folder.mkdir(parents=True)
        shutil.copy(ROOT / ("experiments/tiny" if is_tiny else "") / "params.yaml", folder)
        _add_engines(folder)
        seconds = _seconds(ENGINES[self._engine], folder)
        shutil.rmtree(folder)
        return seconds


def _make_project(folder: Path, arms: dict[str, Any]) -> Path:
    """A folder with experiments/tiny's params.yaml, with these arms, without tracking and tuning."""
    folder.mkdir(parents=True)
    content = yaml.safe_load((ROOT / "experiments/tiny/params.yaml").read_text(encoding="utf-8"))
    content |= {"arms": arms, "tracking": {"enabled": False}}
    content["tuning"]["trials"] = {}
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder


def _add_engines(folder: Path) -> None:
    """Copy the engines' files into a folder, and make it a DVC project without git."""
    for name in ENGINE_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    command(["dvc", "init", "--quiet", "--no-scm"], folder)


def _seconds(words: Sequence[str], folder: Path) -> float:
    started = time.perf_counter()
    command(words, folder)
    return time.perf_counter() - started


def _command_task(words: Sequence[str], folder: Path) -> Task:
    return Task(lambda _: _seconds(words, folder))


def _dvc(settings: Settings) -> tuple[Table, list[Target]]:
    """`dvc repro` with nothing to do, with the default's arms, against DVC's own start.

    Two baselines: `dvc repro` of one `echo` (the strict one), and `dvc stage list` in the same folder, which loads
    every dvc.yaml as `dvc repro` does, but checks no file.
    """
    arms = default_params()["arms"]
    ours = _make_project(settings.folder / "ours", arms)
    trivial = _make_project(settings.folder / "trivial", {ARM: arms[ARM]})
    _add_engines(ours)
    print("running every stage once …", flush=True)
    command(["dvc", "repro"], ours)
    if "Data and pipelines are up to date" not in (said := command(["dvc", "repro"], ours)):
        raise SystemExit(f"dvc repro found something to do in a finished project:\n{said[-2000:]}")
    (trivial / "dvc.yaml").write_text(yaml.safe_dump(TRIVIAL), encoding="utf-8")
    command(["dvc", "init", "--quiet", "--no-scm"], trivial)
    command(["dvc", "repro"], trivial)
    tasks = {
        "dvc --version": _command_task(["dvc", "--version"], ours),
        "one": _command_task(["dvc", "repro"], trivial),
        "list": _command_task(["dvc", "stage", "list"], ours),
        "ours": _command_task(["dvc", "repro"], ours),
    }
    rounds = interleave(tasks, settings.rounds, "workflow: dvc")
    names = {
        "dvc --version": "dvc --version",
        "one": "dvc repro, one stage, nothing to do",
        "list": f"dvc stage list, the default's {len(arms)} arms",
        "ours": f"dvc repro, the default's {len(arms)} arms, nothing to do",
    }
    rows: list[dict[str, Cell]] = [{"command": typed, "s": rounds.of(name)} for name, typed in names.items()]
    more = {base: rounds.difference("ours", base) for base in ("one", "list")}
    rows += [{"command": f"the last less: {names[base]}", "s": seconds} for base, seconds in more.items()]
    return Table("DVC", rows), [TARGETS[base].measured(seconds.median) for base, seconds in more.items()]
