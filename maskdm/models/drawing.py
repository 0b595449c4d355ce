"""Images from averaged weights: what the stage `sample`, the trials and the logged models draw with."""

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
from maskdm.config.architecture import architecture_of
from maskdm.data.batches import to_uint8
from maskdm.method.backbones.building import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import Denoiser, Diffusion
from maskdm.method.sampling import batches_of, on_images, sample
from maskdm.training import devices
from maskdm.training.devices import Compute
from maskdm.training.ranks import ALONE, Ranks
from maskdm.training.state import Pieces


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
    model: nn.Module,
    num_classes: int,
    seed: int,
    num_images: int,
    compute: Compute,
    title: str,
    kept: Pieces | None = None,
    ranks: Ranks = ALONE,
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
        kept: has the batches that a killed process has finished, and gets every new one; the first rank's.
        ranks: that draw a batch each at a time; how many they are changes no byte.

    Returns:
        uint8 (num_images, H, W, C); nothing on other ranks than the first.

    Raises:
        UserError: memory does not suffice, or a batch can't be kept.
    """
    config, network = params.sampling, compute.compiled(model)
    ids_of_batches = list(batches_of(num_images, config.batch_size))
    parts = {ids: images for ids in ids_of_batches if (images := _load(kept, ids)) is not None}
    count, close = _progress(num_images * config.num_steps, title, ranks)
    count(config.num_steps * sum(map(len, parts)))

    def draw(ids: range, num_drawn: int) -> torch.Tensor:
        filled = _filled_up(ids, min(config.batch_size, num_images)) if compute.compile_mode else ids
        on_step = partial(count, num_drawn)
        return _draw_batch(params, network, num_classes, seed, filled, compute, on_step)[: len(ids)]

    missing = ranks.shared([ids for ids in ids_of_batches if ids not in parts])
    advice = f"{title}: batches of {config.batch_size} images did not fit; lower sampling.batch_size"
    with devices.explain_out_of_memory(advice), devices.explain_compiler():
        for ids, images in _drawn(missing, draw, _image_shape(params), ranks):
            parts[ids] = images
            if kept is not None:
                kept.save(_name(ids), {"images": images}, {})
    close()
    nothing = torch.empty(0, *_image_shape(params), dtype=torch.uint8)
    return torch.cat([nothing, *(parts[ids] for ids in ids_of_batches if ids in parts)]).numpy()


def _drawn(
    missing: list[range], draw: Callable[[range, int], torch.Tensor], image_shape: tuple[int, int, int], ranks: Ranks
) -> Iterator[tuple[range, torch.Tensor]]:
    """Batch after batch, on the first rank; every rank draws one of as many as there are ranks.

    Args:
        missing: ids of the batches.
        draw: (ids, number of images that all ranks draw meanwhile) → uint8 images.
        image_shape: (H, W, C).
        ranks: that draw.
    """
    for start in range(0, len(missing), ranks.num_ranks):
        together = missing[start : start + ranks.num_ranks]
        own = draw(together[ranks.rank], sum(map(len, together))) if ranks.rank < len(together) else None
        yield from zip(together, ranks.collected(own), strict=False)


def _progress(total: int, title: str, ranks: Ranks) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Counts evaluations and closes the display, which the first rank alone has."""
    if not ranks.is_first:
        return lambda _: None, lambda: None
    bar = Progress(total, title, "evaluations")
    return bar.update, bar.close


def _load(kept: Pieces | None, ids: range) -> torch.Tensor | None:
    """The images of a batch that was finished before."""
    piece = None if kept is None else kept.load(_name(ids))
    return None if piece is None else piece[0]["images"]


def _name(ids: range) -> str:
    return f"{ids.start:08d}-{ids.stop:08d}"


def _image_shape(params: Params) -> tuple[int, int, int]:
    return params.dataset.shape


def _filled_up(ids: range, batch_size: int) -> range:
    """The ids of a last, smaller batch and of images after it: another shape would be compiled anew."""
    return range(ids.start, ids.start + batch_size)


def _draw_batch(
    params: Params,
    network: Denoiser,
    num_classes: int,
    seed: int,
    ids: range,
    compute: Compute,
    on_step: Callable[[], None],
) -> torch.Tensor:
    (height, width, channels), process = params.dataset.shape, params.diffusion
    labels = _labels(params, ids, num_classes, compute.device)
    with compute.context():
        drawn = sample(
            on_images(network, params.model.patch_size, params.grid, labels),
            Diffusion(process.num_timesteps, process.schedule, process.prediction, compute.device),
            params.sampling,
            (channels, height, width),
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
