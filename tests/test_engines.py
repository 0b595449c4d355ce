"""DVC and Snakemake: the same stages from the same params.yaml, and the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml

from maskdm import engines
from maskdm.stages.versions import STAGE_VERSIONS

ROOT = Path(__file__).parents[1]
ENGINE_FILES = ("dvc.yaml", "params.yaml", "Snakefile", "workflow", "profiles", ".dvcignore")
TINY = "experiments/tiny"
REPRO = ("dvc", "repro", f"{TINY}/dvc.yaml")
SNAKEMAKE = ("snakemake", "-d", TINY, "--cores", "2")


class Stage(NamedTuple):
    """What an engine says of a stage."""

    command: str
    inputs: frozenset[str]
    outputs: frozenset[str]


def command(workspace: Path, *arguments: str, check: bool = True) -> str:
    """Run a command as a user of the environment would; stdout and stderr together."""
    done = subprocess.run(
        arguments, cwd=workspace, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not check or done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}"
    return done.stdout


def environment() -> dict[str, str]:
    """Of a user who has activated the environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "PATH": path}


def make_workspace(folder: Path) -> Path:
    """A project without git, with the engines' files and the tiny experiment of two arms, untracked by MLflow."""
    for name in ENGINE_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / TINY).mkdir(parents=True)
    (folder / TINY / "dvc.yaml").symlink_to("../../dvc.yaml")
    start_params(folder)
    command(folder, "dvc", "init", "--quiet", "--no-scm")
    return folder


def start_params(workspace: Path) -> None:
    """The tiny experiment with two of its arms: every stage is a process that takes seconds."""
    content = yaml.safe_load((ROOT / TINY / "params.yaml").read_text(encoding="utf-8"))
    arms = {arm: content["arms"][arm] for arm in ("scratch", "patch-m50")}
    text = yaml.safe_dump({**content, "arms": arms, "tracking": {"enabled": False}}, sort_keys=False)
    (workspace / TINY / "params.yaml").write_text(text, encoding="utf-8")


def change_params(workspace: Path, **sections: dict[str, object]) -> None:
    """Add to sections of params.yaml, or change their values."""
    file = workspace / TINY / "params.yaml"
    params = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name, content in sections.items():
        params[name] = {**params.get(name, {}), **content}
    file.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def dvc_stages(workspace: Path) -> dict[str, Stage]:
    """DVC's own listing of the tiny experiment, by the stage's command."""
    script = (
        "import json; from dvc.repo import Repo; "
        "print(json.dumps([[s.cmd, [d.def_path for d in s.deps if 'params.yaml' not in str(d)], "
        "[o.def_path for o in s.outs]] for s in Repo().index.stages if s.path_in_repo.startswith('experiments')]))"
    )
    listed = json.loads(command(workspace / TINY, sys.executable, "-c", script).splitlines()[-1])
    return {cmd: Stage(cmd, frozenset(deps), frozenset(outs)) for cmd, deps, outs in listed}


def snakemake_stages(workspace: Path) -> dict[str, Stage]:
    """Snakemake's own listing of the tiny experiment, by the stage's command."""
    listing = command(workspace, "snakemake", "-d", TINY, "--cores", "1", "--dry-run", "--forceall")
    stages = {}
    for block in re.split(r"\n(?=rule )|\nlocalrule ", listing):
        found = re.search(r"Shell command: (maskdm .*?) > logs/", block)
        if found:
            stages[found[1]] = Stage(found[1], _listed(block, "input"), _listed(block, "output"))
    return stages


def _listed(block: str, what: str) -> frozenset[str]:
    found = re.search(rf"^ +{what}: (.*)$", block, re.MULTILINE)
    return frozenset(found[1].split(", ")) if found else frozenset()


def executed(output: str) -> set[str]:
    """The stages that an engine ran or would run, e.g. "pretrain --arm scratch --seed 0"."""
    return {stage.strip() for stage in re.findall(r"(?:^> |Shell command: )maskdm (.*?) --stage-version", output, re.M)}


def digests(workspace: Path) -> dict[str, bytes]:
    """Every result that must not depend on the engine, by path; records hold times, the report shows them."""
    results = workspace / TINY / "results"
    files = (
        f
        for kind in ("data", "features", "tuning", "chosen", "pretrain", "finetune", "samples", "metrics")
        for f in (results / kind).rglob("*")
    )
    return {
        str(file.relative_to(results)): file.read_bytes()
        for file in files
        if file.is_file() and file.name not in (".gitignore", ".snakemake_timestamp")
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield make_workspace(tmp_path_factory.mktemp("workspace"))


def test_both_engines_list_the_same_stages(workspace: Path) -> None:
    dvc, snakemake = dvc_stages(workspace), snakemake_stages(workspace)
    arms, trials, of_arm = 2, 2, 4
    assert len(dvc) == 5 + arms * trials + arms * of_arm
    assert set(dvc) == set(snakemake)


def covers(folders: frozenset[str], files: frozenset[str]) -> bool:
    """Whether every file is, or lies in, exactly one of the folders, and every folder holds one of the files."""
    covering = [[f for f in folders if file == f or file.startswith(f"{f}/")] for file in files]
    return all(len(found) == 1 for found in covering) and {found[0] for found in covering} == folders


def test_stages_have_the_same_inputs_and_outputs_in_both_engines(workspace: Path) -> None:
    """DVC names the folder where Snakemake names the files of all arms and trials in it."""
    dvc, snakemake = dvc_stages(workspace), snakemake_stages(workspace)
    for cmd, stage in dvc.items():
        if cmd.startswith(("maskdm choose", "maskdm report")):
            assert covers(stage.inputs, snakemake[cmd].inputs), cmd
            assert covers(stage.outputs, snakemake[cmd].outputs), cmd
        else:
            assert stage.inputs == snakemake[cmd].inputs, cmd
            assert stage.outputs == snakemake[cmd].outputs, cmd


def test_every_input_is_the_output_of_a_stage(workspace: Path) -> None:
    """Also of a part of it: an arm's choice in the folder of all choices."""
    stages = dvc_stages(workspace).values()
    outputs = {output for stage in stages for output in stage.outputs}
    for stage in stages:
        for name in stage.inputs:
            made = any(name == o or name.startswith(f"{o}/") or o.startswith(f"{name}/") for o in outputs)
            assert made, f"{stage.command}: nothing makes {name}"


def test_an_arm_is_trained_after_its_choice_and_a_choice_after_all_trials(workspace: Path) -> None:
    stages = snakemake_stages(workspace)
    choose = next(stage for cmd, stage in stages.items() if cmd.startswith("maskdm choose"))
    arms, trials = ("scratch", "patch-m50"), ("given", "lr-high")
    of_trials = {f"results/tuning/{arm}/{trial}.json" for arm in arms for trial in trials}
    assert choose.inputs == {"results/data", *of_trials}
    for cmd, stage in stages.items():
        if (found := re.match(r"maskdm (?:pretrain|finetune) --arm (\S+)", cmd)) is not None:
            chosen = {name for name in stage.inputs if "chosen" in name}
            assert chosen == {f"results/chosen/{found[1]}.json"}, "of this arm alone: others change without it"


def test_the_command_lines_carry_the_versions_of_the_stages(workspace: Path) -> None:
    carried = dict(re.fullmatch(r"maskdm (\w+).* --stage-version (\d+)", cmd).groups() for cmd in dvc_stages(workspace))  # type: ignore[union-attr]
    assert {stage: int(version) for stage, version in carried.items()} == STAGE_VERSIONS


def test_invalid_params_stop_snakemake_before_any_work(workspace: Path) -> None:
    change_params(workspace, model={"depht": 3})
    try:
        output = command(workspace, "snakemake", "-d", TINY, "--cores", "1", check=False)
    finally:
        start_params(workspace)
    assert "model.depht: unknown key; did you mean 'depth'?" in output
    assert not executed(output)


def of_arm(stages: set[str], arm: str) -> set[str]:
    """The stages of an arm: its trials, training and scores."""
    return {stage for stage in stages if f"--arm {arm} " in f"{stage} "}


@pytest.mark.workflow
def test_dvc_and_snakemake_give_the_same_bytes_and_know_what_the_other_has_made(workspace: Path) -> None:
    everything = {c.removeprefix("maskdm ").rsplit(" --stage-version")[0] for c in dvc_stages(workspace)}

    assert executed(command(workspace, *SNAKEMAKE)) == everything
    by_snakemake = digests(workspace)
    assert sum(name.startswith("metrics/") for name in by_snakemake) == 3  # two arms and the scale
    assert not executed(command(workspace, *SNAKEMAKE))
    assert_dvc_has_nothing_to_do(workspace)

    add_a_trial_that_is_worse(workspace)
    # In one go Snakemake would start all arms again: it plans that before `choose` has left their files as they were.
    new = {f"tune --arm {arm} --trial slow" for arm in ("scratch", "patch-m50")}
    assert executed(command(workspace, *SNAKEMAKE, "--until", "choose")) == new | {"choose"}
    assert executed(command(workspace, *SNAKEMAKE, "--dry-run")) == {"report"}
    assert "report:" in command(workspace / TINY, "dvc", "status", "dvc.yaml"), "a part alone is not told to DVC"

    with dvc_at_work(workspace):
        output = command(workspace, *SNAKEMAKE)
    assert executed(output) == {"report"}
    assert "warning: DVC could not be told what Snakemake has made" in output
    assert not executed(command(workspace, *SNAKEMAKE)), "but DVC is told now"
    assert "up to date" in command(workspace / TINY, "dvc", "status", "dvc.yaml")

    for lost in (workspace / TINY / "results", workspace / TINY / ".work", workspace / TINY / ".snakemake"):
        shutil.rmtree(lost)
    shutil.rmtree(workspace / ".dvc/cache")
    (workspace / TINY / "dvc.lock").unlink()
    start_params(workspace)
    assert executed(command(workspace, *REPRO)) == everything
    assert digests(workspace) == by_snakemake
    assert not executed(command(workspace, *REPRO))

    with_rate(workspace, 0.25)  # before Snakemake was ever told of anything
    changed = executed(command(workspace, *SNAKEMAKE, "--dry-run"))
    assert of_arm(changed, "patch-m50") == of_arm(everything, "patch-m50")
    assert not {stage for stage in of_arm(changed, "scratch") if stage.startswith("tune")}
    assert {"prepare", "features", "scale"}.isdisjoint(changed)
    start_params(workspace)
    assert not executed(command(workspace, *SNAKEMAKE, "--dry-run"))

    with_rate(workspace, 0.25)
    add_a_trial_that_is_worse(workspace)
    assert executed(command(workspace, *REPRO)) == of_arm(everything, "patch-m50") | new | {"choose", "report"}
    chosen = {json.loads(file.read_bytes())["trial"] for file in (workspace / TINY / "results/chosen").glob("*.json")}
    assert "slow" not in chosen
    assert not executed(command(workspace, *SNAKEMAKE, "--dry-run"))

    clone_with_results(workspace)
    assert not executed(command(workspace, *SNAKEMAKE, "--dry-run"))
    assert_dvc_has_nothing_to_do(workspace)
    with_rate(workspace, 0.5)
    assert of_arm(executed(command(workspace, *SNAKEMAKE, "--dry-run")), "patch-m50")


def assert_dvc_has_nothing_to_do(workspace: Path) -> None:
    assert "up to date" in command(workspace / TINY, "dvc", "status", "dvc.yaml")
    assert not executed(command(workspace, *REPRO))


def with_rate(workspace: Path, mask_rate: float) -> None:
    change_params(workspace, arms={"patch-m50": {"strategy": "patch", "mask_rate": mask_rate}})


@contextlib.contextmanager
def dvc_at_work(workspace: Path) -> Iterator[None]:
    """Hold DVC's lock, as another `dvc` does that is at work."""
    with (workspace / ".dvc/tmp/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def clone_with_results(workspace: Path) -> None:
    """What `git clone` and `dvc pull` leave: dvc.lock and the results, all new; none of Snakemake's books."""
    metrics = {file: file.read_bytes() for file in (workspace / TINY / "results/metrics").glob("*.json")}
    for lost in ("results", ".work", ".snakemake"):
        shutil.rmtree(workspace / TINY / lost)
    for file, content in metrics.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    command(workspace / TINY, "dvc", "checkout", "dvc.yaml")


def add_a_trial_that_is_worse(workspace: Path) -> None:
    trials = {"given": {}, "lr-high": {"pretrain.lr": 8e-3, "finetune.lr": 8e-3}}
    slow = {"pretrain.lr": 1e-9, "finetune.lr": 1e-9}
    change_params(workspace, tuning={"trials": {**trials, "slow": slow}})


def test_values_are_written_equally_whichever_engine_has_read_them() -> None:
    """`2e-4` and `on` are texts for one version of YAML and a number and a truth value for the other."""
    one = {"lr": "2e-4", "flip": "on", "arms": {"a": [1, None, "patch"], "b": {}}}
    other = {"arms": {"b": {}, "a": [1.0, None, "patch"]}, "flip": True, "lr": 0.0002}
    assert repr(engines.plain(one)) == repr(engines.plain(other))
    assert repr(engines.plain(one)) != repr(engines.plain({**one, "lr": "2e-5"}))
    assert repr(engines.plain({"flip": True})) != repr(engines.plain({"flip": 1}))


class Engine:
    """An engine at work on the pretraining of a seed, in a session of its own, as in a terminal."""

    def __init__(self, workspace: Path, engine: str, seed: int) -> None:
        self.workspace, self.seed = workspace, seed
        target = f"results/pretrain/patch-m50/seed-{seed}"
        words = {"dvc": (*REPRO[:2], f"{REPRO[2]}:pretrain@patch-m50-{seed}"), "snakemake": (*SNAKEMAKE, target)}[
            engine
        ]
        self.output, self.work = workspace / TINY / target, workspace / TINY / ".work" / target
        self.said = workspace / f"{engine}-{seed}.txt"
        with self.said.open("a") as file:
            self.process = subprocess.Popen(
                words,
                cwd=workspace,
                env=environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # tests that were started in the background ignore Ctrl-C, and what they start would, too
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def stage_at_work(self) -> psutil.Process:
        """The process of the stage, once it has saved a state."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.said.read_text()
            if list(self.work.glob("state-*.safetensors")):
                children = psutil.Process(self.process.pid).children(recursive=True)
                return next(c for c in reversed(children) if "pretrain" in c.cmdline())
            time.sleep(0.02)
        raise AssertionError(f"no state in {self.work}:\n{self.said.read_text()}")

    def everything_said(self) -> str:
        """By the engine and, where that puts it into a file, by the stage."""
        log = self.workspace / TINY / f"logs/pretrain-patch-m50-seed-{self.seed}.log"
        return self.said.read_text() + (log.read_text() if log.is_file() else "")


@pytest.fixture(scope="module")
def slow_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one arm, ready to be pretrained for some seconds for each of several seeds."""
    workspace = make_workspace(tmp_path_factory.mktemp("slow"))
    content = yaml.safe_load((workspace / TINY / "params.yaml").read_text(encoding="utf-8"))
    content |= {"seeds": [0, 1, 2], "arms": {"patch-m50": content["arms"]["patch-m50"]}}
    content |= {"tuning": {"enabled": False, "trials": {"given": {}}}, "saving": {"every_seconds": 0.1}}
    content["tuning"] |= {"seed": 1000, "budget_fraction": 0.5}
    content["budget"] |= {"unmasked_steps": 160, "milestones": [1.0]}
    content["pretrain"]["share"] = 0.9
    (workspace / TINY / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    command(workspace, *REPRO[:2], f"{REPRO[2]}:choose")
    return workspace


KILLS = {
    "the engine": lambda engine, stage: engine.process.kill(),
    "both": lambda engine, stage: (engine.process.kill(), stage.kill()),
    "Ctrl-C": lambda engine, stage: os.killpg(engine.process.pid, signal.SIGINT),
}


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("seed", "engine", "what"),
    [
        (0, "dvc", "the engine"),
        (1, "dvc", "Ctrl-C"),
        (2, "snakemake", "both"),
    ],
)
def test_after_a_kill_the_same_command_again_is_all_it_takes(
    slow_training: Path, seed: int, engine: str, what: str
) -> None:
    first = Engine(slow_training, engine, seed)
    KILLS[what](first, first.stage_at_work())
    assert first.process.wait(timeout=30) != 0

    again = Engine(slow_training, engine, seed)
    assert again.process.wait(timeout=60) == 0, again.said.read_text()
    assert list(again.output.glob("*.safetensors"))
    record = json.loads((slow_training / TINY / f"results/records/pretrain-patch-m50-seed-{seed}.json").read_bytes())
    if what == "the engine":  # its stage worked on, and the second one found the work done
        assert record["starts"] == 1
        assert re.search(
            rf"pretrain patch-m50 seed {seed}: (process \d+ has done it|done before)", again.everything_said()
        )
    else:
        assert record["starts"] == 2
        assert f"pretrain patch-m50 seed {seed}: going on from step" in again.everything_said()
    if what == "Ctrl-C":
        assert "stopped by SIGINT: saved pretrain" in again.said.read_text()


@pytest.mark.parametrize(
    ("device", "num_gpus", "expected"),
    [("cpu", 1, False), ("auto", 0, False), ("auto", 1, True), ("cuda", 0, True)],
)
def test_stages_reserve_a_gpu_where_they_will_use_one(
    device: str, num_gpus: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(num_gpus):
        (tmp_path / f"0000:{number:02}:00.0").mkdir()
    monkeypatch.setattr(engines, "NVIDIA_GPUS", tmp_path)
    assert engines.stages_use_a_gpu(device) == expected
