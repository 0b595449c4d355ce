"""DVC and Snakemake in one workspace: the same stages, the same bytes, no work done twice, whatever happened before.

Letters in brackets name the traps of earlier designs; each was met under a real engine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from maskdm.config.jobs import STAGE_VERSIONS
from maskdm.stages import markers
from tests.conftest import Once

ROOT = Path(__file__).parents[2]
ENGINE_FILES = ("dvc.yaml", "params.yaml", "Snakefile", "workflow", "profiles", ".dvcignore", ".gitignore")
TINY = "experiments/tiny"
REPRO = ("dvc", "repro", f"{TINY}/dvc.yaml")
SNAKEMAKE = ("snakemake", "-d", TINY, "--cores", "2")
ARM, OTHER = "patch-m50", "scratch"


def repro_of(stage: str, arm: str = ARM) -> tuple[str, ...]:
    """DVC up to a stage of an arm."""
    return (*REPRO[:2], f"{TINY}/dvc.yaml:{stage}@{arm}-0")


def snakemake_of(stage: str, arm: str = ARM) -> tuple[str, ...]:
    """Snakemake up to a stage of an arm."""
    return (*SNAKEMAKE, f".work/done/{stage}-{arm}-seed-0")


OF_AN_ARM = ("pretrain", "finetune", "sample", "evaluate")
SHARED = {"prepare", "features", "scale", "choose"}
TWO_TRIALS = {"given": {}, "lr-high": {"pretrain.lr": 8e-3, "finetune.lr": 8e-3}}


class Workspace:
    """A project with the engines' files and a small experiment of two arms, untracked by MLflow.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny = folder, folder / TINY

    @property
    def params(self) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((self.tiny / "params.yaml").read_text(encoding="utf-8"))
        return content

    def change(self, **sections: Any) -> None:
        """Change keys of sections (a dict is merged into its section), or whole values."""
        content = self.params
        for name, value in sections.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        (self.tiny / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def set_rate(self, mask_rate: float) -> None:
        """Change one arm's mask rate."""
        self.change(arms={ARM: {"strategy": "patch", "mask_rate": mask_rate}})

    def run(self, *words: str, fails: bool = False) -> str:
        """Run a command as a user of the environment would; stdout and stderr together, and stages' logs."""
        shutil.rmtree(self.tiny / "logs", ignore_errors=True)
        done = subprocess.run(
            words, cwd=self.folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert (done.returncode != 0) == fails, f"{' '.join(words)}\n{done.stdout}"
        logs = sorted((self.tiny / "logs").glob("*.log")) if words[0] == "snakemake" else []
        return "\n".join([done.stdout, *(log.read_text(encoding="utf-8") for log in logs)])

    def start(self, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, as in a terminal."""
        with (self.folder / "said.txt").open("ab") as said:
            return subprocess.Popen(
                words,
                cwd=self.folder,
                env=environment(),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # tests that were started in the background ignore Ctrl-C, and what they start would, too
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def records(self) -> dict[str, bytes]:
        """What every stage noted of its last work; a stage that worked again has another one."""
        return {file.stem: file.read_bytes() for file in (self.tiny / "results/records").glob("*.json")}

    def record(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.tiny / f"results/records/{name}.json").read_bytes())
        return content

    def digests(self) -> dict[str, bytes]:
        """Every result that must not depend on the engine, by path; records hold times, and the report shows them."""
        results = self.tiny / "results"
        files = (file for file in results.rglob("*") if file.is_file())
        return {
            str(file.relative_to(results)): file.read_bytes()
            for file in files
            if file.relative_to(results).parts[0] not in ("records", "report") and not file.name.startswith(".")
        }

    def copy_to(self, folder: Path) -> Workspace:
        """The same workspace elsewhere."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workspace(folder)


def environment() -> dict[str, str]:
    """Of a user who has activated the environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "PATH": path}


def new_workspace(folder: Path) -> Workspace:
    for name in ENGINE_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    workspace = Workspace(folder)
    workspace.tiny.mkdir(parents=True)
    content = yaml.safe_load((ROOT / TINY / "params.yaml").read_text(encoding="utf-8"))
    content |= {"tracking": {"enabled": False}, "arms": {arm: content["arms"][arm] for arm in (OTHER, ARM)}}
    content["evaluation"]["classifier_epochs"] = 1
    content["tuning"]["trials"] = {}
    (workspace.tiny / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    (workspace.tiny / "dvc.yaml").symlink_to("../../dvc.yaml")
    for words in (("git", "init", "-q"), ("dvc", "init", "-q"), ("dvc", "config", "core.analytics", "false")):
        workspace.run(*words)
    return workspace


def of_arm(arm: str, stages: tuple[str, ...] = OF_AN_ARM) -> set[str]:
    """The records of an arm's stages."""
    return {f"{stage}-{arm}-seed-0" for stage in stages}


def worked(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> set[str]:
    """The stages that have worked in between."""
    return {name for name in after if before.get(name) != after[name]}


@pytest.fixture(scope="module")
def fresh_once(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return new_workspace(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def finished_once(fresh_once: Workspace, once: Once) -> Workspace:
    """Everything was made by Snakemake."""
    return Workspace(
        once("by-snakemake", lambda folder: fresh_once.copy_to(folder / "project").run(*SNAKEMAKE)) / "project"
    )


@pytest.fixture(scope="module")
def both_once(finished_once: Workspace, once: Once) -> Workspace:
    """Everything was made by Snakemake, then DVC was called."""
    return Workspace(once("by-both", lambda folder: finished_once.copy_to(folder / "project").run(*REPRO)) / "project")


@pytest.fixture
def fresh(fresh_once: Workspace, tmp_path: Path) -> Workspace:
    return fresh_once.copy_to(tmp_path / "project")


@pytest.fixture
def finished(finished_once: Workspace, tmp_path: Path) -> Workspace:
    return finished_once.copy_to(tmp_path / "project")


@pytest.fixture
def both(both_once: Workspace, tmp_path: Path) -> Workspace:
    return both_once.copy_to(tmp_path / "project")


# --- the same stages ------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What an engine says of a stage: what it waits for, and what tells that it is done."""

    inputs: frozenset[str]
    outputs: frozenset[str]


def dvc_stages(workspace: Workspace) -> dict[str, Stage]:
    code = (
        "import json; from dvc.repo import Repo; stages = Repo('.').index.stages; print(json.dumps([[s.cmd, "
        "[str(d.def_path) for d in s.deps if 'params' not in type(d).__name__.lower()], "
        "[str(o.def_path) for o in s.outs]] for s in stages if s.path_in_repo.startswith('experiments')]))"
    )
    listed = json.loads(workspace.run(sys.executable, "-c", code).splitlines()[-1])
    return {cmd: Stage(frozenset(inputs), frozenset(outputs)) for cmd, inputs, outputs in listed}


def snakemake_stages(workspace: Workspace) -> dict[str, Stage]:
    listing = workspace.run(*SNAKEMAKE, "--dry-run", "--forceall")
    stages = {}
    for block in re.split(r"\n(?=rule )|\n(?=localrule )", listing):
        if found := re.search(r"Shell command: (maskdm .*?) > logs/", block):
            stages[found[1]] = Stage(_listed(block, "input"), _listed(block, "output"))
    return stages


def _listed(block: str, what: str) -> frozenset[str]:
    found = re.search(rf"^ +{what}: (.*)$", block, re.MULTILINE)
    return frozenset(found[1].split(", ")) if found else frozenset()


def makes(stage: Stage, name: str) -> bool:
    """Whether a path is an output of the stage, lies in one, or holds one."""
    return any(name == o or name.startswith(f"{o}/") or o.startswith(f"{name}/") for o in stage.outputs)


def earlier_stages(stages: dict[str, Stage]) -> dict[str, set[str]]:
    """For every stage all those that are done before it starts."""
    needed = {
        cmd: {other for other, made in stages.items() if other != cmd and any(makes(made, n) for n in stage.inputs)}
        for cmd, stage in stages.items()
    }
    for _ in stages:
        needed = {cmd: own | {far for near in own for far in needed[near]} for cmd, own in needed.items()}
    return needed


@pytest.mark.workflow
@pytest.mark.parametrize("trials", [{}, TWO_TRIALS], ids=["untuned", "tuned"])
def test_both_engines_run_the_same_commands_in_the_same_order(fresh: Workspace, trials: dict[str, Any]) -> None:
    fresh.change(tuning={"trials": trials})
    dvc, snakemake = dvc_stages(fresh), snakemake_stages(fresh)
    assert len(dvc) == 5 + 2 * len(trials) + 2 * 4
    assert any(" tune " in cmd for cmd in dvc) == bool(trials)
    assert earlier_stages(dvc) == earlier_stages(snakemake)
    for stage in dvc.values():
        assert all(any(makes(other, name) for other in dvc.values()) for name in stage.inputs), "made by some stage"
    carried = dict(re.fullmatch(r"maskdm (\w+).* --stage-version (\d+)", cmd).groups() for cmd in dvc)  # type: ignore[union-attr]
    assert {stage: int(version) for stage, version in carried.items()} == {
        stage: version for stage, version in STAGE_VERSIONS.items() if trials or stage != "tune"
    }


def test_dvc_keeps_every_output_and_watches_no_value_that_changes_rounding_alone() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name, stage in stages.items():
        for out in (*stage["outs"], *stage.get("metrics", [])):
            ((_, options),) = out.items()
            assert options["persist"], name
        assert not {param for param in stage["params"] if param.startswith("compute")} - {
            "compute.device",
            "compute.precision",
        }


@pytest.mark.workflow
def test_invalid_params_stop_snakemake_before_any_work(fresh: Workspace) -> None:
    fresh.change(model={"depht": 3})
    output = fresh.run(*SNAKEMAKE, fails=True)
    assert "model.depht: unknown key; did you mean 'depth'?" in output
    assert not (fresh.tiny / "results").exists()
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("device", "num_gpus", "expected"),
    [("cpu", 1, False), ("auto", 0, False), ("auto", 1, True), ("cuda", 0, True)],
)
def test_stages_reserve_a_gpu_where_they_will_use_one(
    device: str, num_gpus: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(num_gpus):
        (tmp_path / f"0000:{number:02}:00.0").mkdir()
    monkeypatch.setattr(markers, "NVIDIA_GPUS", tmp_path)
    assert markers.stages_use_a_gpu(device) == expected


# --- the same bytes, and no work twice ------------------------------------------------------------------------------


@pytest.mark.workflow
def test_both_engines_make_the_same_bytes(fresh: Workspace, finished_once: Workspace) -> None:
    """(I) With no trials only `prepare` makes results/tuning, on which `choose` depends in DVC."""
    assert "up to date" not in fresh.run(*repro_of("evaluate"))
    digests, of_snakemake = fresh.digests(), finished_once.digests()
    assert digests.items() <= of_snakemake.items()
    assert all(OTHER in path for path in of_snakemake.keys() - digests.keys()), "not asked for"
    records = fresh.records()
    fresh.run(*snakemake_of("evaluate"))
    assert fresh.records() == records, "Snakemake after DVC does no work"


@pytest.mark.workflow
def test_neither_engine_works_after_the_other(both: Workspace, finished_once: Workspace) -> None:
    assert both.records() == finished_once.records(), "DVC after Snakemake does no work"
    assert both.digests() == finished_once.digests()
    assert "Data and pipelines are up to date" in both.run(*REPRO)
    assert "Nothing to be done" in both.run(*SNAKEMAKE)
    said = both.run(*snakemake_of("evaluate"), "--forceall")
    assert said.count(": up to date\n") >= len(OF_AN_ARM), "every stage is started, and has no work"
    assert both.records() == finished_once.records()


@pytest.mark.workflow
def test_values_that_change_rounding_alone_rerun_nothing(both: Workspace) -> None:
    before = both.records()
    both.change(compute={"threads": 2, "attention": "fused", "activation_checkpointing": True})
    assert "Nothing to be done" in both.run(*SNAKEMAKE)
    assert "Data and pipelines are up to date" in both.run(*REPRO)
    shutil.rmtree(both.tiny / "results/samples" / ARM)
    both.run(*snakemake_of("evaluate"))
    assert of_arm(ARM, ("sample",)) <= worked(before, both.records()) <= of_arm(ARM, ("sample", "evaluate"))
    assert both.record(f"sample-{ARM}-seed-0")["threads"] == 2


@pytest.mark.workflow
@pytest.mark.parametrize("engine", [snakemake_of("evaluate"), repro_of("evaluate")], ids=["snakemake", "dvc"])
def test_a_deleted_output_is_made_again_alone(both: Workspace, engine: tuple[str, ...]) -> None:
    """(F) And later stages see the same content: they do not work."""
    before, digests = both.records(), both.digests()
    shutil.rmtree(both.tiny / f"results/pretrain/{ARM}")
    both.run(*engine)
    assert worked(before, both.records()) == {f"pretrain-{ARM}-seed-0"}
    assert both.digests() == digests


@pytest.mark.workflow
def test_values_there_and_back_cost_no_training(both: Workspace) -> None:
    """(C), (H) Snakemake with A, DVC with B, Snakemake with A; then DVC with B and A again."""
    a, bytes_of_a = both.records(), both.digests()
    both.set_rate(0.25)
    both.run(*REPRO)
    b = both.records()
    assert worked(a, b) == of_arm(ARM), "a changed arm reruns that arm alone"
    both.set_rate(0.5)
    both.run(*snakemake_of("evaluate"))
    assert both.records() == a
    assert both.digests() == bytes_of_a
    both.set_rate(0.25)
    both.run(*repro_of("finetune"))
    assert worked(a, both.records()) == of_arm(ARM, ("pretrain", "finetune"))
    assert not worked(b, both.records()) & of_arm(ARM, ("pretrain", "finetune")), "taken from the work folder"
    both.set_rate(0.5)
    said = both.run(*repro_of("finetune"))
    assert "made before with the same values and inputs" in said
    assert both.digests() == bytes_of_a


@pytest.mark.workflow
def test_snakemakes_metadata_do_not_decide_what_is_done(finished: Workspace) -> None:
    """(D) `.snakemake` is deleted and a value changed; (E) a value changed, then `snakemake --touch`."""
    before, words = finished.records(), snakemake_of("pretrain")
    shutil.rmtree(finished.tiny / ".snakemake")
    finished.set_rate(0.25)
    finished.run(*SNAKEMAKE, "--touch")
    finished.run(*words)
    between = finished.records()
    assert worked(before, between) == of_arm(ARM, ("pretrain",))
    shutil.rmtree(finished.tiny / ".snakemake")
    assert "Nothing to be done" in finished.run(*words)
    finished.set_rate(0.75)
    finished.run(*SNAKEMAKE, "--touch", "--forceall")
    finished.run(*words)
    assert worked(between, finished.records()) == of_arm(ARM, ("pretrain",))


@pytest.mark.workflow
def test_an_arm_that_is_removed_and_added_again_is_there(both: Workspace) -> None:
    """(J) Its results were there all the time, and neither engine makes them again."""
    a, arms = both.records(), both.params["arms"]
    both.change(arms=arms)
    content = both.params
    content["arms"] = {OTHER: arms[OTHER]}
    (both.tiny / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    both.run(*snakemake_of("evaluate", OTHER))
    both.run(*repro_of("evaluate", OTHER))
    both.change(arms=arms)
    both.run(*repro_of("evaluate"))
    assert worked(a, both.records()) <= {"choose"}
    assert "Nothing to be done" in both.run(*snakemake_of("evaluate"))


@pytest.mark.workflow
def test_a_clone_with_pulled_results_has_nothing_to_do(both: Workspace, tmp_path: Path) -> None:
    """(G) `dvc push`, `git clone`, `dvc pull`, then either engine."""
    remote, before = tmp_path / "remote", both.records()
    both.run("dvc", "remote", "add", "-q", "-d", "storage", str(remote))
    both.run("dvc", "push", "-q", "--recursive", TINY)
    both.run("git", "add", "--all")
    both.run("git", "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "results")
    both.run("git", "clone", "-q", ".", str(tmp_path / "clone"))
    clone = Workspace(tmp_path / "clone")
    clone.run("dvc", "pull", "-q", "--recursive", TINY)
    assert clone.digests() == both.digests()
    assert "Nothing to be done" in clone.run(*SNAKEMAKE)
    assert "Data and pipelines are up to date" in clone.run(*REPRO)
    assert clone.records() == before


@pytest.mark.workflow
def test_another_trial_runs_alone_and_is_chosen_from(fresh: Workspace) -> None:
    """What a choice means for the arm is tested in test_tuning."""
    content = fresh.params
    content |= {"arms": {ARM: content["arms"][ARM]}, "tuning": {**content["tuning"], "trials": TWO_TRIALS}}
    (fresh.tiny / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    fresh.run(*SNAKEMAKE, ".work/done/choose")
    before = fresh.records()
    slow = {"pretrain.lr": 1e-9, "finetune.lr": 1e-9}
    fresh.change(tuning={"trials": {**TWO_TRIALS, "slow": slow}})
    fresh.run(*SNAKEMAKE, ".work/done/choose")
    assert worked(before, fresh.records()) == {f"tune-{ARM}-trial-slow", "choose"}
    chosen = json.loads((fresh.tiny / f"results/chosen/{ARM}.json").read_bytes())
    assert chosen["trial"] in TWO_TRIALS


# --- failures and kills ---------------------------------------------------------------------------------------------


@pytest.mark.workflow
@pytest.mark.parametrize("engine", [snakemake_of("evaluate"), repro_of("evaluate")], ids=["snakemake", "dvc"])
def test_a_failed_job_does_not_leave_an_older_output_as_done(both: Workspace, engine: tuple[str, ...]) -> None:
    """(A), (K) The values are new and the stage fails: what was there before is kept, and is not taken for done."""
    before, digests = both.records(), both.digests()
    broken = {"strategy": "patch", "mask_rate": 0.5, "pretrain": {"lr": 1e30}}
    both.change(arms={ARM: broken})
    said = both.run(*engine, fails=True)
    assert "not finite" in said
    assert both.digests() == digests, "the old output is there until there is a new one"
    assert "not finite" in both.run(*engine, fails=True), "and not taken for the new one"
    (failure,) = (both.tiny / f".work/results/pretrain/{ARM}/seed-0").glob("*/failed.json")
    assert "not finite" in json.loads(failure.read_bytes())["reason"]
    both.set_rate(0.5)
    both.run(*engine)
    assert both.records() == before


class Training(NamedTuple):
    """A workspace whose next stage takes some seconds, and saves its state all the time."""

    workspace: Workspace
    target: str
    work: Path

    def at_work(self, engine: subprocess.Popen[bytes]) -> psutil.Process:
        """The process of the stage, once it has saved a state."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert engine.poll() is None, self.said()
            if list(self.work.glob("*/state-*.safetensors")):
                children = psutil.Process(engine.pid).children(recursive=True)
                return next(child for child in reversed(children) if "pretrain" in child.cmdline())
            time.sleep(0.02)
        raise AssertionError(f"no state in {self.work}:\n{self.said()}")

    def said(self) -> str:
        log = self.workspace.tiny / f"logs/pretrain-{ARM}-seed-0.log"
        return (self.workspace.folder / "said.txt").read_text() + (log.read_text() if log.is_file() else "")


@pytest.fixture
def training(both: Workspace) -> Iterator[Training]:
    """The pretraining of one arm has new values; it is (B) a rerun, with an older output in its place."""
    both.change(saving={"every_seconds": 0.1}, budget={"unmasked_steps": 300, "milestones": [1.0]})
    both.change(pretrain={"share": 0.9})
    yield Training(both, f"results/pretrain/{ARM}/seed-0", both.tiny / f".work/results/pretrain/{ARM}/seed-0")


KILLS: dict[str, Callable[[subprocess.Popen[bytes], psutil.Process], Any]] = {
    "the engine": lambda engine, stage: engine.kill(),
    "both": lambda engine, stage: (engine.kill(), stage.kill()),
    "Ctrl-C": lambda engine, stage: os.killpg(engine.pid, signal.SIGINT),
}


@pytest.mark.workflow
@pytest.mark.parametrize(("engine", "what"), [("dvc", "the engine"), ("dvc", "Ctrl-C"), ("snakemake", "both")])
def test_after_a_kill_the_same_command_resumes(training: Training, engine: str, what: str) -> None:
    """(B), (K)"""
    words = repro_of("pretrain") if engine == "dvc" else snakemake_of("pretrain")
    first = training.workspace.start(words)
    KILLS[what](first, training.at_work(first))
    assert first.wait(timeout=60) != 0

    again = training.workspace.start(words)
    assert again.wait(timeout=120) == 0, training.said()
    record = training.workspace.record(f"pretrain-{ARM}-seed-0")
    assert record["steps"] == record["timings"][-1]["step"]
    if what == "the engine":  # its stage worked on; the second one waited, and found the work done
        assert record["starts"] == 1
        assert f"pretrain {ARM} seed 0: up to date" in training.said()
    else:
        assert record["starts"] == 2
        assert f"pretrain {ARM} seed 0: resuming from step" in training.said()
    if what == "Ctrl-C":
        assert "stopped by SIGINT: saved pretrain" in training.said()
