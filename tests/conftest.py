"""Experiments in folders of their own, run as far as a test needs them, and the order of the tests."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from maskdm.cli import main
from maskdm.config import load_params
from maskdm.config.jobs import Job, Jobs

ROOT = Path(__file__).parents[1]
TINY = ROOT / "experiments" / "tiny" / "params.yaml"
ARM = "patch-m50"
# Ours by name: folders that a user has added beside them must not break the tests.
EXPERIMENTS = (
    "celeba64",
    "celebahq256",
    "church256",
    "cifar10",
    "digits",
    "digits-seeds",
    "fashion-mnist",
    "swissroll",
    "tiny",
    "transfer-digits",
    "transfer-digits-1",
    "vggface2-celebahq",
)

# Fixtures that train or copy experiments for seconds, and tests that draw figures, start ranks or open MLflow.
PIPELINES = {"shared_once", "one_arm_once", "whole_once", "tuned_once", "scored_once", "finished_once"}
PIPELINES |= {"uninterrupted", "stopped"}
SLOW_PLACES = (
    "tests/data/test_hostile_images.py",
    "tests/data/test_swissroll.py",
    "tests/method/test_sampling.py::test_a_networks_pixels",
    "tests/scoring/test_scores.py::test_scores_are_those_of",
    "tests/scoring/test_scores.py::test_inception",
    "tests/models/test_models.py",
    "tests/test_untrusted.py",
    "tests/report/test_figures.py",
    "tests/report/test_report.py",
    "tests/test_benchmarks.py::test_every_benchmark",
    "tests/tracking/",
    "tests/training/test_devices.py::test_stages_at_work",
    "tests/training/test_ranks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that are slow by fixture or place, and start the marked ones first: short ones fill the gaps."""
    for item in items:
        if item.nodeid.startswith(SLOW_PLACES) or PIPELINES & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.workflow)
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Experiment:
    """A folder with a params.yaml, tracking off, and the commands run in it.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "params.yaml"

    @property
    def content(self) -> dict[str, Any]:
        """What its params.yaml says."""
        content: dict[str, Any] = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        return content

    def change(self, **sections: Any) -> Experiment:
        """Change keys of sections (a dict is merged into its section), or whole values."""
        content = self.content
        for name, value in sections.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        return self.rewrite(content)

    def rewrite(self, content: dict[str, Any]) -> Experiment:
        """Write a whole params.yaml."""
        self.file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return self

    def keep_arm(self, arm: str) -> Experiment:
        """Take all other arms out."""
        content = self.content
        return self.rewrite({**content, "arms": {arm: content["arms"][arm]}})

    def run(self, *words: str) -> Outcome:
        """Run a command in this process."""
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _signals_restored(),
        ):
            try:
                code = main(words)
            except SystemExit as leaving:
                code = int(leaving.code or 0)
        return Outcome(code, out.getvalue(), err.getvalue())

    def stage(self, name: str, arm: str = ARM, seed: int = 0) -> Outcome:
        """Run a stage of an arm in this process."""
        return self.run(name, "--arm", arm, "--seed", str(seed))

    def try_values(self, trial: str, arm: str = ARM) -> Outcome:
        """Run a trial of an arm's tuning; it must succeed."""
        return self.succeed("tune", "--arm", arm, "--trial", trial)

    def succeed(self, *words: str) -> Outcome:
        """Run a command; it must succeed."""
        outcome = self.run(*words)
        assert outcome.code == 0, outcome.err
        return outcome

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "maskdm", *words],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # tests that were started in the background ignore Ctrl-C, and what they start would, too
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def job(self, stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None) -> Job:
        """The job of a stage that params.yaml asks for; its paths are relative to the folder."""
        return Jobs(load_params(self.file)).find(stage, arm, seed, trial)

    def path(self, *parts: str) -> Path:
        """A path in the folder."""
        return self.folder.joinpath(*parts)

    def hashes(self, place: str) -> dict[str, str]:
        """The sha256 of every file at or below a path."""
        top = self.path(place)
        files = [top] if top.is_file() else sorted(f for f in top.rglob("*") if f.is_file())
        assert files, f"nothing in {top}"
        return {str(f.relative_to(self.folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    def copy_to(self, folder: Path) -> Experiment:
        """Copy the experiment with its results."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Experiment(folder)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tiny_in(folder: Path) -> Experiment:
    shutil.copyfile(TINY, folder / "params.yaml")
    return Experiment(folder).change(tracking={"enabled": False}, compute={"device": "cpu"})


@pytest.fixture
def tiny(tmp_path: Path) -> Experiment:
    """The tiny experiment, nothing run yet."""
    return _tiny_in(tmp_path)


Once = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """(name, make) → a folder that `make` fills once for all processes of `pytest -n`."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def get(name: str, make: Callable[[Path], Any]) -> Path:
        folder, done = shared / f"{name}-once", shared / f"{name}-once.done"
        with FileLock(shared / f"{name}-once.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # another process has failed in it
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def prepared_once(once: Once) -> Experiment:
    """The tiny experiment with its data, nothing tuned; not to be changed."""

    def make(folder: Path) -> None:
        experiment = _tiny_in(folder).change(tuning={"trials": {}})
        experiment.succeed("prepare")
        experiment.succeed("choose")

    return Experiment(once("prepared", make))


@pytest.fixture
def prepared(prepared_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the tiny experiment with its data, nothing tuned."""
    return prepared_once.copy_to(tmp_path)


@pytest.fixture(scope="session")
def shared_once(prepared_once: Experiment, once: Once) -> Experiment:
    """One arm, nothing tuned; the stages that all arms share have run, but for the report; not to be changed."""

    def make(folder: Path) -> None:
        experiment = prepared_once.copy_to(folder).keep_arm(ARM)
        for stage in ("features", "scale", "choose"):
            experiment.succeed(stage)

    return Experiment(once("shared", make))


@pytest.fixture
def shared(shared_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of one arm, nothing tuned; the stages that all arms share have run, but for the report."""
    return shared_once.copy_to(tmp_path)


@pytest.fixture(scope="session")
def one_arm_once(shared_once: Experiment, once: Once) -> Experiment:
    """One arm, nothing tuned, every stage run but for the report; not to be changed."""

    def make(folder: Path) -> None:
        experiment = shared_once.copy_to(folder)
        for stage in ("pretrain", "finetune", "sample", "evaluate"):
            experiment.succeed(stage, "--arm", ARM, "--seed", "0")

    return Experiment(once("one-arm", make))


@pytest.fixture
def one_arm(one_arm_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of one arm, nothing tuned, every stage run but for the report."""
    return one_arm_once.copy_to(tmp_path)


@pytest.fixture(scope="session")
def whole_once(one_arm_once: Experiment, once: Once) -> Experiment:
    """One arm, nothing tuned, every stage run; not to be changed."""
    return Experiment(once("whole", lambda folder: one_arm_once.copy_to(folder).succeed("report")))


@pytest.fixture
def whole(whole_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of one arm, nothing tuned, every stage run."""
    return whole_once.copy_to(tmp_path)


@pytest.fixture(scope="session")
def tuned_once(prepared_once: Experiment, once: Once) -> Experiment:
    """The tiny experiment with the scale, every trial of every arm and the choice; not to be changed."""
    trials = yaml.safe_load(TINY.read_text(encoding="utf-8"))["tuning"]["trials"]

    def make(folder: Path) -> None:
        experiment = prepared_once.copy_to(folder).change(tuning={"trials": trials})
        for stage in ("features", "scale"):
            experiment.succeed(stage)
        for arm, trial in itertools.product(experiment.content["arms"], trials):
            experiment.try_values(trial, arm)
        experiment.succeed("choose")

    return Experiment(once("tuned", make))


@pytest.fixture
def tuned(tuned_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the tuned tiny experiment."""
    return tuned_once.copy_to(tmp_path)


@pytest.fixture(scope="session")
def scored_once(tuned_once: Experiment, once: Once) -> Experiment:
    """The tiny experiment with every stage of every arm run, but for the report; not to be changed."""

    def make(folder: Path) -> None:
        experiment = tuned_once.copy_to(folder)
        for arm in experiment.content["arms"]:
            for stage in ("pretrain", "finetune", "sample", "evaluate"):
                experiment.succeed(stage, "--arm", arm, "--seed", "0")

    return Experiment(once("scored", make))


@pytest.fixture
def scored(scored_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the tiny experiment with every stage run, but for the report."""
    return scored_once.copy_to(tmp_path)


@pytest.fixture(scope="session")
def finished_once(scored_once: Experiment, once: Once) -> Experiment:
    """The tiny experiment with every stage run; not to be changed."""
    return Experiment(once("finished", lambda folder: scored_once.copy_to(folder).succeed("report")))


@pytest.fixture
def finished(finished_once: Experiment, tmp_path: Path) -> Experiment:
    """A copy of the finished tiny experiment."""
    return finished_once.copy_to(tmp_path)


@pytest.fixture
def stop_when() -> Callable[[subprocess.Popen[str], Callable[[], bool], signal.Signals], Outcome]:
    """Send a signal to a process as soon as a condition holds, and wait for its end."""

    def stop(process: subprocess.Popen[str], is_so: Callable[[], bool], number: signal.Signals) -> Outcome:
        deadline = time.monotonic() + 60
        while not is_so() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return Outcome(process.returncode, out, err)

    return stop
