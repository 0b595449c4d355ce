"""Distances between points, where images have two values: the table, its words, and the points that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm.config import Params, paths
from maskdm.report.files import UnusableError, open_images
from maskdm.report.numbers import number_text
from maskdm.report.results import Results, Run, milestone_key
from maskdm.report.statistics import Estimate, estimate
from maskdm.scoring import points
from maskdm.scoring.headline import DISTANCE, SLICED_WASSERSTEIN

PRIMERS = {"primer_alone": "primer, x and y each alone", "primer": "primer, x and y together"}
REAL, UNTRAINED = "real vs real", "untrained"
DIMENSIONS = 2
JOINT = SLICED_WASSERSTEIN.key.removeprefix(DISTANCE)  # the distance by which arms are compared
SCALE = SLICED_WASSERSTEIN.times  # distances are shown in thousandths of the coordinates' unit
NAMES = {"marginal_0": "W₁ of x", "marginal_1": "W₁ of y", JOINT: SLICED_WASSERSTEIN.name, "energy": "energy"}


@dataclass(frozen=True)
class Points:
    """Points of one panel.

    Attributes:
        title: what they are.
        values: (N, 2) in [−1, 1].
    """

    title: str
    values: np.ndarray


def are_shown(params: Params) -> bool:
    """Whether the report speaks of points: images of two values, compared as such."""
    return points.apply_to(params) and int(np.prod(params.dataset.shape)) == DIMENSIONS


def distance_frame(params: Params, results: Results) -> pd.DataFrame:
    """A row per arm, seed and milestone, the primers before them.

    Columns: arm, seed, milestone (0.500, or one of `PRIMERS`), flops, and every distance by its name.
    """
    rows = [
        {"arm": run.arm, "seed": run.seed, "milestone": key, "flops": float(scores["flops"]), **scores["distances"]}
        for run in results.runs
        for key, scores in _scored(params, run)
        if "distances" in scores
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "milestone", "flops", *NAMES])


def _scored(params: Params, run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in PRIMERS:
        if key in run.metrics:
            yield key, run.metrics[key]
    for key in map(milestone_key, params.budget.milestones):
        yield key, run.metrics["milestones"][key]


def floor_of(results: Results) -> dict[str, Any]:
    """What real points get in the place of samples: `mean` and `std` by distance."""
    return dict(results.scale["distances"]["floor"])


def distance_table(params: Params, results: Results) -> pd.DataFrame:
    """The distances of the primers and at the end of the budget, as text; empty where there are none."""
    if not are_shown(params) or (frame := distance_frame(params, results)).empty:
        return pd.DataFrame()
    last = milestone_key(params.budget.milestones[-1])
    groups = [(arm, key) for arm in params.arms for key in (*PRIMERS, last)]
    rows = [_row(frame, arm, key) for arm, key in groups if _at(frame, arm, key).size]
    return pd.DataFrame([*rows, *_scale_rows(results)]).fillna("–")


def _at(frame: pd.DataFrame, arm: str, key: str) -> pd.DataFrame:
    return frame[(frame["arm"] == arm) & (frame["milestone"] == key)]


def _row(frame: pd.DataFrame, arm: str, key: str) -> dict[str, str]:
    rows = _at(frame, arm, key)
    cells = {f"{title} ×1000": _cell(estimate(SCALE * rows[name].to_numpy())) for name, title in NAMES.items()}
    return {"arm": f"{arm}: {PRIMERS[key]}" if key in PRIMERS else arm, **cells}


def _cell(value: Estimate) -> str:
    text = number_text(value.mean)
    return f"{text} [{number_text(value.low)}, {number_text(value.high)}]" if value.has_interval else text


def milestones_of(frame: pd.DataFrame, arm: str) -> pd.DataFrame:
    """An arm's rows, without those of its primers."""
    return frame[(frame["arm"] == arm) & ~frame["milestone"].isin(list(PRIMERS))]


def _scale_rows(results: Results) -> list[dict[str, str]]:
    """Real points in the place of samples, and the network before any training."""
    ends = {REAL: floor_of(results)["mean"], UNTRAINED: results.scale["distances"]["untrained"]}
    return [
        {"arm": end, **{f"{title} ×1000": number_text(SCALE * of[name]) for name, title in NAMES.items()}}
        for end, of in ends.items()
    ]


def points_caution(params: Params) -> str:
    """What FID does not see of points, and what is shown instead; empty where images are no points."""
    if not points.apply_to(params):
        return ""
    return (
        "FID on so few values is the distance of two Gaussians with the points' means and covariances: it is blind to "
        "the shape that the points lie on. The answer and the verdicts on the arms go by sliced W₁ instead, the mean "
        "Wasserstein-1 distance over directions. It is above 0 for real points too: see real vs real."
    )


def distance_note(params: Params, results: Results) -> str:
    """What the table of distances is; empty where there is none."""
    if not are_shown(params):
        return ""
    floor = floor_of(results)
    splits = f"the mean of {floor['draws']} random splits, {floor['num_samples']:,} points in the place of samples"
    return (
        "W₁ of x and of y are Wasserstein-1 distances of one coordinate alone, sliced W₁ is the mean over directions, "
        "energy looks at all pairs of points: the first two see the marginals, the last two the joint distribution. "
        "In brackets the mean's 95 % interval over seeds. A perfect model would not get 0 but about what "
        f"{REAL} gets ({splits}). The primer is the pretrained weights before any finetuning. Drawn with x and y each "
        "alone it sees what pretraining showed it, one coordinate at a time, and tells what it learned of the "
        "marginals; drawn together, as finetuning begins, it sees two at once, which pretraining never showed it."
    )


def read_points(params: Params, results: Results) -> list[Points]:
    """The data, and of the first seed the primers and final samples of the arms; what can't be read is left out."""
    manifest = results.manifest["shards"]
    files = [("data", paths.DATA / manifest[0]["file"])]
    seed, last = params.seeds[0], f"milestone-{milestone_key(params.budget.milestones[-1])}"
    for arm in dict.fromkeys(run.arm for run in results.runs if run.seed == seed):
        folder = paths.samples(arm, seed)
        files += [(f"{arm}: {title}".replace(", ", ",\n"), folder / f"{key}.npy") for key, title in PRIMERS.items()]
        files += [(arm, folder / f"{last}.npy")]
    found = [(title, _values(file, params.dataset.shape)) for title, file in files]
    return [Points(title, values) for title, values in found if values is not None]


def _values(file: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    try:
        return points.points_of(np.asarray(open_images(file, shape, "maskdm sample")))
    except UnusableError:
        return None
