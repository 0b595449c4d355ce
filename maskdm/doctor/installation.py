"""params.yaml, and whether the installed packages are those that the project was tested with."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from maskdm import paths
from maskdm.config import load_params
from maskdm.doctor.findings import Finding, counted, info, ok, problem
from maskdm.errors import ParamsError

LOCK_FILE = "requirements.lock"
PINNED = ("dvc", "snakemake", "mlflow", "torch")  # what a stage's result, or the engines' files, may depend on


def check() -> list[Finding]:
    """Look at params.yaml and at the versions."""
    return [_params(), *_versions(paths.project_root() / LOCK_FILE)]


def _params() -> Finding:
    try:
        params = load_params()
    except ParamsError as error:
        return problem(str(error), "until then no stage starts")
    grid = f"{counted(len(params.arms), 'arm')} × {counted(len(params.seeds), 'seed')}"
    return ok(f"params.yaml is valid: experiment {params.name}, {grid}")


def _versions(lock_file: Path) -> Iterator[Finding]:
    if not lock_file.is_file():
        return
    pins = dict(line.strip().split("==") for line in lock_file.read_text(encoding="utf-8").splitlines() if "==" in line)
    installed = {name: _installed(name) for name in PINNED if name in pins}
    others = [
        f"{name} {'is not installed' if version is None else version} (tested: {pins[name]})"
        for name, version in installed.items()
        if version is None or version.split("+")[0] != pins[name]
    ]
    if others:
        yield info(f"not the versions of {LOCK_FILE}: {', '.join(others)}", f"pip install -r {LOCK_FILE}")
    else:
        yield ok(f"{', '.join(f'{name} {version}' for name, version in installed.items())}: as in {LOCK_FILE}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
