"""What is measured: shapes of images, network and batch, as params of experiments; and the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from benchmarks.machine import num_cores
from maskdm.config import ComputeConfig, Params, parse_params
from maskdm.training import devices

ROOT = Path(__file__).parents[1]
RATES = (0.0, 0.5, 0.75, 0.9)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """Images, network and batch.

    Attributes:
        name: the shape's name.
        image_size: side in pixels.
        channels: 1 or 3.
        model: the section `model` of params.yaml.
        batch_size: images per step.
    """

    name: str
    image_size: int
    channels: int
    model: dict[str, Any]
    batch_size: int

    def params(
        self,
        mask_rate: float,
        threads: int,
        grad_clip: float | None = None,
        device_resident: bool | str = "auto",
        **compute: Any,
    ) -> Params:
        """An experiment with one arm, `arm_of(mask_rate)`.

        Args:
            mask_rate: 0 is finetuning, otherwise pretraining with the strategy `patch`.
            threads: CPU threads.
            grad_clip: as in params.yaml; neither the default nor experiments/celeba64 clips.
            device_resident: as in params.yaml.
            compute: other keys of the section `compute`.
        """
        stage = {"lr": 1e-4, "batch_size": self.batch_size}
        masked = {"strategy": "patch", "mask_rate": mask_rate}
        return parse_params(
            {
                "name": self.name,
                "seeds": [0],
                "dataset": {"source": "digits", "image_size": self.image_size, "channels": self.channels},
                "datasets": {},
                "model": self.model,
                "diffusion": {},
                "budget": {"unmasked_steps": 10**9},
                "training": {"log_every": 10**9, "grad_clip": grad_clip},
                "pretrain": stage,
                "finetune": stage,
                "sampling": {},
                "evaluation": {},
                "compute": {"device": "auto", "precision": "auto", "threads": threads, **compute},
                "tuning": {"seed": 1, "budget_fraction": 0.5, "trials": {}},
                "data": {"device_resident": device_resident},
                "tracking": {"enabled": False},
                "arms": {arm_of(mask_rate): {"strategy": "none"} if mask_rate == 0 else masked},
            }
        )

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return int((self.image_size // self.model["patch_size"]) ** 2)


def arm_of(mask_rate: float) -> str:
    """The arm's key: `scratch`, `patch-m90`, …."""
    return "scratch" if mask_rate == 0 else f"patch-m{round(100 * mask_rate)}"


def default_params() -> dict[str, Any]:
    """The content of the default experiment's params.yaml."""
    return dict(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))


TINY = Shape("tiny", 16, 1, default_params()["model"], 128)
SMALL = Shape(
    "small", 32, 3, {"patch_size": 2, "dim": 256, "depth": 9, "num_heads": 4, "mlp_ratio": 4.0}, batch_size=32
)
CELEBA = Shape(
    "celeba", 64, 3, {"patch_size": 4, "dim": 512, "depth": 13, "num_heads": 8, "mlp_ratio": 4.0}, batch_size=8
)
# the paper's CelebA-HQ with patches of 8 instead of 4: 1,024 tokens
BASE = Shape("base", 256, 3, {"patch_size": 8, "dim": 768, "depth": 13, "num_heads": 12, "mlp_ratio": 4.0}, 256)
SHAPES = {shape.name: shape for shape in (TINY, SMALL, CELEBA)}


@dataclass(frozen=True)
class Settings:
    """The settings of a run, for all benchmarks.

    Attributes:
        folder: for datasets, projects and work; removed at the end.
        rounds: measurements of everything.
        is_quick: whether to leave out what takes long.
        shapes: the shapes to measure.
        threads: CPU threads.
        device: the device for training and sampling.
    """

    folder: Path
    rounds: int = 7
    is_quick: bool = False
    shapes: tuple[Shape, ...] = tuple(SHAPES.values())
    threads: int = field(default_factory=num_cores)
    device: torch.device = CPU

    def on(self, device: str) -> Settings:
        """The same settings on another device."""
        return replace(self, device=torch.device(device))

    @property
    def step_seconds(self) -> float:
        """Minimum seconds of training steps in a measurement, so that the overhead of calling `train` is negligible."""
        return 0.02 if self.is_quick else 0.6

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the device supports, the fastest last."""
        kind: Literal["cpu", "cuda"] = "cuda" if self.device.type == "cuda" else "cpu"
        config = ComputeConfig(device=kind, precision="auto", threads=self.threads)
        return ("fp32", "bf16") if devices.resolve(config).autocast else ("fp32",)
