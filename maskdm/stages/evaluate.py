"""Stage `evaluate`: score the samples of every milestone, and of the primer, against the real images."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskdm import device, distances, paths
from maskdm.checksums import file_sha256
from maskdm.compute import plan_arm
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.headline import flat_scores
from maskdm.publishing import publish_json
from maskdm.resume import Pieces
from maskdm.stages import finetune, sample
from maskdm.stages.inputs import open_data, read_array, read_json, require, with_chosen_values
from maskdm.stages.sample import PRIMERS, name_of, title_of, weights_of
from maskdm.stages.scoring import Scorer
from maskdm.stages.session import stage_session
from maskdm.stages.training import Spent
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
    scorer = Scorer(params, compute, images.sha256)
    scale = _read_scale(scorer)
    hashes = _check_samples(params, arm, seed)
    drawn = {key: read_array(samples / f"{name_of(key)}.npy", "sample", hashes[key]) for key in hashes}
    made_with = {**read_json(weights / finetune.RUN, "finetune"), "scored_with": params.scored_with}
    about = {**_about(params, arm, seed), **made_with, **scorer.origin, **scale}
    scored = {key: _spent(params, arm, seed, key) for key in drawn}
    inputs = {
        "about": about,
        "evaluation": params.evaluation,
        "compute": params.compute,
        "milestones": scored,
        "samples_sha256": hashes,
        "reference_sha256": scorer.reference_sha256,
    }
    output = paths.metrics(arm, seed)
    with stage_session(params, "evaluate", arm, seed, inputs=inputs, output=output) as session:
        if session.is_to_do:
            kept = Pieces(session.folder)
            for key, found in scored.items():
                title = f"score {arm} at {title_of(key)}"
                found.update(_score(params, scorer, drawn[key], title, kept, name_of(key)))
                if key not in PRIMERS:
                    flat = flat_scores(found)
                    session.tracked.log(round(100 * float(key)), **{k: v for k, v in flat.items() if k != "step"})
            primers = {key: scored.pop(key) for key in PRIMERS if key in scored}
            publish_json(output, {**about, **_final(scored), "milestones": scored, **primers})
            session.record.update(compute.describe_device())
    publish_arm(params, arm, seed)


def _spent(params: Params, arm: str, seed: int, key: str) -> dict[str, Any]:
    """The step of a milestone or of a primer, and the compute spent by then."""
    if key not in PRIMERS:
        milestones: dict[str, Any] = read_json(paths.finetune(arm, seed) / finetune.MILESTONES, "finetune")
        return dict(milestones[key])
    plan = plan_arm(params, arm).pretrain
    return {"step": plan.num_steps, **Spent().after(plan.num_steps, plan).as_dict()}


def _score(params: Params, scorer: Scorer, drawn: np.ndarray, title: str, kept: Pieces, name: str) -> dict[str, Any]:
    """The scores of a milestone; those that a killed process has kept are not computed again."""
    if (piece := kept.load(name)) is not None:
        return dict(piece[1]["scores"])
    scores: dict[str, Any] = scorer.score(drawn, title).as_dict()
    if distances.apply_to(params):
        scores["distances"] = distances.distances(distances.points_of(drawn), scorer.real)
    kept.save(name, {}, {"scores": scores})
    return scores


def _check_samples(params: Params, arm: str, seed: int) -> dict[str, str]:
    """Samples must be of these weights, and drawn as params say; the engines see to it, hands may not.

    Returns:
        their files' sha256 by milestone.
    """
    info = read_json(paths.samples(arm, seed) / sample.INFO, "sample")
    asked = params.sampling.model_dump(mode="json")
    if any(info.get(key) != value for key, value in asked.items()):
        raise UserError(
            f"{paths.samples(arm, seed)} was drawn with other values of sampling than params.yaml has; "
            f"run first: maskdm sample --arm {arm} --seed {seed}"
        )
    for key, file in weights_of(params, arm, seed).items():
        if info["weights_sha256"].get(key) != file_sha256(file):
            raise UserError(
                f"{paths.samples(arm, seed)} was not drawn from the weights in {file.parent} at {title_of(key)}; "
                f"run first: maskdm sample --arm {arm} --seed {seed}"
            )
    return dict(info["samples_sha256"])


def _read_scale(scorer: Scorer) -> dict[str, float]:
    """The scale that stands beside the arm's scores."""
    scale = read_json(require(paths.SCALE, "scale"), "scale")
    if any(scale.get(key) != value for key, value in scorer.origin.items()):
        raise UserError(
            f"{paths.SCALE} is of other data, another extractor or another protocol; run first: maskdm scale"
        )
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
        "realised_mask_rate": params.realised_mask_rate_of(arm),
        "flip": params.training.flip,
    }


def _final(milestones: dict[str, dict[str, Any]]) -> dict[str, float]:
    last = milestones[max(milestones, key=float)]
    return {k: last[k] for k in ("fid", "kid", "kid_std", "precision", "recall", "num_samples", "flops")}
