"""Stage `evaluate`: score the samples of every milestone against the real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskdm import device, paths
from maskdm.checkpoint import file_sha256
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.evaluation import check_counts, compute_metrics
from maskdm.extractors import FeatureExtractor
from maskdm.publishing import publish_json
from maskdm.stages import features, finetune, sample
from maskdm.stages.inputs import open_data, read_array, read_json, require
from maskdm.stages.session import stage_session
from maskdm.tracking import publish_arm


def run(params: Params, arm: str, seed: int) -> None:
    """Score an arm into results/metrics/ARM-seed-SEED.json.

    Raises:
        UserError: samples or features are missing, do not belong together, or are too few.
    """
    compute, images = device.resolve(params.compute), open_data(params)
    samples = require(paths.samples(arm, seed), "sample", arm, seed)
    reference = require(paths.FEATURES, "features")
    weights = require(paths.finetune(arm, seed), "finetune", arm, seed)
    milestones = read_json(weights / finetune.MILESTONES, "finetune")
    info = read_json(reference / features.INFO_FILE, "features")
    real = read_array(reference / features.REFERENCE_FILE, "features")
    _check_origins(params, arm, seed, images.sha256, info)
    extractor = _open_same_extractor(params, reference, compute, info)
    check_counts(params.sampling.num_samples, len(real), params.evaluation)
    with stage_session(params, "evaluate", arm, seed) as (tracked, record):
        for key, milestone in milestones.items():
            name = finetune.milestone_name(float(key))
            milestone.update(
                _score(params, samples / f"{name}.npy", extractor, real, f"score {arm} at {float(key):.0%}")
            )
            tracked.log(round(100 * float(key)), **{k: v for k, v in milestone.items() if k != "step"})
        metrics = {
            **_about(params, arm, seed, images.sha256, info),
            **_final(milestones),
            "milestones": milestones,
        }
        publish_json(paths.metrics(arm, seed), metrics)
        record.update(compute.describe_device())
    publish_arm(params, arm, seed)


def _check_origins(params: Params, arm: str, seed: int, data_sha256: str, info: dict[str, Any]) -> None:
    """Features must be of these data, and samples of these weights; the engines see to it, hands may not."""
    if info["data_sha256"] != data_sha256:
        raise UserError("results/features was made from other data than results/data; run first: maskdm features")
    drawn = read_json(paths.samples(arm, seed) / sample.INFO, "sample")["weights_sha256"]
    weights = paths.finetune(arm, seed)
    for fraction in params.budget.milestones:
        key = f"{fraction:.3f}"
        if drawn.get(key) != file_sha256(weights / finetune.milestone_file(fraction)):
            raise UserError(
                f"{paths.samples(arm, seed)} was not drawn from the weights in {weights} at {key}; "
                f"run first: maskdm sample --arm {arm} --seed {seed}"
            )


def _score(params: Params, file: Path, extractor: FeatureExtractor, real: np.ndarray, title: str) -> dict[str, float]:
    images = read_array(file, "sample")
    drawn = extractor.features(images, params.evaluation.batch_size, title)
    return compute_metrics(drawn, real, params.evaluation).as_dict()


def _open_same_extractor(
    params: Params, reference: Path, compute: device.Compute, info: dict[str, Any]
) -> FeatureExtractor:
    """The extractor that made the reference: features of two extractors must never be compared."""
    wanted: str = params.evaluation.features
    if info["extractor"].split("/")[0] == wanted:
        extractor = features.open_extractor(params, reference, compute)
        if extractor.sha256 == info["extractor_sha256"]:
            return extractor
        wanted = f"{extractor.name} ({extractor.sha256[:12]})"
    raise UserError(
        f"results/features was made with {info['extractor']} ({info['extractor_sha256'][:12]}), but params.yaml "
        f"names {wanted}; run first: maskdm features"
    )


def _about(params: Params, arm: str, seed: int, data_sha256: str, info: dict[str, Any]) -> dict[str, Any]:
    """What the numbers are of, and the scale beside them."""
    config = params.arm(arm)
    return {
        "arm": arm,
        "seed": seed,
        "strategy": config.strategy,
        "mask_rate": config.mask_rate,
        "block_size": config.block_size,
        "realised_mask_rate": params.visible_of(arm).realised_mask_rate(params.grid),
        "data_sha256": data_sha256,
        **{k: info[k] for k in ("extractor", "extractor_sha256", "fid_floor", "kid_floor", "floor_num_samples")},
    }


def _final(milestones: dict[str, dict[str, float]]) -> dict[str, float]:
    last = milestones[max(milestones, key=float)]
    return {k: last[k] for k in ("fid", "kid", "kid_std", "precision", "recall", "num_samples", "flops")}
