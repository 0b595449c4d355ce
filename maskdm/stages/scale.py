"""Stage `scale`: the two ends of the metrics: real images against real ones, and the network before any training."""

from __future__ import annotations

from typing import Any

from maskdm import device, distances, paths, rng
from maskdm.architecture import architecture_of
from maskdm.compute import build_model
from maskdm.config import Params
from maskdm.data.arrays import ImageArrays
from maskdm.drawing import draw_images
from maskdm.evaluation import floor_metrics
from maskdm.publishing import publish_description
from maskdm.stages.inputs import open_data
from maskdm.stages.scoring import Scorer
from maskdm.stages.session import stage_session

ENDS = ("floor", "untrained")
SEED = 0  # of the untrained network: a scale for all seeds


def run(params: Params) -> None:
    """Score both into results/metrics/scale.json, at the arms' number of samples.

    Raises:
        UserError: results/features is missing or does not fit.
    """
    compute, images = device.resolve(params.compute), open_data(params)
    scorer = Scorer(params, compute, images.sha256)
    inputs = {
        "architecture": architecture_of(params, images.num_classes),
        "sampling": params.sampling,
        "evaluation": params.evaluation,
        "compute": params.compute,
        "features": {**scorer.origin, "reference_sha256": scorer.reference_sha256},
    }
    with stage_session(params, "scale", inputs=inputs, output=paths.SCALE) as session:
        if session.is_to_do:
            scale = _measure(params, images, scorer, compute)
            publish_description(paths.SCALE, scale)
            session.record.update(compute.describe())
            session.tracked.log(
                0, **{f"{metric}_{end}": scale[end][metric] for end in ENDS for metric in ("fid", "kid")}
            )


def _measure(params: Params, images: ImageArrays, scorer: Scorer, compute: device.Compute) -> dict[str, Any]:
    """Both ends, and what they are of."""
    model = build_model(params, images.num_classes)
    model.initialise(rng.generator(SEED, "init"))
    model.eval().to(compute.device)
    num_samples = params.sampling.num_samples
    drawn = draw_images(params, model, images.num_classes, SEED, num_samples, compute, "sample untrained")
    floor = floor_metrics(scorer.real, num_samples, params.evaluation)
    untrained = scorer.score(drawn, "score untrained")
    return {
        "floor": floor.as_dict(),
        "untrained": untrained.as_dict(),
        **distances.scale_of(params, drawn, scorer.real),
        **scorer.origin,
    }
