"""What a figure is, and axes that several share: compute, logarithms, remarks in rows, panels, one legend below."""

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
PANEL_COLUMNS = 3
LEGEND_ROW = 0.17  # inches
LEGEND_CHARACTERS = 108  # of a row of the legend below a figure


@dataclass(frozen=True)
class Kind:
    """A figure of the report.

    Attributes:
        file: its name.
        title: a short one; `{score}` in it stands for the headline's name.
        draw: draws it.
        caption: what it shows, and what it does not.
        alt: what it says, for those who can't see it.
        applies: whether there is anything to draw.
        has_scores: whether it shows scores, whose protocol is to stand under it.
    """

    file: str
    title: str
    draw: Callable[[Findings], Figure]
    caption: Callable[[Findings], str]
    alt: Callable[[Findings], str]
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
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 of each decade, or evenly on a part of one."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    # Less than a decade has too few of those.
    axis.set_major_locator(MaxNLocator(5) if high < FEW_TICKS * low else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:,.10g}")


def signed_tick(value: float, _: int = 0) -> str:
    """A difference at a tick."""
    return "0" if math.isclose(value, 0, abs_tol=1e-12) else f"{value:+.6g}".replace("-", "−")


def band(values: pd.Series) -> tuple[float, float, float]:
    """The mean, and its 95 % t-interval with three values or more, else their range."""
    found = estimate(values.to_numpy())
    if found.has_interval:
        return found.mean, found.low, found.high
    return found.mean, float(values.min()), float(values.max())


def legend_below(figure: Figure, found: Findings) -> None:
    """One legend under the panels, which keep their height: arms in the order of params.yaml, then the other lines."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for arm in found.params.arms:
        if arm not in found.arms:
            entries[f"{short(arm)}: missing"] = Line2D([], [], linestyle="none", marker="x", color=MISSING)
    arms = [name for arm in found.params.arms for name in (short(arm), f"{short(arm)}: missing")]
    labels = sorted(entries, key=lambda label: arms.index(label) if label in arms else len(arms))
    longest = max(map(len, labels), default=1) + 7  # the line beside the name
    fit = max(min(LEGEND_CHARACTERS // longest, len(labels)), 1)
    columns = math.ceil(len(labels) / math.ceil(len(labels) / fit))  # evened out over the rows
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * math.ceil(len(labels) / columns))
    handles = [entries[label] for label in labels]
    look: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "handlelength": 2.4, "columnspacing": 1.4}
    figure.legend(handles=handles, labels=labels, **look)


def row_text(axes: Axes, across: float, row: float, text: str, **look: Any) -> None:
    """A remark in a row of the y axis, at a fraction of the width; from the middle on it ends there."""
    side = "left" if across < 0.5 else "right"
    place = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center"}
    axes.text(across, row, text, **{"fontsize": 8, "color": REMARK, **place, **look})


def panel_figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with so many panels on common axes; `height` is that of a row."""
    across = min(panels, PANEL_COLUMNS)
    rows = math.ceil(panels / across)
    figure = Figure(figsize=(WIDTH, height * rows + 0.3), layout="constrained")
    places = list(figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel())
    for axes in places[panels:]:
        axes.remove()
    for axes in places[:panels]:
        axes.tick_params(labelbottom=True)  # a shared axis hides them even above an empty place
    return figure, places[:panels]


def label_below(panels: list[Axes], label: str, columns: int = PANEL_COLUMNS) -> None:
    """Name the x axis under the lowest panel of every column."""
    for axes in panels[-min(len(panels), columns) :]:
        axes.set_xlabel(label)
