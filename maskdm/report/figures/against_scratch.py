"""Each arm against scratch, with its uncertainty: the score at equal compute, and the compute at an equal score."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maskdm.report.comparison import Against, Findings, final
from maskdm.report.figures.axes import Kind, log_values, row_text, signed_tick
from maskdm.report.figures.looks import MISSING, WIDTH, Look, arm_looks, family, short
from maskdm.report.statistics import ENOUGH

ROW_HEIGHT = 0.27  # inches
FAMILY_GAP = 0.35  # rows
SEED_OFFSET = 0.26  # of a row: the seeds stand below their mean
ARROW_SPACE = 1.03  # a factor: arrows stand this far from the edge
LEAST_DECADES = 0.35  # of the axis of compute ratios: equal arms must not look different


def _draw(found: Findings) -> Figure:
    places, name = _places(found), short(str(found.baseline))
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * (max(places.values()) + 1) + 1.35), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    scores = final(found.summary).pivot(index="arm", columns="seed", values=found.headline.key)
    deltas, looks, labels = scores - scores.loc[str(found.baseline)], arm_looks(found.params), []
    _scale_ratios(right, found)
    for arm, place in places.items():
        against, look = found.compared[arm].against, looks[arm]
        if against is None:
            note = "missing" if arm not in found.arms else f"no seed in common with {name}"
            row_text(left, 0.02, place, note, style="italic", color=MISSING)
            labels.append(short(arm))
            continue
        gap, seeds = against.score.difference, deltas.loc[arm].dropna()
        if len(seeds) > 1:
            left.plot(seeds, np.full(len(seeds), place + SEED_OFFSET), "|", color=look.color, markersize=5)
        _draw_estimate(left, place, gap.mean, (gap.low, gap.high) if gap.has_interval else None, look)
        _draw_ratio(right, place, against, look)
        labels.append(short(arm) if gap.n == len(found.params.seeds) else f"{short(arm)} (n={gap.n})")
    left.set_yticks(list(places.values()), labels)
    left.set_ylim(max(places.values()) + 0.6, -0.6)
    left.xaxis.set_major_locator(MaxNLocator(6))
    left.xaxis.set_major_formatter(FuncFormatter(signed_tick))
    score = found.headline.name
    left.set(title=f"{score} at equal compute", xlabel=f"{score} minus {name}'s\n(left is better)")
    right.set(title=f"compute at equal {score}", xlabel=f"fraction of {name}'s compute\n(left is better)")
    for axes, equal in ((left, 0), (right, 1)):
        axes.axvline(equal, color="black", linestyle="--", linewidth=0.9)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    _add_legend(figure, found)
    return figure


def _places(found: Findings) -> dict[str, float]:
    """The row of each arm, with a gap between families."""
    places: dict[str, float] = {}
    place, before = 0.0, None
    for arm, config in found.params.arms.items():
        if arm == found.baseline:
            continue
        place += FAMILY_GAP if before not in (None, family(config)) else 0.0
        places[arm], before = place, family(config)
        place += 1
    return places


def _draw_estimate(axes: Axes, place: float, value: float | None, ends: tuple[float, float] | None, look: Look) -> None:
    if ends is not None:
        axes.plot(ends, [place, place], color=look.color, linewidth=1.6, solid_capstyle="butt")
    if value is not None:
        axes.plot(value, place, look.marker, color=look.color, markeredgecolor="black", markeredgewidth=0.5)


def _draw_ratio(axes: Axes, place: float, against: Against, look: Look) -> None:
    """The ratio with its interval; an end outside the budget is an arrow at the edge."""
    ratio, low, high = against.ratios
    if not against.is_conclusive:
        return
    ends = None
    if against.crossing.has_interval and not ratio is low is high is None:
        left, right = axes.get_xlim()
        ends = left * ARROW_SPACE if low is None else low, right / ARROW_SPACE if high is None else high
        for value, end, arrow in zip((low, high), ends, ("<", ">"), strict=True):
            if value is None:
                axes.plot(end, place, arrow, color=look.color, markersize=4)
    _draw_estimate(axes, place, ratio, ends, look)
    if ratio is None:
        row_text(axes, 0.95, place, "never", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    elif against.crossing.at_most:
        axes.annotate("≤", (ratio, place), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8)


def _scale_ratios(axes: Axes, found: Findings) -> None:
    """A logarithmic axis around 1 with room for `never`."""
    ratios = [ratio for against in found.against.values() for ratio in against.ratios if ratio is not None]
    logs = np.log10([1.0, *ratios])
    low, high = logs.min(), logs.max()
    spare = max(LEAST_DECADES - (high - low), 0.0) / 2
    room = 0.08 * (high - low + 2 * spare)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - spare - room), 10 ** (high + spare + 4 * room))
    log_values(axes.xaxis)


def _add_legend(figure: Figure, found: Findings) -> None:
    several = found.num_seeds > 1
    entries: list[tuple[str, dict[str, Any]]] = [
        ("mean over seeds" if several else "one seed", {"marker": "o", "linestyle": "none"}),
        *([("each seed", {"marker": "|", "linestyle": "none"})] if several else []),
        *([("95 % interval", {"linewidth": 1.6})] if found.num_seeds >= ENOUGH else []),
        (short(str(found.baseline)), {"linestyle": "--", "linewidth": 0.9}),
    ]
    handles = [Line2D([], [], color="black", label=label, **look) for label, look in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _applies(found: Findings) -> bool:
    return found.baseline is not None and len(found.params.arms) > 1


AGAINST_SCRATCH = Kind("against_scratch.png", _draw, _applies, has_scores=True)
