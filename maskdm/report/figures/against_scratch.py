"""Each arm against scratch, and how sure that is: the score at equal compute, and the compute at an equal score."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maskdm.report.comparison import Against
from maskdm.report.figures.axes import log_values, row_text
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import MISSING, WIDTH, Look, arm_looks, family, short
from maskdm.report.statistics import ENOUGH, Estimate

ROW_HEIGHT = 0.27  # inches
FAMILY_GAP = 0.35  # rows
SEED_OFFSET = 0.26  # of a row: the seeds stand under their mean
ARROW_SPACE = 1.03  # a factor: arrows stand this far from the edge
LEAST_DECADES = 0.35  # of the axis of compute ratios: equal arms must not look apart


def _draw(shown: Shown) -> Figure:
    reference = str(shown.reference)
    places = _places(shown, reference)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * (max(places.values()) + 1) + 1.35), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    looks, deltas = arm_looks(shown.params), _seed_deltas(shown, reference)
    _scale_ratios(right, shown)
    for arm, place in places.items():
        against = shown.compared[arm].against
        if against is None:
            note = "missing" if arm not in shown.arms else f"no seed in common with {short(reference)}"
            row_text(left, 0.02, place, note, style="italic", color=MISSING)
            continue
        _draw_delta(left, place, against.score.difference, deltas[arm], looks[arm])
        _draw_ratio(right, place, against, looks[arm])
    left.set_yticks(list(places.values()), [_row_name(shown, arm) for arm in places])
    _finish(left, right, places, reference, shown.headline.name)
    _legend(figure, shown)
    return figure


def _places(shown: Shown, reference: str) -> dict[str, float]:
    """How far down each arm stands, families a little apart."""
    places: dict[str, float] = {}
    place, before = 0.0, None
    for arm, config in shown.params.arms.items():
        if arm == reference:
            continue
        place += FAMILY_GAP if before not in (None, family(config)) else 0.0
        places[arm], before = place, family(config)
        place += 1
    return places


def _seed_deltas(shown: Shown, reference: str) -> dict[str, list[float]]:
    """By arm, every seed's score less scratch's with that seed."""
    scores = shown.final.pivot(index="arm", columns="seed", values=shown.headline.key)
    return {arm: row.dropna().tolist() for arm, row in (scores - scores.loc[reference]).iterrows()}


def _draw_delta(axes: Axes, place: float, difference: Estimate, deltas: list[float], look: Look) -> None:
    if len(deltas) > 1:
        axes.plot(deltas, np.full(len(deltas), place + SEED_OFFSET), "|", color=look.color, markersize=5)
    if difference.has_interval:
        _draw_bar(axes, place, difference.low, difference.high, look)
    _draw_mean(axes, place, difference.mean, look)


def _draw_bar(axes: Axes, place: float, low: float, high: float, look: Look) -> None:
    axes.plot([low, high], [place, place], color=look.color, linewidth=1.6, solid_capstyle="butt")


def _draw_mean(axes: Axes, place: float, value: float, look: Look) -> None:
    axes.plot(value, place, look.marker, color=look.color, markeredgecolor="black", markeredgewidth=0.5)


def _draw_ratio(axes: Axes, place: float, against: Against, look: Look) -> None:
    """The ratio with its interval; an end that lies outside the budget is an arrow to the edge."""
    crossed = against.crossing
    ratio, low, high = (against.ratio(flops) for flops in (crossed.at, crossed.low, crossed.high))
    if crossed.has_interval and not ratio is low is high is None:
        left, right = axes.get_xlim()
        ends = left * ARROW_SPACE if low is None else low, right / ARROW_SPACE if high is None else high
        _draw_bar(axes, place, *ends, look)
        for value, end, arrow in zip((low, high), ends, ("<", ">"), strict=True):
            if value is None:
                axes.plot(end, place, arrow, color=look.color, markersize=4)
    if ratio is None:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        row_text(axes, 0.95, place, "never", bbox=box)
        return
    _draw_mean(axes, place, ratio, look)
    if crossed.at_most:
        axes.annotate("≤", (ratio, place), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8)


def _scale_ratios(axes: Axes, shown: Shown) -> None:
    """A logarithmic axis around 1 with room for `never`."""
    crossings = [(a, a.crossing) for one in shown.compared.values() if (a := one.against) is not None]
    ratios = [a.ratio(flops) for a, c in crossings for flops in (c.at, c.low, c.high)]
    logs = np.log10([1.0, *(ratio for ratio in ratios if ratio is not None)])
    low, high = logs.min(), logs.max()
    spare = max(LEAST_DECADES - (high - low), 0.0) / 2
    room = 0.08 * (high - low + 2 * spare)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - spare - room), 10 ** (high + spare + 4 * room))
    log_values(axes.xaxis)


def _row_name(shown: Shown, arm: str) -> str:
    """The arm, and the number of its seeds where it is fewer than asked for."""
    against = shown.compared[arm].against
    seeds = len(shown.params.seeds) if against is None else against.score.difference.n
    return short(arm) if seeds == len(shown.params.seeds) else f"{short(arm)} (n={seeds})"


def _finish(left: Axes, right: Axes, places: dict[str, float], reference: str, score: str) -> None:
    name = short(reference)
    left.set_ylim(max(places.values()) + 0.6, -0.6)
    left.axvline(0, color="black", linestyle="--", linewidth=0.9)
    right.axvline(1, color="black", linestyle="--", linewidth=0.9)
    left.set(title=f"{score} at equal compute", xlabel=f"{score} less {name}'s\n(left is better)")
    right.set(title=f"compute at equal {score}", xlabel=f"part of {name}'s compute\n(left is better)")
    left.xaxis.set_major_locator(MaxNLocator(6))
    left.xaxis.set_major_formatter(FuncFormatter(_signed))
    for axes in (left, right):
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)


def _signed(value: float, _: int = 0) -> str:
    return "0" if math.isclose(value, 0, abs_tol=1e-12) else f"{value:+.6g}".replace("-", "−")


def _legend(figure: Figure, shown: Shown) -> None:
    several = shown.num_seeds > 1
    handles = [_entry("mean over seeds" if several else "one seed", marker="o", linestyle="none")]
    handles += [_entry("each seed", marker="|", linestyle="none")] if several else []
    handles += [_entry("95 % interval", linewidth=1.6)] if shown.num_seeds >= ENOUGH else []
    handles += [_entry(short(str(shown.reference)), linestyle="--", linewidth=0.9)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _entry(label: str, **look: Any) -> Line2D:
    return Line2D([], [], color="black", label=label, **look)


def _caption(shown: Shown) -> str:
    reference, score = shown.reference, shown.headline.name
    several = {
        1: "One seed: there is no interval, and another seed may turn any sign around.",
        2: "Two seeds: there is no interval.",
    }
    many = (
        "Bars are 95 % t-intervals over seeds, one by one: of many arms, some exclude zero by chance. An arrow is an "
        "end outside the budget."
    )
    return (
        f"Left: the final {score} less {reference}'s with the same seed. Right: the compute from which on the arm's "
        f"{score} stays at or below {reference}'s final one, divided by {reference}'s compute; “never”: not within the "
        f"budget; “≤”: at its first milestone already. {several.get(shown.num_seeds, many)}"
    )


def _alt(shown: Shown) -> str:
    found = ((arm, one.against) for arm, one in shown.compared.items())
    texts = (f"{arm} {_signed(float(f'{a.score.difference.mean:.3g}'))}" for arm, a in found if a is not None)
    return f"Difference in final {shown.headline.name} to {shown.reference}, a row per arm: {', '.join(texts)}."


def _applies(shown: Shown) -> bool:
    return shown.reference is not None and len(shown.params.arms) > 1


AGAINST_SCRATCH = Kind(
    "against_scratch.png", "Each arm against scratch", _draw, _caption, _alt, _applies, has_scores=True
)
