"""The machine: its description, and its speed limits, measured in the same rounds as everything else."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Callable, Mapping
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
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(threads: int) -> dict[str, Any]:
    """Processor, memory, GPU, versions, commit and date.

    Args:
        threads: CPU threads of the measured steps.
    """
    commit, dirty = git_state(ROOT)
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": commit,
        "git_dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def slug(machine: Mapping[str, Any]) -> str:
    """A machine's name for a file: processor and cores, or the GPU."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ceilings(device: torch.device, precisions: tuple[str, ...]) -> dict[str, Task]:
    """Tasks that measure the device's speed limits: matrix products in each precision, and a copy."""
    side, wait = MATMUL_SIDE[device.type], waiting_for(device)
    tasks = {}
    for precision in precisions:
        a, b = torch.randn(2, side, side, device=device).to(DTYPES[precision])
        tasks[f"matmul {precision}"] = Task(looped(_product(a, b), wait), LEAST_SECONDS)
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return {**tasks, "copy": Task(looped(lambda: target.copy_(source), wait), LEAST_SECONDS)}


def ceiling_row(rounds: Rounds, device: torch.device, precisions: tuple[str, ...]) -> dict[str, Spread | None]:
    """The measured limits as cells: matrix products in GFLOP/s, copies in GB/s read and written.

    On a GPU matrix products of fp32 are made in TF32, here as in steps.
    """
    matmul = {
        f"matmul {'TF32' if (device.type, precision) == ('cuda', 'fp32') else precision} GFLOP/s": rounds.rate(
            f"matmul {precision}", _matmul_flops(device) / 1e9
        )
        for precision in precisions
    }
    return {**matmul, "copy GB/s": rounds.rate("copy", 2 * COPY_BYTES[device.type] / 1e9)}


def share_of_ceiling(rounds: Rounds, name: str, flops: float, precision: str, device: torch.device) -> Spread:
    """FLOP/s of a task over those of a matrix product in the same precision, round by round."""
    return rounds.ratio(f"matmul {precision}", name, flops / _matmul_flops(device))


def waiting_for(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _matmul_flops(device: torch.device) -> int:
    return int(2 * MATMUL_SIDE[device.type] ** 3)


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
