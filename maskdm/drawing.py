"""Images from averaged weights: what the stage `sample`, the trials and the logged models draw with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from maskdm import device
from maskdm.backbone import UViT
from maskdm.checkpoint import architecture_of, load_into, load_weights
from maskdm.compute import build_model
from maskdm.config import Params
from maskdm.data.batches import to_uint8
from maskdm.device import Compute
from maskdm.diffusion import Diffusion
from maskdm.progress import Progress
from maskdm.resume import Pieces
from maskdm.sampling import batches_of, on_images, sample


def load_model(params: Params, weights: Path, num_classes: int, compute: Compute) -> UViT:
    """The network with the averaged weights of a checkpoint, ready to draw.

    Args:
        params: give the architecture.
        weights: a file of `checkpoint.save_tensors` with a set `ema`.
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
    params: Params,
    model: UViT,
    num_classes: int,
    seed: int,
    num_images: int,
    compute: Compute,
    title: str,
    kept: Pieces | None = None,
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
        kept: has the batches that a killed process has finished, and gets every new one.

    Returns:
        uint8 (num_images, H, W, C).

    Raises:
        UserError: memory does not suffice, or a batch can't be kept.
    """
    config, parts = params.sampling, list[torch.Tensor]()
    bar = Progress(num_images * config.num_steps, title, "evaluations")
    advice = f"{title}: batches of {config.batch_size} images did not fit; lower sampling.batch_size"
    with device.explain_out_of_memory(advice):
        for ids in batches_of(num_images, config.batch_size):
            name = f"{ids.start:08d}-{ids.stop:08d}"
            if kept is not None and (piece := kept.load(name)) is not None:
                parts.append(piece[0]["images"])
                bar.update(len(ids) * config.num_steps)
                continue
            parts.append(_draw_batch(params, model, num_classes, seed, ids, compute, partial(bar.update, len(ids))))
            if kept is not None:
                kept.save(name, {"images": parts[-1]}, {})
    bar.close()
    return torch.cat(parts).numpy()


def _draw_batch(
    params: Params,
    model: UViT,
    num_classes: int,
    seed: int,
    ids: range,
    compute: Compute,
    on_step: Callable[[], None],
) -> torch.Tensor:
    side, process = params.dataset.image_size, params.diffusion
    labels = _labels(params, ids, num_classes, compute.device)
    with compute.context(training=False):
        drawn = sample(
            on_images(model, params.model.patch_size, params.grid, labels),
            Diffusion(process.num_timesteps, process.schedule, process.prediction, compute.device),
            params.sampling,
            (params.dataset.channels, side, side),
            seed,
            ids,
            compute.device,
            on_step,
        )
    return to_uint8(drawn).cpu()


def _labels(params: Params, ids: range, num_classes: int, where: torch.device) -> torch.Tensor | None:
    """Every class in turn, of a class-conditional model."""
    if not params.model.class_conditional:
        return None
    return torch.tensor([i % num_classes for i in ids], device=where)
