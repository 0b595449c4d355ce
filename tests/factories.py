"""What several test files build: tiny experiments, in-memory images, networks, and where they compute.

Importing this asks PyTorch for one thread and deterministic kernels, as every stage does.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from maskdm.base import rng
from maskdm.config import ComputeConfig, Params, parse_params
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.scoring.protocol import Protocol, drawn_as, metrics_as
from maskdm.training.devices import Compute, resolve

CPU = torch.device("cpu")
FP32 = resolve(ComputeConfig(device="cpu", precision="fp32"))
BF16 = Compute(CPU, autocast=True, threads=1)


def tiny_params(**changes: Any) -> Params:
    """A valid experiment on 8×8 digits in 4×4 patches; `changes` are merged into its sections, `arms` replaced."""
    stage = {"lr": 1e-3, "batch_size": 8}
    content: dict[str, Any] = {
        "name": "tiny",
        "seeds": [0],
        "dataset": {"source": "digits", "image_size": 8, "channels": 1},
        "datasets": {},
        "model": {"patch_size": 2, "dim": 16, "depth": 3, "num_heads": 2},
        "diffusion": {"schedule": "cosine"},
        "budget": {"unmasked_steps": 100},
        "training": {},
        "pretrain": stage,
        "finetune": stage,
        "sampling": {},
        "evaluation": {},
        "compute": {"device": "cpu", "precision": "fp32"},
        "tuning": {"seed": 1000, "budget_fraction": 0.5, "trials": {}},
        "tracking": {"enabled": False},
        "arms": {
            "scratch": {"strategy": "none"},
            "patch-m50": {"strategy": "patch", "mask_rate": 0.5},
            "block2-m75": {"strategy": "block", "block_size": 2, "mask_rate": 0.75},
        },
    }
    for section, change in changes.items():
        is_merged = isinstance(change, dict) and section != "arms"
        content[section] = {**content[section], **change} if is_merged else change
    return parse_params(content)


def data_params(dataset: dict[str, Any], datasets: dict[str, Any] | None = None, threads: int = 1) -> Params:
    """An experiment on images of any size, to prepare them."""
    own = {"dataset": dataset, "datasets": datasets or {}, "arms": {"scratch": {"strategy": "none"}}}
    content = tiny_params(model={"patch_size": 1}, compute={"threads": threads}).model_dump(exclude_unset=True)
    return parse_params({**content, **own})


def tiny_model(params: Params, seed: int = 0, num_classes: int = 10) -> UViT:
    """The network of `params`, initialised."""
    model = build_model(params, num_classes)
    model.initialise(rng.generator(seed, "init"))
    return model


def protocol(**changes: Any) -> Protocol:
    """What 1,000 samples against 2,000 faces held out would be of; `changes` take the place of its fields."""
    params = tiny_params()
    fields: dict[str, Any] = {
        "images": {"kind": "celeba", "split": "train", "crop": "box", "crop_box": [57, 25, 128], "fraction": 0.1},
        "shape": (64, 64, 3),
        "reference": "held_out",
        "num_real": 2000,
        "real_sha256": "a" * 64,
        "extractor": "inception-v3-compat/2048",
        "extractor_sha256": "b" * 64,
        "weights_sha256": "c" * 64,
        "num_samples": 1000,
        "drawn": drawn_as(params.sampling),
        "metrics": metrics_as(params.evaluation),
    }
    return Protocol(**{**fields, **changes})


@dataclass
class ArrayImages:
    """Images in memory, as `Batches` wants them."""

    pixels: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    def gather(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]


@cache
def digits() -> ArrayImages:
    """scikit-learn's digits as the pipeline stores them: uint8 (1797, 8, 8, 1), labels int64."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * 255 / 16).astype(np.uint8)[..., None]
    return ArrayImages(pixels, bunch.target.astype(np.int64))


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Writing more fails in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
