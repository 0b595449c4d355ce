"""Stage `evaluate`: the scores of every milestone's samples, and the primer's, against the real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskdm.config import Run, paths
from maskdm.data.inputs import read_array, read_json
from maskdm.scoring import points
from maskdm.scoring.headline import SCORE_KEYS, scale_scores
from maskdm.scoring.scorer import Scorer
from maskdm.stages import sample
from maskdm.stages.runner import Task
from maskdm.stages.sample import PRIMERS, name_of, title_of
from maskdm.training import devices
from maskdm.training.state import Pieces


def run(task: Task, _: Path) -> dict[str, Any]:
    """Score an arm; the content of its file in results/metrics.

    Raises:
        UserError: samples or features are damaged, or there are too few.
    """
    arm, samples = task.run, paths.samples(task.run.arm, task.run.seed)
    compute = devices.resolve(arm.params.compute)
    scorer, kept = Scorer(arm.params, compute), Pieces(task.work)
    spent = read_json(paths.finetune(arm.arm, arm.seed) / paths.MILESTONES, "finetune")
    spent |= {key: {"step": arm.pretrain.num_steps, **arm.finetune.before.as_dict()} for key in PRIMERS}
    scored = {}
    for key, sha256 in read_json(samples / sample.INFO, "sample")["samples_sha256"].items():
        drawn = read_array(samples / f"{name_of(key)}.npy", "sample", sha256)
        scored[key] = {**spent[key], **_score(arm, scorer, drawn, kept, key)}
    task.record.update(compute.describe_device())
    primers = {key: scored.pop(key) for key in PRIMERS if key in scored}
    last, scale = scored[max(scored, key=float)], read_json(paths.SCALE, "scale")
    return {
        "arm": arm.arm,
        "seed": arm.seed,
        **arm.mask,
        "realised_mask_rate": arm.pretrain.realised_mask_rate,
        "flip": arm.params.training.flip,
        **scorer.origin,
        **scale_scores(scale),
        "floor_num_samples": scale["floor"]["num_samples"],
        **{key: last[key] for key in (*SCORE_KEYS, "flops")},
        "milestones": scored,
        **primers,
    }


def _score(run: Run, scorer: Scorer, drawn: np.ndarray, kept: Pieces, key: str) -> dict[str, Any]:
    """The scores of a milestone; kept at once, so that an interrupted stage does not compute them again."""
    if (piece := kept.load(name_of(key))) is not None:
        return dict(piece[1]["scores"])
    scores: dict[str, Any] = scorer.score(drawn, f"score {run.arm} at {title_of(key)}").as_dict()
    if points.apply_to(run.params):
        scores["distances"] = points.distances(points.points_of(drawn), scorer.real)
    kept.save(name_of(key), {}, {"scores": scores})
    return scores
