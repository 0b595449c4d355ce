"""Stage `sample`: images from the averaged weights of every milestone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from maskdm import device, paths
from maskdm.backbone import UViT
from maskdm.checkpoint import architecture_of, file_sha256, load_into, load_weights
from maskdm.compute import build_model
from maskdm.config import Params
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import to_uint8
from maskdm.data.grids import save_grid
from maskdm.device import Compute
from maskdm.diffusion import Diffusion
from maskdm.progress import Progress
from maskdm.publishing import publish_folder, publish_json
from maskdm.sampling import batches_of, on_images, sample
from maskdm.stages import finetune
from maskdm.stages.inputs import open_data, read_json, require
from maskdm.stages.session import stage_session
from maskdm.tracking import publish_arm

INFO = "samples.json"


def run(params: Params, arm: str, seed: int) -> None:
    """Sample every milestone of an arm into results/samples/ARM/seed-SEED: an array and a PNG grid each.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    compute = device.resolve(params.compute)
    weights = require(paths.finetune(arm, seed), "finetune", arm, seed)
    milestones = read_json(weights / finetune.MILESTONES, "finetune")
    images = open_data(params)
    with stage_session(params, "sample", arm, seed) as (tracked, record):
        with publish_folder(paths.samples(arm, seed)) as folder:
            hashes = {}
            for key in milestones:
                name = finetune.milestone_name(float(key))
                file = weights / finetune.milestone_file(float(key))
                drawn = draw_samples(params, file, seed, images, compute, f"sample {arm} at {float(key):.0%}")
                np.save(folder / f"{name}.npy", drawn)
                save_grid(drawn[: params.sampling.grid_images], folder / f"{name}.png")
                hashes[key] = file_sha256(file)
            info = {**params.sampling.model_dump(), "weights_sha256": hashes}
            publish_json(folder / INFO, info)
        record.update(compute.describe(training=False), num_images=params.sampling.num_samples * len(milestones))
        for key in milestones:
            tracked.figure(paths.samples(arm, seed) / f"{finetune.milestone_name(float(key))}.png")
    publish_arm(params, arm, seed, through="sample")


def draw_samples(
    params: Params, weights: Path, seed: int, images: ImageArrays, compute: Compute, title: str
) -> np.ndarray:
    """Draw `sampling.num_samples` images from the averaged weights of a checkpoint.

    Args:
        params: the experiment.
        weights: a file of the finetune stage.
        seed: image i depends on (seed, i).
        images: the dataset, for the shape and the classes.
        compute: device and precision.
        title: for the progress display.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        UserError: the weights do not fit.
    """
    config = params.sampling
    model = _load_model(params, weights, images.num_classes, compute)
    diffusion = Diffusion(
        params.diffusion.num_timesteps, params.diffusion.schedule, params.diffusion.prediction, compute.device
    )
    height, width, channels = images.shape
    bar = Progress(config.num_samples * config.num_steps, title, "evaluations")
    parts = []
    for ids in batches_of(config.num_samples, config.batch_size):
        labels = _labels(params, ids, images.num_classes, compute.device)
        with compute.context(training=False):
            drawn = sample(
                on_images(model, params.model.patch_size, params.grid, labels),
                diffusion,
                config,
                (channels, height, width),
                seed,
                ids,
                compute.device,
                on_step=partial(bar.update, len(ids)),
            )
        parts.append(to_uint8(drawn).cpu().numpy())
    bar.close()
    return np.concatenate(parts)


def _load_model(params: Params, weights: Path, num_classes: int, compute: Compute) -> UViT:
    state, _ = load_weights(weights, "ema", architecture_of(params, num_classes))
    model = build_model(params, num_classes)
    load_into(model, state, weights)
    return model.eval().to(compute.device)


def _labels(params: Params, ids: range, num_classes: int, device: torch.device) -> torch.Tensor | None:
    """Every class in turn, of a class-conditional model."""
    if not params.model.class_conditional:
        return None
    return torch.tensor([i % num_classes for i in ids], device=device)
