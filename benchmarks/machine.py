"""The machine: what it is, and what it can do at best, measured in the same rounds as all else."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.timing import Rounds, Spread, Task, looped
from maskdm.base.machine import cpu_name, git_state

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "timm", "numpy", "pillow", "dvc", "snakemake", "mlflow")
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}
LEAST_SECONDS = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """Processor, memory, GPU, versions, commit and date.

    Args:
        threads: that steps are measured with.
    """
    commit, dirty = git_state(ROOT)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": commit,
        "git_dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def slug(machine: Mapping[str, Any]) -> str:
    """A machine's name for a file: processor and cores, or the GPU."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ceilings(device: torch.device, precisions: tuple[str, ...]) -> dict[str, Task]:
    """Tasks that find out how fast matrix products and copies can be.

    Args:
        device: of the machine.
        precisions: `fp32`, `bf16`.
    """
    side, wait = MATMUL_SIDE[device.type], waiting_for(device)
    tasks = {}
    for precision in precisions:
        a, b = torch.randn(2, side, side, device=device).to(DTYPES[precision])
        tasks[f"matmul {precision}"] = Task(looped(_product(a, b), wait), LEAST_SECONDS)
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    tasks["copy"] = Task(looped(_copy(source), wait), LEAST_SECONDS)
    return tasks


def matmul_flops(device: torch.device) -> int:
    """FLOPs of one of the matrix products of `ceilings`."""
    side: int = MATMUL_SIDE[device.type]
    return 2 * side**3


def ceiling_row(rounds: Rounds, device: torch.device, precisions: tuple[str, ...]) -> dict[str, Spread | None]:
    """What `ceilings` has given, as cells: matrix products in GFLOP/s, copies in GB/s read and written.

    On a GPU matrix products of fp32 are made in TF32, here as in steps.
    """
    matmul = {
        f"matmul {'TF32' if (device.type, precision) == ('cuda', 'fp32') else precision} GFLOP/s": rounds.rate(
            f"matmul {precision}", matmul_flops(device) / 1e9
        )
        for precision in precisions
    }
    return {**matmul, "copy GB/s": rounds.rate("copy", 2 * COPY_BYTES[device.type] / 1e9)}


def share_of_ceiling(rounds: Rounds, name: str, flops: float, precision: str, device: torch.device) -> Spread:
    """FLOP/s of a task over those of a matrix product in its precision, round by round."""
    return rounds.ratio(f"matmul {precision}", name, flops / matmul_flops(device))


def waiting_for(device: torch.device) -> Any:
    """What waits until the device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _product(a: torch.Tensor, b: torch.Tensor) -> Any:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(source: torch.Tensor) -> Any:
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
