"""Points, which are images of two values: their distances in a table, and the points that are drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd

from maskdm.config import Params, paths
from maskdm.report.numbers import number_text
from maskdm.report.results import Results, UnusableError, milestone_key, open_images
from maskdm.report.statistics import estimate
from maskdm.report.tables import NONE, SCALES
from maskdm.scoring import points
from maskdm.scoring.headline import DISTANCE, SLICED_WASSERSTEIN

PRIMERS = {"primer_alone": "primer, x and y each alone", "primer": "primer, x and y together"}
JOINT = SLICED_WASSERSTEIN.key.removeprefix(DISTANCE)  # the distance by which arms are compared
SCALE = SLICED_WASSERSTEIN.times  # distances are shown in thousandths of the coordinates' unit
NAMES = {"marginal_0": "W₁ of x", "marginal_1": "W₁ of y", JOINT: SLICED_WASSERSTEIN.name, "energy": "energy"}


def are_shown(params: Params) -> bool:
    """Whether the images are points of two values that are compared as such."""
    return points.apply_to(params) and int(np.prod(params.dataset.shape)) == 2


def distance_frame(params: Params, results: Results) -> pd.DataFrame:
    """A row per arm, seed and milestone; primers come before the milestones.

    Columns: arm, seed, milestone (`0.500`, or one of `PRIMERS`), flops, and every distance by its name.
    """
    rows = []
    for run in results.runs:
        scored = {key: run.metrics[key] for key in PRIMERS if key in run.metrics}
        scored |= {key: run.metrics["milestones"][key] for key in map(milestone_key, params.budget.milestones)}
        rows += [
            {"arm": run.arm, "seed": run.seed, "milestone": key, "flops": float(of["flops"]), **of["distances"]}
            for key, of in scored.items()
            if "distances" in of
        ]
    return pd.DataFrame(rows, columns=["arm", "seed", "milestone", "flops", *NAMES])


def distance_table(params: Params, results: Results) -> pd.DataFrame:
    """The distances of the primers and of the arms at the end of the budget, as text; empty where there are none."""
    if not are_shown(params) or (frame := distance_frame(params, results)).empty:
        return pd.DataFrame()
    rows = []
    for arm in params.arms:
        for key in (*PRIMERS, milestone_key(params.budget.milestones[-1])):
            found = frame[(frame["arm"] == arm) & (frame["milestone"] == key)]
            if found.empty:
                continue
            row = {"arm": f"{arm}: {PRIMERS[key]}" if key in PRIMERS else arm}
            for name, title in NAMES.items():
                one = estimate(SCALE * found[name].to_numpy())
                interval = f" [{number_text(one.low)}, {number_text(one.high)}]" if one.has_interval else ""
                row[f"{title} ×1000"] = number_text(one.mean) + interval
            rows.append(row)
    scale = results.scale["distances"]
    for end, of in (("floor", scale["floor"]["mean"]), ("untrained", scale["untrained"])):
        texts = {f"{title} ×1000": number_text(SCALE * of[name]) for name, title in NAMES.items()}
        rows.append({"arm": SCALES[end], **texts})
    return pd.DataFrame(rows).fillna(NONE)


def read_points(params: Params, results: Results) -> list[tuple[str, np.ndarray]]:
    """The data, and the primers and final samples of the arms with the first seed; unreadable files are left out.

    Returns:
        a title, and points (N, 2) in [−1, 1], for each panel.
    """
    files = [("data", paths.DATA / results.manifest["shards"][0]["file"])]
    seed, last = params.seeds[0], f"milestone-{milestone_key(params.budget.milestones[-1])}"
    for arm in [run.arm for run in results.runs if run.seed == seed]:
        folder = paths.samples(arm, seed)
        files += [(f"{arm}: {title}".replace(", ", ",\n"), folder / f"{key}.npy") for key, title in PRIMERS.items()]
        files += [(arm, folder / f"{last}.npy")]
    found = []
    for title, file in files:
        try:
            values = points.points_of(np.asarray(open_images(file, params.dataset.shape, "maskdm sample")))
            found.append((title, values))
        except UnusableError:
            continue
    return found
