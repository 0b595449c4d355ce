"""`workflow-default`: the default experiment through both engines, from nothing to the report.

The engines change who goes first every round: two rounds or more are fair to both.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import ROOT
from benchmarks.timing import Task, interleave
from benchmarks.workflow import ENGINE_FILES, TINY, command

TARGETS = {
    "seconds": Target("default: seconds of dvc repro", None, 300.0),
    "speedup": Target("default: dvc repro over snakemake --cores 2", None, 1.5, "at least"),
}
ENGINES = {"dvc repro": ["dvc", "repro"], "snakemake --cores 2": ["snakemake", "--cores", "2"]}


class _Run:
    """Runs an engine in a fresh copy of the project."""

    def __init__(self, settings: Settings, engine: str) -> None:
        self._settings, self._engine, self._count = settings, engine, 0

    def once(self, _: int) -> float:
        """From nothing to the report; seconds of the engine alone. The first time, warming up, on experiments/tiny."""
        self._count += 1
        is_tiny = self._count == 1 or self._settings.is_quick
        folder = make_project(self._settings.folder / f"{self._engine.split()[0]}-{self._count}", is_tiny)
        started = time.perf_counter()
        command(ENGINES[self._engine], folder)
        seconds = time.perf_counter() - started
        shutil.rmtree(folder)
        return seconds


def run(settings: Settings) -> Outcome:
    """As many rounds of both as `--rounds` says, 10 minutes each; `--quick` takes experiments/tiny's params."""
    tasks = {engine: Task(_Run(settings, engine).once) for engine in ENGINES}
    rounds = interleave(tasks, settings.rounds, "workflow-default")
    rows: list[dict[str, Cell]] = [{"engine": engine, "s": rounds.of(engine)} for engine in ENGINES]
    speedup = rounds.ratio("dvc repro", "snakemake --cores 2")
    rows.append({"engine": "dvc repro over snakemake --cores 2", "s": speedup})
    targets = [
        TARGETS["seconds"].measured(rounds.of("dvc repro").median),
        TARGETS["speedup"].measured(speedup.median),
    ]
    return Outcome([Table("the default experiment, one thread per stage, tracking on", rows)], targets)


def make_project(folder: Path, tiny: bool) -> Path:
    """A project as a checkout has it, without git.

    Args:
        folder: made.
        tiny: whether its experiment is experiments/tiny's.
    """
    folder.mkdir(parents=True)
    for name in ENGINE_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if tiny:
        shutil.copy(TINY, folder / "params.yaml")
    command(["dvc", "init", "--quiet", "--no-scm"], folder)
    return folder
