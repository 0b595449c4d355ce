"""Distances between points, where images have two values: the table, its words, and the points that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm import distances, paths
from maskdm.config import Params
from maskdm.report.comparison import reference_of
from maskdm.report.files import UnusableError, open_images
from maskdm.report.numbers import number_text, places_of, ratio_text, signed
from maskdm.report.results import Results, Run, milestone_key
from maskdm.report.statistics import Crossing, Estimate, crossing, estimate
from maskdm.report.verdicts import MATCHED_BY

PRIMERS = {"primer_alone": "primer, x and y each alone", "primer": "primer, x and y together"}
REAL, UNTRAINED = "real vs real", "untrained"
DIMENSIONS = 2
NAMES = {"marginal_0": "W₁ of x", "marginal_1": "W₁ of y", "sliced_wasserstein": "sliced W₁", "energy": "energy"}
JOINT = "sliced_wasserstein"  # the distance by which arms are compared
SCALE = 1000.0  # distances are shown in thousandths of the coordinates' unit


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
    return distances.apply_to(params) and int(np.prod(params.dataset.shape)) == DIMENSIONS


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


def floor_of(results: Results) -> dict[str, Any] | None:
    """What real points get in the place of samples: `mean` and `std` by distance; None where it is not known."""
    of_points = (results.scale or {}).get("distances")
    return None if of_points is None else dict(of_points["floor"])


def distance_table(params: Params, results: Results) -> pd.DataFrame:
    """The distances of the primers and at the end of the budget, as text; empty where there are none."""
    if not are_shown(params) or (frame := distance_frame(params, results)).empty:
        return pd.DataFrame()
    last = milestone_key(params.budget.milestones[-1])
    groups = [(arm, key) for arm in params.arms for key in (*PRIMERS, last)]
    rows = [_row(frame, params, arm, key) for arm, key in groups if _at(frame, arm, key).size]
    return pd.DataFrame([*rows, *_scale_rows(results)]).fillna("–")


def _at(frame: pd.DataFrame, arm: str, key: str) -> pd.DataFrame:
    return frame[(frame["arm"] == arm) & (frame["milestone"] == key)]


def _row(frame: pd.DataFrame, params: Params, arm: str, key: str) -> dict[str, str]:
    rows = _at(frame, arm, key)
    cells = {f"{title} ×1000": _cell(estimate(SCALE * rows[name].to_numpy())) for name, title in NAMES.items()}
    row = {"arm": f"{arm}: {PRIMERS[key]}" if key in PRIMERS else arm, **cells}
    reference = reference_of(params)
    if key in PRIMERS or reference in (None, arm):
        return row
    if (found := crossed(frame, arm, str(reference))) is not None:
        row[f"Δ {NAMES[JOINT]} ×1000"] = _difference(frame, arm, str(reference))
        row[f"same {NAMES[JOINT]} at"] = _ratio(*found)
    return row


def _difference(frame: pd.DataFrame, arm: str, reference: str) -> str:
    """An arm's joint distance at the end of the budget less the reference's with the same seed."""
    ours, theirs = (
        rows[rows["milestone"] == rows["milestone"].max()].set_index("seed")[JOINT]
        for rows in (milestones_of(frame, arm), milestones_of(frame, reference))
    )
    found = estimate(SCALE * (ours - theirs).dropna().to_numpy())
    text = signed(found.mean, places_of(found))
    if not found.has_interval:
        return text
    low, high = (signed(end, places_of(found)) for end in (found.low, found.high))
    return f"{text} [{low}, {high}]"


def _cell(value: Estimate) -> str:
    text = number_text(value.mean)
    return f"{text} [{number_text(value.low)}, {number_text(value.high)}]" if value.has_interval else text


def crossed(frame: pd.DataFrame, arm: str, reference: str) -> tuple[Crossing, float] | None:
    """Where an arm's joint distance reaches the reference's final one, and what the reference spent."""
    ours, theirs = (milestones_of(frame, a) for a in (arm, reference))
    common = sorted(set(ours["seed"]) & set(theirs["seed"]))
    if not common:
        return None
    ours, theirs = ours[ours["seed"].isin(common)], theirs[theirs["seed"].isin(common)]
    curves = ours.pivot(index="seed", columns="milestone", values=JOINT)
    targets = theirs[theirs["milestone"] == theirs["milestone"].max()].set_index("seed")
    flops = ours.groupby("milestone")["flops"].mean().to_numpy()
    found = crossing(flops, curves.to_numpy(), targets.loc[common, JOINT].to_numpy())
    return found, float(targets["flops"].mean())


def milestones_of(frame: pd.DataFrame, arm: str) -> pd.DataFrame:
    """An arm's rows, without those of its primers."""
    return frame[(frame["arm"] == arm) & ~frame["milestone"].isin(list(PRIMERS))]


def _ratio(found: Crossing, base_flops: float) -> str:
    at_most = "≤ " if found.at_most else ""
    text = "never" if found.at is None else f"{at_most}{ratio_text(found.at / base_flops)}"
    if not found.has_interval:
        return text
    low, high = ("…" if end is None else f"{end / base_flops:.2f}" for end in (found.low, found.high))
    return f"{text} [{low}, {high}]"


def _scale_rows(results: Results) -> list[dict[str, str]]:
    """Real points in the place of samples, and the network before any training."""
    floor = floor_of(results)
    if results.scale is None or floor is None:
        return []
    ends = {REAL: floor["mean"], UNTRAINED: results.scale["distances"]["untrained"]}
    return [
        {"arm": end, **{f"{title} ×1000": number_text(SCALE * of[name]) for name, title in NAMES.items()}}
        for end, of in ends.items()
    ]


def points_answer(params: Params, results: Results) -> str:
    """The project's question, answered by the points' joint distance; empty where the report speaks of none."""
    reference = reference_of(params)
    if not are_shown(params) or reference is None:
        return ""
    frame = distance_frame(params, results)
    arms = [arm for arm in params.arms if arm != reference and crossed(frame, arm, reference) is not None]
    found = "; ".join(f"{arm} {_difference(frame, arm, reference)}" for arm in arms)
    if not found:
        return ""
    matched = MATCHED_BY[params.budget.match]
    return f"{NAMES[JOINT]} to the data ×1000 at equal {matched}, less {reference}'s (negative is better): {found}."


def points_caution(params: Params) -> str:
    """What FID does not see of points; empty where the report speaks of none."""
    if not are_shown(params):
        return ""
    return (
        "FID on two coordinates is the distance of two Gaussians with the points' means and covariances: it is blind "
        "to the shape that the points lie on. The verdicts on the arms go by sliced W₁ instead, as the answer does."
    )


def distance_note(params: Params, results: Results) -> str:
    """What the table of distances is."""
    floor = floor_of(results)
    if floor is None:
        return ""
    splits = f"the mean of {floor['draws']} random splits, {floor['num_samples']:,} points in the place of samples"
    return (
        "W₁ of x and of y are Wasserstein-1 distances of one coordinate alone, sliced W₁ is the mean over directions, "
        "energy looks at all pairs of points: the first two see the marginals, the last two the joint distribution. "
        "In brackets the mean's 95 % interval over seeds; Δ is an arm's less scratch's, paired by seed, and negative "
        "is better. A perfect model would not get 0 but about what "
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
    return [Points(title, values) for title, file in files if (values := _values(file)) is not None]


def _values(file: Path) -> np.ndarray | None:
    try:
        return distances.points_of(np.asarray(open_images(file, "maskdm sample")))
    except UnusableError:
        return None
