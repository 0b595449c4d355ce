"""Axes that several figures share: compute, scores with their two scales, and one legend for all panels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from maskdm.report.figures.kind import Shown
from maskdm.report.looks import FLOOR, MISSING, WIDTH, short
from maskdm.report.numbers import decimals

LOG_FROM = 3.0  # an axis of scores whose values differ by more than this factor is logarithmic
LOG_COMPUTE_FROM = 4.0
REMARK = "#444444"
FEW_TICKS = 5.0  # a factor
UNITS = ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1.0, "FLOPs"))
LEGEND_ROW = 0.17  # inches
LEGEND_CHARACTERS = 108  # of a row of the legend below a figure


def compute_unit(flops: Iterable[float]) -> tuple[float, str]:
    """The unit in which the largest number has one to three digits before the point, and its name."""
    largest = max(flops, default=0.0)
    return next((unit for unit in UNITS if largest >= unit[0]), UNITS[-1])


def compute_label(unit: str) -> str:
    """The name of an axis of compute."""
    return f"training compute ({unit})"


def scale_compute(axes: Axes, flops: pd.Series) -> None:
    """Ticks for compute: logarithmic where it spans more than a factor of `LOG_COMPUTE_FROM`."""
    if flops.min() > 0 and flops.max() > LOG_COMPUTE_FROM * flops.min():
        axes.set_xscale("log")
        _log_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _log_ticks(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    # Less than a decade has too few of those.
    axis.set_major_locator(MaxNLocator(5) if high < FEW_TICKS * low else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_values(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 of each decade, or evenly on a part of one."""
    _log_ticks(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def is_wide(values: pd.Series) -> bool:
    """Whether values ask for a logarithmic axis."""
    return bool(values.min() > 0 and values.max() > LOG_FROM * values.min())


def scale_scores(axes: Axes, scores: pd.Series, ends: dict[str, float]) -> None:
    """The axis of scores fitted to the arms, with the floor dotted and the untrained network.

    The differences between the arms are the question: a scale far from them is named at the edge instead of
    flattening them.
    """
    low, high = float(scores.min()), float(scores.max())
    if is_wide(scores):
        axes.set_yscale("log")
        log_values(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    floor, untrained = ends["floor"], ends["untrained"]
    room = max(high - low, 0.1 * high)
    axes.margins(y=0.12)  # for the notes
    if floor > low / LOG_FROM if axes.get_yscale() == "log" else low - floor <= 0.6 * room:
        axes.axhline(floor, color=FLOOR, linestyle=":", label=f"floor: real against real ({fid_text(floor)})")
    else:
        _note(axes, f"↓ floor, real against real: {fid_text(floor)}", 0.015, "bottom")
    if untrained < high * LOG_FROM if axes.get_yscale() == "log" else untrained - high <= 0.6 * room:
        axes.axhline(untrained, color=FLOOR, linestyle=(0, (1, 4)), label=f"untrained ({fid_text(untrained)})")
    else:
        _note(axes, f"↑ untrained: {fid_text(untrained)}", 0.985, "top")


def _note(axes: Axes, text: str, height: float, side: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    axes.text(0.99, height, text, transform=axes.transAxes, color=FLOOR, fontsize=8, va=side, ha="right", bbox=box)


def fid_text(value: float) -> str:
    """A FID, or another score, with three digits."""
    return f"{value:,.{decimals(pd.Series([value]))}f}"


def legend_below(figure: Figure, shown: Shown) -> None:
    """One legend under the panels, which keep their height: arms in the order of params.yaml, then the other lines."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for arm in shown.missing_arms:
        entries[f"{short(arm)}: missing"] = Line2D([], [], linestyle="none", marker="x", color=MISSING)
    arms = [name for arm in shown.params.arms for name in (short(arm), f"{short(arm)}: missing")]
    labels = sorted(entries, key=lambda label: arms.index(label) if label in arms else len(arms))
    columns = _legend_columns(labels)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * math.ceil(len(labels) / columns))
    figure.legend(
        handles=[entries[label] for label in labels],
        labels=labels,
        loc="outside lower center",
        ncols=columns,
        handlelength=2.4,
        columnspacing=1.4,
    )


def _legend_columns(labels: list[str]) -> int:
    """As many columns as fit, evened out over the rows."""
    longest = max(map(len, labels), default=1) + 7  # the line beside the name
    fit = max(min(LEGEND_CHARACTERS // longest, len(labels)), 1)
    return math.ceil(len(labels) / math.ceil(len(labels) / fit))


def row_text(axes: Axes, across: float, row: float, text: str, **look: Any) -> None:
    """A remark in a row of the y axis, at a fraction of the width; from the middle on it ends there."""
    side = "left" if across < 0.5 else "right"
    place = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center"}
    axes.text(across, row, text, **{"fontsize": 8, "color": REMARK, **place, **look})


def panel_figure(panels: int, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with so many panels on common axes; `height` is that of a row."""
    across = min(panels, columns)
    rows = math.ceil(panels / across)
    figure = Figure(figsize=(WIDTH, height * rows + 0.3), layout="constrained")
    places = list(figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel())
    for axes in places[panels:]:
        axes.remove()
    for axes in places[:panels]:
        axes.tick_params(labelbottom=True)  # a shared axis hides them even above an empty place
    return figure, places[:panels]


def label_below(panels: list[Axes], label: str, columns: int = 3) -> None:
    """Name the x axis under the lowest panel of every column."""
    for axes in panels[-min(len(panels), columns) :]:
        axes.set_xlabel(label)
