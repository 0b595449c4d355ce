"""How long and on what the benchmarks run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from benchmarks.machine import num_cores
from benchmarks.shapes import SHAPES, Shape
from maskdm.config import ComputeConfig
from maskdm.training import devices

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What all benchmarks share.

    Attributes:
        folder: for data sets, projects and work; removed in the end.
        rounds: measurements of everything.
        is_quick: whether to leave out what takes long.
        shapes: to measure.
        threads: of the CPU.
        device: where training and sampling are measured.
    """

    folder: Path
    rounds: int = 7
    is_quick: bool = False
    shapes: tuple[Shape, ...] = tuple(SHAPES.values())
    threads: int = field(default_factory=num_cores)
    device: torch.device = CPU

    @property
    def step_seconds(self) -> float:
        """Of training steps, at least, behind one measurement: what is done once per call of `train` must not show."""
        return 0.02 if self.is_quick else 0.6

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that the device computes in, the best last."""
        kind: Literal["cpu", "cuda"] = "cuda" if self.device.type == "cuda" else "cpu"
        config = ComputeConfig(device=kind, precision="auto", threads=self.threads)
        return ("fp32", "bf16") if devices.resolve(config).autocast else ("fp32",)
