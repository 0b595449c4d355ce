"""Provenance and timing of a stage's run: the part of a result that differs between equal runs."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

from maskdm import __version__
from maskdm.base.checksums import short_hash
from maskdm.base.machine import cpu_name, git_state, peak_memory_gib
from maskdm.config import Params

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


@contextmanager
def measured(params: Params, record: dict[str, Any]) -> Iterator[None]:
    """Time the block; add its time, memory and provenance to `record` when it ends well."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    yield
    record.update(provenance(params))
    record["started"] = started.isoformat(timespec="seconds")
    record["wall_seconds"] = round(time.perf_counter() - clock, 3)
    record["peak_memory_gib"] = round(peak_memory_gib(), 3)


def provenance(params: Params) -> dict[str, Any]:
    """What produced a number: commit, params, versions, machine."""
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
