"""DVC and Snakemake: the same stages from the same params.yaml, and the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from maskdm.stages.versions import STAGE_VERSIONS

ROOT = Path(__file__).parents[1]
ENGINE_FILES = ("dvc.yaml", "params.yaml", "Snakefile", "workflow", "profiles", ".dvcignore")
TINY = "experiments/tiny"


class Stage(NamedTuple):
    """What an engine says of a stage."""

    command: str
    inputs: frozenset[str]
    outputs: frozenset[str]


def command(workspace: Path, *arguments: str, check: bool = True) -> str:
    """Run a command as a user of the environment would; stdout and stderr together."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        arguments, cwd=workspace, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not check or done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}"
    return done.stdout


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
def test_dvc_and_snakemake_give_the_same_bytes_and_rerun_only_what_changed(workspace: Path) -> None:
    everything = {c.removeprefix("maskdm ").rsplit(" --stage-version")[0] for c in dvc_stages(workspace)}
    repro = ("dvc", "repro", f"{TINY}/dvc.yaml")
    snakemake = ("snakemake", "-d", TINY, "--cores", "2")

    assert executed(command(workspace, *snakemake)) == everything
    by_snakemake = digests(workspace)
    assert sum(name.startswith("metrics/") for name in by_snakemake) == 3  # two arms and the scale
    assert not executed(command(workspace, *snakemake))

    add_a_trial_that_is_worse(workspace)
    # In one go Snakemake would train all arms again: it plans that before `choose` has left their files as they were.
    new = {f"tune --arm {arm} --trial slow" for arm in ("scratch", "patch-m50")}
    assert executed(command(workspace, *snakemake, "--until", "choose")) == new | {"choose"}
    assert executed(command(workspace, *snakemake, "--dry-run")) == {"report"}

    start_params(workspace)
    change_params(workspace, arms={"patch-m50": {"strategy": "patch", "mask_rate": 0.25}})
    changed = executed(command(workspace, *snakemake, "--dry-run"))
    assert of_arm(changed, "patch-m50") == of_arm(everything, "patch-m50")
    assert not {stage for stage in of_arm(changed, "scratch") if stage.startswith("tune")}
    assert {"prepare", "features", "scale"}.isdisjoint(changed)

    start_params(workspace)
    shutil.rmtree(workspace / TINY / "results")
    assert executed(command(workspace, *repro)) == everything
    assert digests(workspace) == by_snakemake
    assert not executed(command(workspace, *repro))

    change_params(workspace, arms={"patch-m50": {"strategy": "patch", "mask_rate": 0.25}})
    add_a_trial_that_is_worse(workspace)
    assert executed(command(workspace, *repro)) == of_arm(everything, "patch-m50") | new | {"choose", "report"}
    chosen = {json.loads(file.read_bytes())["trial"] for file in (workspace / TINY / "results/chosen").glob("*.json")}
    assert "slow" not in chosen


def add_a_trial_that_is_worse(workspace: Path) -> None:
    trials = {"given": {}, "lr-high": {"pretrain.lr": 8e-3, "finetune.lr": 8e-3}}
    slow = {"pretrain.lr": 1e-9, "finetune.lr": 1e-9}
    change_params(workspace, tuning={"trials": {**trials, "slow": slow}})
