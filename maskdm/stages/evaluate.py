"""Stage `evaluate`: score the samples of every milestone against the real images."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskdm import device, paths
from maskdm.checksums import file_sha256
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.publishing import publish_json
from maskdm.resume import Pieces
from maskdm.stages import finetune, sample
from maskdm.stages.inputs import open_data, read_array, read_json, require, with_chosen_values
from maskdm.stages.scoring import Scorer
from maskdm.stages.session import stage_session
from maskdm.tracking import publish_arm


def run(params: Params, arm: str, seed: int) -> None:
    """Score an arm into results/metrics/ARM-seed-SEED.json.

    Raises:
        UserError: samples or features are missing, do not belong together, or are too few.
    """
    params = with_chosen_values(params, arm)
    compute, images = device.resolve(params.compute), open_data(params)
    samples = require(paths.samples(arm, seed), "sample", arm, seed)
    weights = require(paths.finetune(arm, seed), "finetune", arm, seed)
    milestones = read_json(weights / finetune.MILESTONES, "finetune")
    scorer = Scorer(params, compute, images.sha256)
    scale = _read_scale(scorer)
    hashes = _check_samples(list(milestones), arm, seed)
    files = {key: samples / f"{finetune.milestone_name(float(key))}.npy" for key in milestones}
    drawn = {key: read_array(file, "sample", hashes[key]) for key, file in files.items()}
    made_with = {**read_json(weights / finetune.RUN, "finetune"), "scored_with": params.scored_with}
    about = {**_about(params, arm, seed), **made_with, **scorer.origin, **scale}
    inputs = {
        "about": about,
        "evaluation": params.evaluation,
        "compute": params.compute,
        "milestones": milestones,
        "samples_sha256": hashes,
        "reference_sha256": scorer.reference_sha256,
    }
    output = paths.metrics(arm, seed)
    with stage_session(params, "evaluate", arm, seed, inputs=inputs, output=output) as session:
        if session.is_to_do:
            kept = Pieces(session.folder)
            for key, milestone in milestones.items():
                title = f"score {arm} at {float(key):.0%}"
                milestone.update(_score(scorer, drawn[key], title, kept, files[key].stem))
                session.tracked.log(round(100 * float(key)), **{k: v for k, v in milestone.items() if k != "step"})
            publish_json(output, {**about, **_final(milestones), "milestones": milestones})
            session.record.update(compute.describe_device())
    publish_arm(params, arm, seed)


def _score(scorer: Scorer, drawn: np.ndarray, title: str, kept: Pieces, name: str) -> dict[str, float]:
    """The scores of a milestone; those that a killed process has kept are not computed again."""
    if (piece := kept.load(name)) is not None:
        return dict(piece[1]["scores"])
    scores = scorer.score(drawn, title).as_dict()
    kept.save(name, {}, {"scores": scores})
    return scores


def _check_samples(milestones: list[str], arm: str, seed: int) -> dict[str, str]:
    """Samples must be of these weights; the engines see to it, hands may not. Their files' sha256 by milestone."""
    info = read_json(paths.samples(arm, seed) / sample.INFO, "sample")
    drawn = info["weights_sha256"]
    weights = paths.finetune(arm, seed)
    for key in milestones:
        file = require(weights / finetune.milestone_file(float(key)), "finetune", arm, seed)
        if drawn.get(key) != file_sha256(file):
            raise UserError(
                f"{paths.samples(arm, seed)} was not drawn from the weights in {weights} at {key}; "
                f"run first: maskdm sample --arm {arm} --seed {seed}"
            )
    return dict(info["samples_sha256"])


def _read_scale(scorer: Scorer) -> dict[str, float]:
    """The scale that stands beside the arm's scores."""
    scale = read_json(require(paths.SCALE, "scale"), "scale")
    if any(scale[key] != value for key, value in scorer.origin.items()):
        raise UserError(f"{paths.SCALE} is of other data or another extractor; run first: maskdm scale")
    floor, untrained = scale["floor"], scale["untrained"]
    return {
        "fid_floor": floor["fid"],
        "kid_floor": floor["kid"],
        "floor_num_samples": floor["num_samples"],
        "fid_untrained": untrained["fid"],
        "kid_untrained": untrained["kid"],
    }


def _about(params: Params, arm: str, seed: int) -> dict[str, Any]:
    """What the numbers are of."""
    config = params.arm(arm)
    return {
        "arm": arm,
        "seed": seed,
        "strategy": config.strategy,
        "mask_rate": config.mask_rate,
        "block_size": config.block_size,
        "realised_mask_rate": params.visible_of(arm).realised_mask_rate(params.grid),
    }


def _final(milestones: dict[str, dict[str, float]]) -> dict[str, float]:
    last = milestones[max(milestones, key=float)]
    return {k: last[k] for k in ("fid", "kid", "kid_std", "precision", "recall", "num_samples", "flops")}
