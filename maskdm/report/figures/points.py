"""Points of two values: the data, the primer and the samples as densities, and how far they are from the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from maskdm.report.comparison import Findings
from maskdm.report.figures.axes import COMPUTE, Kind, band, compute_unit, log_values, scale_compute
from maskdm.report.figures.looks import FLOOR, WIDTH, Look, arm_looks, short
from maskdm.report.points import NAMES, PRIMERS, are_shown, distance_frame, read_points

COLUMNS = 5
LEGEND_COLUMNS = 3
TITLE = 22  # characters of a line of a panel's title
ABOVE = 22.0  # points between a panel and its title, for a marginal
EDGES = np.linspace(-1.0, 1.0, 81)  # of the cells of a density, along both sides
MARGINAL_EDGES = np.linspace(-1.0, 1.0, 51)
WITHIN = 2.0  # standard deviations: the floor's band
MARKS = dict(zip(PRIMERS, ("D", "*"), strict=True))


def _draw(found: Findings) -> Figure:
    points = read_points(found.params, found.results)
    rows = math.ceil(len(points) / COLUMNS)
    heights = [2.1 * rows, 2.5]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).ravel()
    _draw_densities(above, points, rows)
    _draw_distances(below, found)
    return figure


def _draw_densities(figure: SubFigure, points: list[tuple[str, np.ndarray]], rows: int) -> None:
    """A panel per set of points, with the data's marginals behind its own."""
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in panels[len(points) :]:
        axes.remove()
    data = points[0][1]
    brightest = float(np.percentile(_density(data).compressed(), 95))  # of the data, for all panels
    for axes, (title, values) in zip(panels, points, strict=False):
        axes.pcolormesh(EDGES, EDGES, _density(values), cmap="viridis", vmin=0, vmax=brightest, rasterized=True)
        axes.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        top, side = axes.inset_axes((0, 1.02, 1, 0.2)), axes.inset_axes((1.02, 0, 0.2, 1))
        _draw_marginal(top, values[:, 0], data[:, 0], "vertical")
        _draw_marginal(side, values[:, 1], data[:, 1], "horizontal")
        axes.set_title("\n".join(short(line, TITLE) for line in title.split("\n")), fontsize=8, pad=ABOVE)


def _density(values: np.ndarray) -> np.ma.MaskedArray:
    """The share of the points in each cell, (rows of y, columns of x), masked where there are none."""
    counts, _, _ = np.histogram2d(values[:, 0], values[:, 1], bins=(EDGES, EDGES))
    return np.ma.masked_equal(counts.T / len(values), 0.0)


def _draw_marginal(axes: Axes, values: np.ndarray, data: np.ndarray, orientation: Any) -> None:
    """A histogram of one coordinate as a line over the data's as an area."""
    common = {"bins": MARGINAL_EDGES, "density": True, "orientation": orientation}
    axes.hist(data, histtype="stepfilled", color="#999999", alpha=0.5, **common)
    axes.hist(values, histtype="step", color="black", linewidth=0.8, **common)
    axes.set_axis_off()
    limits = axes.set_xlim if orientation == "vertical" else axes.set_ylim
    limits(-1, 1)


def _draw_distances(figure: SubFigure, found: Findings) -> None:
    """A panel per distance: the arms against compute, with the primer where pretraining ends."""
    frame, looks = distance_frame(found.params, found.results), arm_looks(found.params)
    floor, (size, unit) = found.results.scale["distances"]["floor"], compute_unit(frame["flops"])
    panels = figure.subplots(1, len(NAMES), sharex=True)
    for axes, (name, title) in zip(panels, NAMES.items(), strict=True):
        mean, spread = floor["mean"][name], WITHIN * floor["std"][name]
        axes.axhspan(max(mean - spread, 0.0), mean + spread, color=FLOOR, alpha=0.18, linewidth=0)
        axes.axhline(mean, color=FLOOR, linestyle=":", label="real against real")
        for arm in found.arms:
            _draw_arm(axes, frame[frame["arm"] == arm], arm, name, looks[arm], size)
        axes.set_title(title)
        axes.set_yscale("log")
        low, high = min(*frame[name], mean), max(*frame[name], mean)
        axes.set_ylim(max(low, high / 1e4) / 2, 1.5 * high)  # an interval may reach lower
        log_values(axes.yaxis)
        scale_compute(axes, frame["flops"] / size)
    figure.supxlabel(COMPUTE.format(unit))
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), LEGEND_COLUMNS)
    figure.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _draw_arm(axes: Axes, rows: pd.DataFrame, arm: str, name: str, look: Look, size: float) -> None:
    """A line through the milestones, and a mark for each way to draw samples from the primer."""
    at_each = [(key, at["flops"].mean() / size, *band(at[name])) for key, at in rows.groupby("milestone", sort=True)]
    bands = pd.DataFrame(at_each, columns=["milestone", "flops", "mean", "low", "high"])
    line = bands[~bands["milestone"].isin(list(PRIMERS))]
    axes.plot(line["flops"], line["mean"], marker=look.marker, markersize=3.5, label=short(arm), **look.line)
    axes.fill_between(line["flops"], line["low"], line["high"], color=look.color, alpha=0.12, lw=0)
    for key, title in PRIMERS.items():
        primer, label = bands[bands["milestone"] == key], f"{short(arm)}: {title}"
        if not primer.empty:
            mark: dict[str, Any] = {"color": look.color, "markersize": 7, "mfc": "white", "label": label}
            axes.plot(primer["flops"], primer["mean"], MARKS[key], **mark)


def _applies(found: Findings) -> bool:
    return are_shown(found.params) and not distance_frame(found.params, found.results).empty


POINTS = Kind("points.png", _draw, _applies, has_scores=True)
