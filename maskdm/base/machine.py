"""The machine, the git working tree, and time, memory and provenance of a piece of work."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from maskdm import __version__
from maskdm.base.checksums import short_hash

PACKAGES = (
    "torch",
    "torch-fidelity",
    "numpy",
    "pandas",
    "pillow",
    "scikit-learn",
    "mlflow",
    "dvc",
    "snakemake",
)


@cache
def git_state(folder: Path = Path()) -> tuple[str | None, bool | None]:
    """The commit of the working tree that contains a folder, and whether it has uncommitted changes.

    (None, None) outside a git repository. The answer is cached.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    return commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))


def peak_memory_gib() -> float:
    """The peak resident size of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def cpu_name() -> str:
    """The name of the processor, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def launched() -> tuple[int, int] | None:
    """The rank of this process and the number of ranks; None if no launcher such as torchrun started it."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_follower() -> bool:
    """Whether this process is a rank above 0."""
    return (launched() or (0, 1))[0] > 0


@contextmanager
def measured(params: object, record: dict[str, Any]) -> Iterator[None]:
    """Add time, memory and provenance of the block to `record`, if it ends without an exception."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    yield
    record.update(provenance(params))
    record["started"] = started.isoformat(timespec="seconds")
    record["wall_seconds"] = round(time.perf_counter() - clock, 3)
    record["peak_memory_gib"] = round(peak_memory_gib(), 3)


def provenance(params: object) -> dict[str, Any]:
    """What produced a result: commit, params, versions, machine."""
    commit, dirty = git_state()
    return {
        "maskdm": __version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "params_fingerprint": short_hash(params),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
    }


@cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
