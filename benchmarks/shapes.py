"""The shapes that are measured: images, network and batch, as params of experiments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from maskdm.config import Params, parse_params

ROOT = Path(__file__).parents[1]
RATES = (0.0, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Shape:
    """Images, network and batch.

    Attributes:
        name: of the shape.
        image_size: side in pixels.
        channels: 1 or 3.
        model: the section `model` of params.yaml.
        batch_size: images of a step.
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
        """An experiment whose one arm, `arm_of(mask_rate)`, is to be timed.

        Args:
            mask_rate: 0 is finetuning, all else pretraining with strategy `patch`.
            threads: of the CPU.
            grad_clip: as in params.yaml; neither the default nor experiments/celeba64 clips.
            device_resident: as in params.yaml.
            compute: other knobs of the section `compute`.
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

    @cached_property
    def num_patches(self) -> int:
        """N of the grid."""
        return int((self.image_size // self.model["patch_size"]) ** 2)

    def with_batch(self, batch_size: int) -> Shape:
        """The same, other batches."""
        return replace(self, batch_size=batch_size)


def arm_of(mask_rate: float) -> str:
    """The arm's key: `scratch`, `patch-m90`, …."""
    return "scratch" if mask_rate == 0 else f"patch-m{round(100 * mask_rate)}"


def _default_model() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return dict(content["model"])


TINY = Shape("tiny", 16, 1, _default_model(), 128)
SMALL = Shape(
    "small", 32, 3, {"patch_size": 2, "dim": 256, "depth": 9, "num_heads": 4, "mlp_ratio": 4.0}, batch_size=32
)
CELEBA = Shape(
    "celeba", 64, 3, {"patch_size": 4, "dim": 512, "depth": 13, "num_heads": 8, "mlp_ratio": 4.0}, batch_size=8
)
# CelebA-HQ of the paper, with patches of 8 in place of 4: 1,024 tokens
BASE = Shape("base", 256, 3, {"patch_size": 8, "dim": 768, "depth": 13, "num_heads": 12, "mlp_ratio": 4.0}, 256)
SHAPES = {shape.name: shape for shape in (TINY, SMALL, CELEBA)}
