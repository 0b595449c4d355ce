"""Stage `evaluate`: score the samples of every milestone, and of the primer, against the real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskdm.config import Run, paths
from maskdm.data.inputs import read_array, read_json
from maskdm.scoring import points
from maskdm.scoring.headline import flat_scores
from maskdm.stages import sample
from maskdm.stages.runner import Task
from maskdm.stages.sample import PRIMERS, name_of, title_of
from maskdm.stages.scoring import Scorer
from maskdm.tracking import publish_arm
from maskdm.training import devices
from maskdm.training.state import Pieces


def run(task: Task, _: Path) -> dict[str, Any]:
    """Score an arm.

    Raises:
        UserError: samples or features are damaged, or too few.
    """
    arm, samples = task.run, paths.samples(task.run.arm, task.run.seed)
    compute = devices.resolve(arm.params.compute)
    scorer, kept = Scorer(arm.params, compute), Pieces(task.work)
    scored = {}
    for key, sha256 in read_json(samples / sample.INFO, "sample")["samples_sha256"].items():
        drawn = read_array(samples / f"{name_of(key)}.npy", "sample", sha256)
        scored[key] = {**_spent(arm, key), **_score(arm, scorer, drawn, kept, key)}
        if key not in PRIMERS:
            flat = flat_scores(scored[key])
            task.tracked.log(round(100 * float(key)), **{k: v for k, v in flat.items() if k != "step"})
    task.record.update(compute.describe_device())
    primers = {key: scored.pop(key) for key in PRIMERS if key in scored}
    return {**_about(arm), **scorer.origin, **_scale(), **_final(scored), "milestones": scored, **primers}


def after(task: Task) -> None:
    """Bring the arm's run in MLflow up to date."""
    publish_arm(task.run, through="evaluate")


def _spent(run: Run, key: str) -> dict[str, Any]:
    """The step of a milestone or of a primer, and the compute spent by then."""
    if key not in PRIMERS:
        milestones = read_json(paths.finetune(run.arm, run.seed) / paths.MILESTONES, "finetune")
        return dict(milestones[key])
    return {"step": run.pretrain.num_steps, **run.finetune.before.as_dict()}


def _score(run: Run, scorer: Scorer, drawn: np.ndarray, kept: Pieces, key: str) -> dict[str, Any]:
    """The scores of a milestone; those that a killed process has kept are not computed again."""
    if (piece := kept.load(name_of(key))) is not None:
        return dict(piece[1]["scores"])
    scores: dict[str, Any] = scorer.score(drawn, f"score {run.arm} at {title_of(key)}").as_dict()
    if points.apply_to(run.params):
        scores["distances"] = points.distances(points.points_of(drawn), scorer.real)
    kept.save(name_of(key), {}, {"scores": scores})
    return scores


def _scale() -> dict[str, float]:
    """The scale that stands beside the arm's scores."""
    scale = read_json(paths.SCALE, "scale")
    floor, untrained = scale["floor"], scale["untrained"]
    return {
        "fid_floor": floor["fid"],
        "kid_floor": floor["kid"],
        "floor_num_samples": floor["num_samples"],
        "fid_untrained": untrained["fid"],
        "kid_untrained": untrained["kid"],
    }


def _about(run: Run) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "arm": run.arm,
        "seed": run.seed,
        **run.mask,
        "realised_mask_rate": run.pretrain.realised_mask_rate,
        "flip": run.params.training.flip,
    }


def _final(milestones: dict[str, dict[str, Any]]) -> dict[str, float]:
    last = milestones[max(milestones, key=float)]
    return {k: last[k] for k in ("fid", "kid", "kid_std", "precision", "recall", "num_samples", "flops")}
