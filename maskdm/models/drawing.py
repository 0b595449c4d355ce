"""Images drawn from a network: by the stage `sample`, by trials, and by loaded models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from maskdm.base.progress import Progress
from maskdm.base.tensors import load_into, load_weights
from maskdm.config import Params
from maskdm.data.batches import to_uint8
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import Denoiser, Diffusion
from maskdm.method.sampling import batches_of, on_images, sample
from maskdm.training import devices
from maskdm.training.devices import Compute
from maskdm.training.ranks import ALONE, Ranks
from maskdm.training.state import Pieces


def load_model(params: Params, weights: Path, num_classes: int, compute: Compute) -> UViT:
    """Load the averaged weights of a checkpoint into a network that is ready to draw.

    Args:
        params: the experiment; it gives the architecture.
        weights: a file of `tensors.save_tensors` with a set `ema`.
        num_classes: number of classes of the dataset; 0 without labels.
        compute: the device.

    Raises:
        UserError: the weights are missing, damaged, or do not fit the network.
    """
    state, _ = load_weights(weights, "ema", params.architecture(num_classes))
    model = build_model(params, num_classes)
    load_into(model, state, weights)
    return model.eval().to(compute.device)


def draw_images(
    params: Params,
    model: nn.Module,
    num_classes: int,
    seed: int,
    num_images: int,
    compute: Compute,
    title: str,
    kept: Pieces | None = None,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """Draw images as `params.sampling` says.

    Args:
        params: the experiment.
        model: its network, on the device of `compute`.
        num_classes: number of classes of the dataset; image i of a class-conditional model has class i mod num_classes.
        seed: image i is a function of (seed, i), up to rounding, which depends on the batch.
        num_images: how many images to draw.
        compute: device and precision.
        title: text for the progress display.
        kept: holds the batches that an interrupted process has finished, and gets every new one; of the first rank.
        ranks: the processes that draw, one batch each at a time; their number changes no byte.

    Returns:
        uint8 (num_images, H, W, C); empty on all ranks but the first.

    Raises:
        UserError: there is not enough memory, or a batch can't be saved.
    """
    config, shape = params.sampling, params.dataset.shape
    batches = list(batches_of(num_images, config.batch_size))
    parts = {ids: piece[0]["images"] for ids in batches if kept and (piece := kept.load(_name(ids)))}
    missing = ranks.broadcast([ids for ids in batches if ids not in parts])
    bar = Progress(num_images * config.num_steps, title, "evaluations") if ranks.is_first else None
    count = bar.update if bar else lambda _: None
    count(config.num_steps * sum(map(len, parts)))
    size = min(config.batch_size, num_images) if compute.compile_mode else None  # another size would be compiled again
    draw = partial(_draw_batch, params, compute.compiled(model), num_classes, seed, compute, size)
    advice = f"{title}: batches of {config.batch_size} images did not fit; lower sampling.batch_size"
    with devices.explain_out_of_memory(advice), devices.explain_compiler():
        for ids, images in _drawn(missing, draw, count, ranks):
            parts[ids] = images
            if kept:
                kept.save(_name(ids), {"images": images}, {})
    if bar:
        bar.close()
    return np.concatenate([np.empty((0, *shape), np.uint8), *(parts[ids].numpy() for ids in batches if ids in parts)])


def _drawn(
    missing: list[range],
    draw: Callable[[range, Callable[[], None]], torch.Tensor],
    count: Callable[[int], None],
    ranks: Ranks,
) -> Iterator[tuple[range, torch.Tensor]]:
    """Yield every batch on the first rank; each rank draws one of `num_ranks` batches at a time.

    Args:
        missing: the image ids of each batch.
        draw: (ids, function to call after every step) → uint8 images.
        count: adds to the number of images that all ranks have evaluated.
        ranks: the processes that draw.
    """
    for start in range(0, len(missing), ranks.num_ranks):
        together = missing[start : start + ranks.num_ranks]
        on_step = partial(count, sum(map(len, together)))
        own = draw(together[ranks.rank], on_step) if ranks.rank < len(together) else None
        yield from zip(together, ranks.gather(own), strict=False)


def _name(ids: range) -> str:
    return f"{ids.start:08d}-{ids.stop:08d}"


def _draw_batch(
    params: Params,
    network: Denoiser,
    num_classes: int,
    seed: int,
    compute: Compute,
    size: int | None,
    ids: range,
    on_step: Callable[[], None],
) -> torch.Tensor:
    """Draw the images `ids`, uint8 (B, H, W, C); with `size`, a smaller batch is padded to this size."""
    (height, width, channels), process = params.dataset.shape, params.diffusion
    filled = range(ids.start, ids.start + (size or len(ids)))
    labels = None
    if params.model.class_conditional:
        labels = torch.tensor([i % num_classes for i in filled], device=compute.device)
    with compute.context():
        drawn = sample(
            on_images(network, params.model.patch_size, params.grid, labels),
            Diffusion(process.num_timesteps, process.schedule, process.prediction, compute.device),
            params.sampling,
            (channels, height, width),
            seed,
            filled,
            compute.device,
            on_step,
        )
    return to_uint8(drawn).cpu()[: len(ids)]
