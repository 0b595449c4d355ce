"""Stage `sample`: images from the averaged weights of every milestone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from maskdm import device, paths
from maskdm.checkpoint import architecture_of
from maskdm.checksums import file_sha256
from maskdm.config import Params
from maskdm.data.grids import save_grid
from maskdm.drawing import draw_images, load_model
from maskdm.parallel import Ranks
from maskdm.publishing import publish_description, publish_folder
from maskdm.resume import Pieces
from maskdm.stages import finetune
from maskdm.stages.inputs import open_data, read_json, require, with_chosen_values
from maskdm.stages.joint import joint_session
from maskdm.tracking import publish_arm

INFO = "samples.json"


def run(params: Params, arm: str, seed: int) -> None:
    """Sample every milestone of an arm into results/samples/ARM/seed-SEED: an array and a PNG grid each.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    params = with_chosen_values(params, arm)
    compute = device.resolve(params.compute, params.training.devices)
    weights = require(paths.finetune(arm, seed), "finetune", arm, seed)
    milestones = read_json(weights / finetune.MILESTONES, "finetune")
    num_classes, output = open_data(params).num_classes, paths.samples(arm, seed)
    files = {key: weights / finetune.milestone_file(float(key)) for key in milestones}
    hashes = {key: file_sha256(require(file, "finetune", arm, seed)) for key, file in files.items()}
    inputs = {
        "architecture": architecture_of(params, num_classes),
        "sampling": params.sampling,
        "compute": params.compute,
        "seed": seed,
        "weights_sha256": hashes,
    }
    is_shared = params.sampling.num_samples > params.sampling.batch_size
    with joint_session(params, "sample", arm, seed, inputs=inputs, output=output, is_shared=is_shared) as (
        session,
        ranks,
    ):
        draw = partial(_draw, params, arm, seed, num_classes, compute, ranks)
        if not ranks.is_first:
            for key, file in files.items():
                draw(float(key), file)
        elif session.is_to_do:
            with publish_folder(output) as folder:
                samples = {}
                for key, file in files.items():
                    name = finetune.milestone_name(float(key))
                    images = draw(float(key), file, Pieces(session.folder / name))
                    samples[key] = _write(params, images, folder, name)
                info = {**params.sampling.model_dump(), "weights_sha256": hashes, "samples_sha256": samples}
                publish_description(folder / INFO, info)
            num_images = params.sampling.num_samples * len(milestones)
            session.record.update(compute.describe(), num_images=num_images, devices=ranks.num_ranks)
            for key in milestones:
                session.tracked.figure(output / f"{finetune.milestone_name(float(key))}.png")
    publish_arm(params, arm, seed, through="sample")


def _draw(
    params: Params,
    arm: str,
    seed: int,
    num_classes: int,
    compute: device.Compute,
    ranks: Ranks,
    fraction: float,
    weights: Path,
    kept: Pieces | None = None,
) -> np.ndarray:
    """A milestone's samples, on the first rank."""
    model, title = load_model(params, weights, num_classes, compute), f"sample {arm} at {fraction:.0%}"
    return draw_images(params, model, num_classes, seed, params.sampling.num_samples, compute, title, kept, ranks)


def _write(params: Params, images: np.ndarray, folder: Path, name: str) -> str:
    """Write samples and a grid of some of them; the sha256 of the former."""
    np.save(folder / f"{name}.npy", images)
    save_grid(images[: params.sampling.grid_images], folder / f"{name}.png")
    return file_sha256(folder / f"{name}.npy")
