"""Stage `sample`: images from the averaged weights of every milestone."""

from __future__ import annotations

import numpy as np

from maskdm import device, paths
from maskdm.checkpoint import file_sha256
from maskdm.config import Params
from maskdm.data.grids import save_grid
from maskdm.drawing import draw_images, load_model
from maskdm.publishing import publish_folder, publish_json
from maskdm.stages import finetune
from maskdm.stages.inputs import open_data, read_json, require, with_chosen_values
from maskdm.stages.session import stage_session
from maskdm.tracking import publish_arm

INFO = "samples.json"


def run(params: Params, arm: str, seed: int) -> None:
    """Sample every milestone of an arm into results/samples/ARM/seed-SEED: an array and a PNG grid each.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    params = with_chosen_values(params, arm)
    compute = device.resolve(params.compute)
    weights = require(paths.finetune(arm, seed), "finetune", arm, seed)
    milestones = read_json(weights / finetune.MILESTONES, "finetune")
    num_classes, num_samples = open_data(params).num_classes, params.sampling.num_samples
    with stage_session(params, "sample", arm, seed) as (tracked, record):
        with publish_folder(paths.samples(arm, seed)) as folder:
            hashes = {}
            for key in milestones:
                name = finetune.milestone_name(float(key))
                file = weights / finetune.milestone_file(float(key))
                model, title = load_model(params, file, num_classes, compute), f"sample {arm} at {float(key):.0%}"
                drawn = draw_images(params, model, num_classes, seed, num_samples, compute, title)
                np.save(folder / f"{name}.npy", drawn)
                save_grid(drawn[: params.sampling.grid_images], folder / f"{name}.png")
                hashes[key] = file_sha256(file)
            info = {**params.sampling.model_dump(), "weights_sha256": hashes}
            publish_json(folder / INFO, info)
        record.update(compute.describe(training=False), num_images=num_samples * len(milestones))
        for key in milestones:
            tracked.figure(paths.samples(arm, seed) / f"{finetune.milestone_name(float(key))}.png")
    publish_arm(params, arm, seed, through="sample")
