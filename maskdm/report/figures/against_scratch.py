"""Each arm against scratch, and how sure that is: the score at equal compute, and the compute at an equal score."""

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
SEED_OFFSET = 0.26  # of a row: the seeds stand under their mean
ARROW_SPACE = 1.03  # a factor: arrows stand this far from the edge
LEAST_DECADES = 0.35  # of the axis of compute ratios: equal arms must not look apart


def _draw(found: Findings) -> Figure:
    reference, places = str(found.baseline), _places(found)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * (max(places.values()) + 1) + 1.35), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    scores = final(found.summary).pivot(index="arm", columns="seed", values=found.headline.key)
    deltas, looks, names = scores - scores.loc[reference], arm_looks(found.params), []
    _scale_ratios(right, found)
    for arm, place in places.items():
        against, asked = found.compared[arm].against, len(found.params.seeds)
        if against is None:
            note = "missing" if arm not in found.arms else f"no seed in common with {short(reference)}"
            row_text(left, 0.02, place, note, style="italic", color=MISSING)
            names.append(short(arm))
            continue
        gap, look = against.score.difference, looks[arm]
        if len(seeds := deltas.loc[arm].dropna()) > 1:
            left.plot(seeds, np.full(len(seeds), place + SEED_OFFSET), "|", color=look.color, markersize=5)
        if gap.has_interval:
            _draw_bar(left, place, gap.low, gap.high, look)
        _draw_mean(left, place, gap.mean, look)
        _draw_ratio(right, place, against, look)
        names.append(short(arm) if gap.n == asked else f"{short(arm)} (n={gap.n})")
    left.set_yticks(list(places.values()), names)
    left.set_ylim(max(places.values()) + 0.6, -0.6)
    left.axvline(0, color="black", linestyle="--", linewidth=0.9)
    right.axvline(1, color="black", linestyle="--", linewidth=0.9)
    score, name = found.headline.name, short(reference)
    left.set(title=f"{score} at equal compute", xlabel=f"{score} less {name}'s\n(left is better)")
    right.set(title=f"compute at equal {score}", xlabel=f"part of {name}'s compute\n(left is better)")
    left.xaxis.set_major_locator(MaxNLocator(6))
    left.xaxis.set_major_formatter(FuncFormatter(signed_tick))
    for axes in (left, right):
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    _legend(figure, found)
    return figure


def _places(found: Findings) -> dict[str, float]:
    """How far down each arm stands, families a little apart."""
    places: dict[str, float] = {}
    place, before = 0.0, None
    for arm, config in found.params.arms.items():
        if arm == found.baseline:
            continue
        place += FAMILY_GAP if before not in (None, family(config)) else 0.0
        places[arm], before = place, family(config)
        place += 1
    return places


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
        row_text(axes, 0.95, place, "never", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        return
    _draw_mean(axes, place, ratio, look)
    if crossed.at_most:
        axes.annotate("≤", (ratio, place), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8)


def _scale_ratios(axes: Axes, found: Findings) -> None:
    """A logarithmic axis around 1 with room for `never`."""
    crossings = [(against, against.crossing) for against in found.against.values()]
    ratios = [a.ratio(flops) for a, c in crossings for flops in (c.at, c.low, c.high)]
    logs = np.log10([1.0, *(ratio for ratio in ratios if ratio is not None)])
    low, high = logs.min(), logs.max()
    spare = max(LEAST_DECADES - (high - low), 0.0) / 2
    room = 0.08 * (high - low + 2 * spare)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - spare - room), 10 ** (high + spare + 4 * room))
    log_values(axes.xaxis)


def _legend(figure: Figure, found: Findings) -> None:
    several = found.num_seeds > 1
    entries: list[tuple[str, dict[str, Any]]] = [
        ("mean over seeds" if several else "one seed", {"marker": "o", "linestyle": "none"}),
        *([("each seed", {"marker": "|", "linestyle": "none"})] if several else []),
        *([("95 % interval", {"linewidth": 1.6})] if found.num_seeds >= ENOUGH else []),
        (short(str(found.baseline)), {"linestyle": "--", "linewidth": 0.9}),
    ]
    handles = [Line2D([], [], color="black", label=label, **look) for label, look in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _caption(found: Findings) -> str:
    reference, score = found.baseline, found.headline.name
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
        f"budget; “≤”: at its first milestone already. {several.get(found.num_seeds, many)}"
    )


def _alt(found: Findings) -> str:
    gaps = {arm: against.score.difference.mean for arm, against in found.against.items()}
    texts = (f"{arm} {signed_tick(float(f'{gap:.3g}'))}" for arm, gap in gaps.items())
    return f"Difference in final {found.headline.name} to {found.baseline}, a row per arm: {', '.join(texts)}."


def _applies(found: Findings) -> bool:
    return found.baseline is not None and len(found.params.arms) > 1


AGAINST_SCRATCH = Kind(
    "against_scratch.png", "Each arm against scratch", _draw, _caption, _alt, _applies, has_scores=True
)
