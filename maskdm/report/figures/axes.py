"""What a figure is, and axes that several figures share: compute, logarithms, remarks in rows, panels, one legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from maskdm.report.comparison import Findings
from maskdm.report.figures.looks import MISSING, REMARK, WIDTH, short
from maskdm.report.statistics import estimate

LOG_COMPUTE_FROM = 4.0  # an axis of compute that spans more than this factor is logarithmic
FEW_TICKS = 5.0  # a factor
UNITS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1.0, "FLOPs"))
COMPUTE = "training compute ({})"
LEGEND_ROW = 0.17  # inches
LEGEND_CHARACTERS = 108  # of a row of the legend below a figure


@dataclass(frozen=True)
class Kind:
    """A figure of the report; its texts are the section of texts.j2 with its file name.

    Attributes:
        file: its name.
        draw: draws it.
        applies: whether there is anything to draw.
        has_scores: whether it shows scores: then their protocol stands below it.
    """

    file: str
    draw: Callable[[Findings], Figure]
    applies: Callable[[Findings], bool] = lambda _: True
    has_scores: bool = False


def compute_unit(flops: Iterable[float]) -> tuple[float, str]:
    """The unit in which the largest number has one to three digits before the point, and its name."""
    largest = max(flops, default=0.0)
    return next((unit for unit in UNITS if largest >= unit[0]), UNITS[-1])


def scale_compute(axes: Axes, flops: pd.Series) -> None:
    """Ticks for compute: logarithmic where it spans more than a factor of `LOG_COMPUTE_FROM`."""
    if flops.min() > 0 and flops.max() > LOG_COMPUTE_FROM * flops.min():
        axes.set_xscale("log")
        log_values(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,.6g}")


def log_values(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 of each decade, or evenly spaced within a decade."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.set_major_locator(MaxNLocator(5) if high < FEW_TICKS * low else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:,.10g}")


def signed_tick(value: float, _: int = 0) -> str:
    """A difference at a tick."""
    return "0" if math.isclose(value, 0, abs_tol=1e-12) else f"{value:+.6g}".replace("-", "−")


def band(values: pd.Series) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % t-interval with three values or more, otherwise of the values' range."""
    found = estimate(values.to_numpy())
    if found.has_interval:
        return found.mean, found.low, found.high
    return found.mean, float(values.min()), float(values.max())


def legend_below(figure: Figure, found: Findings) -> None:
    """One legend below the panels, which keep their height: arms in the order of params.yaml, then the other lines."""
    entries: dict[str, Artist] = {}
    for arm in found.params.arms:
        if arm not in found.arms:
            entries[f"{short(arm)}: missing"] = Line2D([], [], linestyle="none", marker="x", color=MISSING)
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    arms = [name for arm in found.params.arms for name in (short(arm), f"{short(arm)}: missing")]
    labels = sorted(entries, key=lambda label: arms.index(label) if label in arms else len(arms))
    longest = max(map(len, labels)) + 7  # with the line beside the name
    columns = max(min(LEGEND_CHARACTERS // longest, len(labels)), 1)
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows)
    look: dict[str, Any] = {"loc": "outside lower center", "handlelength": 2.4, "columnspacing": 1.4}
    handles = [entries[label] for label in labels]
    figure.legend(handles=handles, labels=labels, ncols=math.ceil(len(labels) / rows), **look)


def row_text(axes: Axes, across: float, row: float, text: str, **look: Any) -> None:
    """A remark in a row of the y axis, at a fraction of the width: it starts there, or ends there from 0.5 on."""
    side = "left" if across < 0.5 else "right"
    place = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center"}
    axes.text(across, row, text, **{"fontsize": 8, "color": REMARK, **place, **look})


def panel_figure(panels: int, columns: int, row_height: float, least: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with some panels on common axes; heights of a row and at least of all in inches."""
    across = min(panels, columns)
    rows = math.ceil(panels / across)
    figure = Figure(figsize=(WIDTH, max(row_height * rows + 0.3, least)), layout="constrained")
    places = list(figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel())
    for axes in places[panels:]:
        axes.remove()
    for axes in places[:panels]:
        axes.tick_params(labelbottom=True)  # a shared axis has no labels above an empty place
    return figure, places[:panels]


def label_below(panels: list[Axes], columns: int, label: str) -> None:
    """Name the x axis of the panels in the lowest row; a label of the whole figure would overlap the legend."""
    for axes in panels[(len(panels) - 1) // columns * columns :]:
        axes.set_xlabel(label)
