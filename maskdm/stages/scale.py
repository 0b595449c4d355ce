"""Stage `scale`: the two ends of the metrics: real images against real ones, and the network before any training."""

from __future__ import annotations

from maskdm import device, paths, rng
from maskdm.compute import build_model
from maskdm.config import Params
from maskdm.drawing import draw_images
from maskdm.evaluation import floor_metrics
from maskdm.publishing import publish_json
from maskdm.stages.inputs import open_data
from maskdm.stages.scoring import Scorer
from maskdm.stages.session import stage_session

SEED = 0  # of the untrained network: a scale for all seeds


def run(params: Params) -> None:
    """Score both into results/metrics/scale.json, at the arms' number of samples.

    Raises:
        UserError: results/features is missing or does not fit.
    """
    compute, images = device.resolve(params.compute), open_data(params)
    scorer = Scorer(params, compute, images.sha256)
    with stage_session(params, "scale") as (tracked, record):
        model = build_model(params, images.num_classes)
        model.initialise(rng.generator(SEED, "init"))
        model.eval().to(compute.device)
        drawn = draw_images(
            params, model, images.num_classes, SEED, params.sampling.num_samples, compute, "sample untrained"
        )
        floor = floor_metrics(scorer.real, params.sampling.num_samples, params.evaluation)
        untrained = scorer.score(drawn, "score untrained")
        scale = {"floor": floor.as_dict(), "untrained": untrained.as_dict(), **scorer.origin}
        publish_json(paths.SCALE, scale)
        record.update(compute.describe(training=False))
        tracked.log(
            0, fid_floor=floor.fid, kid_floor=floor.kid, fid_untrained=untrained.fid, kid_untrained=untrained.kid
        )
