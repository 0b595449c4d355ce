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
    """A project without git, with the engines' files and the tiny experiment, untracked by MLflow."""
    for name in ENGINE_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / TINY).mkdir(parents=True)
    (folder / TINY / "dvc.yaml").symlink_to("../../dvc.yaml")
    change_params(folder, ROOT / TINY / "params.yaml", tracking={"enabled": False})
    command(folder, "dvc", "init", "--quiet", "--no-scm")
    return folder


def change_params(workspace: Path, source: Path | None = None, **sections: object) -> None:
    file = workspace / TINY / "params.yaml"
    params = yaml.safe_load((source or file).read_text(encoding="utf-8"))
    for name, content in sections.items():
        params[name] = {**params.get(name, {}), **content} if isinstance(content, dict) else content
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
        for kind in ("data", "features", "pretrain", "finetune", "samples", "metrics")
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
    assert len(dvc) == 3 + 4 * 3
    assert set(dvc) == set(snakemake)
    for cmd, stage in dvc.items():
        assert stage.outputs == snakemake[cmd].outputs, cmd
        if not cmd.startswith("maskdm report"):
            assert stage.inputs == snakemake[cmd].inputs, cmd


def test_the_report_of_dvc_depends_on_the_folders_of_what_snakemake_names(workspace: Path) -> None:
    dvc = next(s for c, s in dvc_stages(workspace).items() if c.startswith("maskdm report"))
    snakemake = next(s for c, s in snakemake_stages(workspace).items() if c.startswith("maskdm report"))
    covering = {file: [d for d in dvc.inputs if file == d or file.startswith(f"{d}/")] for file in snakemake.inputs}
    assert all(len(folders) == 1 for folders in covering.values()), covering
    assert {folders[0] for folders in covering.values()} == dvc.inputs


def test_the_command_lines_carry_the_versions_of_the_stages(workspace: Path) -> None:
    carried = dict(re.fullmatch(r"maskdm (\w+).* --stage-version (\d+)", cmd).groups() for cmd in dvc_stages(workspace))  # type: ignore[union-attr]
    assert {stage: int(version) for stage, version in carried.items()} == STAGE_VERSIONS


def test_invalid_params_stop_snakemake_before_any_work(workspace: Path) -> None:
    change_params(workspace, model={"depht": 3})
    try:
        output = command(workspace, "snakemake", "-d", TINY, "--cores", "1", check=False)
    finally:
        change_params(workspace, ROOT / TINY / "params.yaml", tracking={"enabled": False})
    assert "model.depht: unknown key; did you mean 'depth'?" in output
    assert not executed(output)


@pytest.mark.workflow
def test_dvc_and_snakemake_give_the_same_bytes_and_rerun_only_what_changed(workspace: Path) -> None:
    everything = {c.removeprefix("maskdm ").rsplit(" --stage-version")[0] for c in dvc_stages(workspace)}
    repro = ("dvc", "repro", f"{TINY}/dvc.yaml")
    snakemake = ("snakemake", "-d", TINY, "--cores", "2")

    assert executed(command(workspace, *repro)) == everything
    by_dvc = digests(workspace)
    assert sum(name.startswith("metrics/") for name in by_dvc) == 3
    assert not executed(command(workspace, *repro))

    shutil.rmtree(workspace / TINY / "results")
    assert executed(command(workspace, *snakemake)) == everything
    assert digests(workspace) == by_dvc
    assert not executed(command(workspace, *snakemake))

    change_params(workspace, arms={"patch-m50": {"strategy": "patch", "mask_rate": 0.25}})
    of_arm = {stage for stage in everything if "patch-m50" in stage} | {"report"}
    assert executed(command(workspace, *snakemake, "--dry-run")) == of_arm

    change_params(workspace, arms={"crop-m75": {"strategy": "crop", "mask_rate": 0.75}})
    changed = of_arm | {stage.replace("patch-m50", "crop-m75") for stage in of_arm}
    assert executed(command(workspace, *snakemake, "--dry-run")) == changed
    command(workspace, "dvc", "checkout", "--force", "--quiet", check=False)  # DVC's own, where Snakemake has written
    assert executed(command(workspace, *repro)) == changed
