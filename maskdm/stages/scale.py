"""Stage `scale`: the ends of each metric's scale: real images scored as samples, and the untrained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskdm.base import rng
from maskdm.data.inputs import open_data
from maskdm.method.backbones import build_model
from maskdm.models.drawing import draw_images
from maskdm.scoring import points
from maskdm.scoring.scorer import Scorer
from maskdm.scoring.scores import floor_metrics
from maskdm.stages.runner import Task
from maskdm.training import devices

SEED = 0  # of the untrained network, for the arms of all seeds


def run(task: Task, _: Path) -> dict[str, Any]:
    """Score both, with as many samples as the arms have; the content of results/metrics/scale.json.

    Raises:
        UserError: too few samples are asked for, or memory does not suffice.
    """
    params, compute = task.params, devices.resolve(task.params.compute)
    images, scorer = open_data(params), Scorer(params, compute)
    model = build_model(params, images.num_classes)
    model.initialise(rng.generator(SEED, "init"))
    model.eval().to(compute.device)
    num_samples = params.sampling.num_samples
    drawn = draw_images(params, model, images.num_classes, SEED, num_samples, compute, "sample untrained")
    scale = {
        "floor": floor_metrics(scorer.real, num_samples, params.evaluation).as_dict(),
        "untrained": scorer.score(drawn, "score untrained").as_dict(),
        **points.scale_of(params, drawn, scorer.real),
        **scorer.origin,
    }
    task.record.update(compute.describe())
    return scale
