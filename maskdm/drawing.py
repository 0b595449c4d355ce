"""Images from averaged weights: what the stage `sample`, the trials and the logged models draw with."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from maskdm.backbone import UViT
from maskdm.checkpoint import architecture_of, load_into, load_weights
from maskdm.compute import build_model
from maskdm.config import Params
from maskdm.data.batches import to_uint8
from maskdm.device import Compute
from maskdm.diffusion import Diffusion
from maskdm.progress import Progress
from maskdm.sampling import batches_of, on_images, sample


def load_model(params: Params, weights: Path, num_classes: int, compute: Compute) -> UViT:
    """The network with the averaged weights of a checkpoint, ready to draw.

    Args:
        params: give the architecture.
        weights: a file of `checkpoint.save_weights` with a set `ema`.
        num_classes: of the dataset; 0 without labels.
        compute: the device.

    Raises:
        UserError: the weights are missing, damaged or do not fit.
    """
    state, _ = load_weights(weights, "ema", architecture_of(params, num_classes))
    model = build_model(params, num_classes)
    load_into(model, state, weights)
    return model.eval().to(compute.device)


def draw_images(
    params: Params, model: UViT, num_classes: int, seed: int, num_images: int, compute: Compute, title: str
) -> np.ndarray:
    """Draw images as params.sampling says, in batches of its size.

    Args:
        params: the experiment.
        model: its network, on the device of `compute`.
        num_classes: of the dataset; a class-conditional model draws every class in turn.
        seed: image i depends on (seed, i); on the batch that it is drawn in only by the rounding of floats.
        num_images: how many.
        compute: device and precision.
        title: for the progress display.

    Returns:
        uint8 (num_images, H, W, C).
    """
    config, side = params.sampling, params.dataset.image_size
    diffusion = Diffusion(
        params.diffusion.num_timesteps, params.diffusion.schedule, params.diffusion.prediction, compute.device
    )
    bar = Progress(num_images * config.num_steps, title, "evaluations")
    parts = []
    for ids in batches_of(num_images, config.batch_size):
        labels = _labels(params, ids, num_classes, compute.device)
        with compute.context(training=False):
            drawn = sample(
                on_images(model, params.model.patch_size, params.grid, labels),
                diffusion,
                config,
                (params.dataset.channels, side, side),
                seed,
                ids,
                compute.device,
                on_step=partial(bar.update, len(ids)),
            )
        parts.append(to_uint8(drawn).cpu().numpy())
    bar.close()
    return np.concatenate(parts)


def _labels(params: Params, ids: range, num_classes: int, device: torch.device) -> torch.Tensor | None:
    """Every class in turn, of a class-conditional model."""
    if not params.model.class_conditional:
        return None
    return torch.tensor([i % num_classes for i in ids], device=device)
