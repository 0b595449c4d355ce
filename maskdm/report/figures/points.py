"""Points of two values: the data, the primer and the samples as densities, and how far they are from the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from maskdm.report.figures.axes import compute_label, compute_unit, log_values, scale_compute
from maskdm.report.figures.fid_vs_compute import band
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import BASELINES, FLOOR, WIDTH, Look, arm_looks, short
from maskdm.report.points import (
    JOINT,
    NAMES,
    PRIMERS,
    Points,
    are_shown,
    distance_frame,
    floor_of,
    milestones_of,
    read_points,
)

COLUMNS = 5
LEGEND_COLUMNS = 3
TITLE = 22  # characters of a line of a panel's title
ABOVE = 22.0  # points between a panel and its title, for a marginal
BINS = 80  # of a density, along each side
MARGINAL_BINS = 50
LIMIT = 1.0  # of both coordinates
DATA = "#999999"
DENSITY = "viridis"
WITHIN = 2.0  # standard deviations: the floor's band
MARKS = dict(zip(PRIMERS, ("D", "*"), strict=True))


def _draw(shown: Shown) -> Figure:
    points = read_points(shown.params, shown.results)
    rows = math.ceil(len(points) / COLUMNS)
    heights = [2.1 * rows, 2.5]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).ravel()
    _draw_densities(above, points, rows)
    _draw_curves(below, shown)
    return figure


def _draw_densities(figure: SubFigure, points: list[Points], rows: int) -> None:
    """A panel per set of points, the data's marginals behind every other's."""
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in panels[len(points) :]:
        axes.remove()
    brightest = float(np.percentile(_density(points[0].values).compressed(), 95))  # of the data, for all panels
    for axes, one in zip(panels, points, strict=False):
        _draw_joint(axes, one.values, brightest)
        top, side = axes.inset_axes((0, 1.02, 1, 0.2)), axes.inset_axes((1.02, 0, 0.2, 1))
        _draw_marginal(top, one.values[:, 0], points[0].values[:, 0], "vertical")
        _draw_marginal(side, one.values[:, 1], points[0].values[:, 1], "horizontal")
        axes.set_title("\n".join(short(line, TITLE) for line in one.title.split("\n")), fontsize=8, pad=ABOVE)


def _draw_joint(axes: Axes, values: np.ndarray, brightest: float) -> None:
    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)
    axes.pcolormesh(edges, edges, _density(values), cmap=DENSITY, vmin=0, vmax=brightest, rasterized=True)
    axes.set(aspect="equal", xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def _density(values: np.ndarray) -> np.ma.MaskedArray:
    """The share of the points in each cell, (rows of y, columns of x), masked where there are none."""
    edges = np.linspace(-LIMIT, LIMIT, BINS + 1)
    counts, _, _ = np.histogram2d(values[:, 0], values[:, 1], bins=(edges, edges))
    return np.ma.masked_equal(counts.T / len(values), 0.0)


def _draw_marginal(axes: Axes, values: np.ndarray, data: np.ndarray, orientation: Any) -> None:
    """A histogram of one coordinate as a line over the data's as an area."""
    edges = np.linspace(-LIMIT, LIMIT, MARGINAL_BINS + 1)
    common = {"bins": edges, "density": True, "orientation": orientation}
    axes.hist(data, histtype="stepfilled", color=DATA, alpha=0.5, **common)
    axes.hist(values, histtype="step", color="black", linewidth=0.8, **common)
    axes.set_axis_off()
    limits = axes.set_xlim if orientation == "vertical" else axes.set_ylim
    limits(-LIMIT, LIMIT)


def _draw_curves(figure: SubFigure, shown: Shown) -> None:
    """A panel per distance: the arms against compute, the primer where pretraining ends."""
    frame, looks = distance_frame(shown.params, shown.results), arm_looks(shown.params)
    floor = floor_of(shown.results)
    size, unit = compute_unit(frame["flops"])
    panels = figure.subplots(1, len(NAMES), sharex=True)
    for axes, (name, title) in zip(panels, NAMES.items(), strict=True):
        _draw_floor(axes, floor["mean"][name], floor["std"][name])
        for arm in shown.arms:
            _draw_arm(axes, frame[frame["arm"] == arm], name, looks[arm], size)
        axes.set_title(title)
        axes.set_yscale("log")
        axes.set_ylim(*_limits([*frame[name], floor["mean"][name]]))
        log_values(axes.yaxis)
        scale_compute(axes, frame["flops"] / size)
        figure.supxlabel(compute_label(unit), fontsize=8.5)
    handles, labels = panels[0].get_legend_handles_labels()
    whole = figure.figure
    whole.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), LEGEND_COLUMNS))


def _limits(values: list[float]) -> tuple[float, float]:
    """A logarithmic axis from half of the smallest value on, whatever lies below in an interval."""
    return max(min(values), max(values) / 1e4) / 2, 1.5 * max(values)


def _draw_floor(axes: Axes, mean: float, std: float) -> None:
    label = "real against real"
    axes.axhspan(max(mean - WITHIN * std, 0.0), mean + WITHIN * std, color=FLOOR, alpha=0.18, linewidth=0)
    axes.axhline(mean, color=FLOOR, linestyle=":", label=label)


def _draw_arm(axes: Axes, rows: pd.DataFrame, name: str, look: Look, size: float) -> None:
    """A line through the milestones, and a mark for each way to draw from the primer."""
    front = 3 if look.color == BASELINES[0] else 2
    line, arm = _bands(milestones_of(rows, str(rows["arm"].iloc[0])), name, size), short(str(rows["arm"].iloc[0]))
    axes.plot(line["flops"], line["mean"], marker=look.marker, markersize=3.5, label=arm, zorder=front, **look.line)
    axes.fill_between(line["flops"], line["low"], line["high"], color=look.color, alpha=0.12, lw=0)
    for key, title in PRIMERS.items():
        primer, label = _bands(rows[rows["milestone"] == key], name, size), f"{arm}: {title}"
        if primer.empty:
            continue
        axes.plot(primer["flops"], primer["mean"], MARKS[key], color=look.color, markersize=7, mfc="white", label=label)


def _bands(rows: pd.DataFrame, name: str, size: float) -> pd.DataFrame:
    """A row per milestone: compute, the mean distance, and the band around it."""
    found = [(at["flops"].mean() / size, *band(at[name])) for _, at in rows.groupby("milestone", sort=True)]
    return pd.DataFrame(found, columns=["flops", "mean", "low", "high"])


def _caption(shown: Shown) -> str:
    several = "the mean over seeds, with its 95 % interval" if shown.num_seeds > 2 else "a mean over too few seeds"
    return (
        "Above: densities of the data, of the samples at the end of the budget, and of the primer (the pretrained "
        f"weights before any finetuning), seed {shown.params.seeds[0]}; at the edges marginals, the data's in grey. "
        f"Below: distances to the data, {several}, against compute with pretraining. The grey band is what real points "
        f"get in the place of samples: the mean of random splits and {WITHIN:.0f} standard deviations."
    )


def _alt(shown: Shown) -> str:
    frame = distance_frame(shown.params, shown.results)
    ends = {arm: milestones_of(frame, arm).groupby("milestone", sort=True)[JOINT].mean() for arm in shown.arms}
    said = ", ".join(f"{arm} {means.iloc[-1]:.4f}" for arm, means in ends.items())
    return f"Densities of points, and their distances to the data. Sliced W₁ at the end of the budget: {said}."


def _applies(shown: Shown) -> bool:
    return are_shown(shown.params) and not distance_frame(shown.params, shown.results).empty


POINTS = Kind(
    "points.png", "Points: the data, the primer and the samples", _draw, _caption, _alt, _applies, has_scores=True
)
