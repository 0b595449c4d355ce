"""How much the hyperparameters matter: every trial of every arm, and the one chosen."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maskdm.report.figures.axes import REMARK, log_values, row_text
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import WIDTH, short
from maskdm.report.tuning import Choice, Trial

COLUMNS = 4
WIDE = 10.0  # scores that differ by more than this factor are on a logarithmic axis
# Looks of a trial's mark.
CHOSEN: dict[str, Any] = {"marker": "*", "color": "#D55E00", "markersize": 10, "markeredgecolor": "black"}
TRIED: dict[str, Any] = {"marker": "o", "color": "#0072B2", "markersize": 4.5}
FAILED: dict[str, Any] = {"marker": "x", "color": REMARK, "markersize": 5}


def _draw(shown: Shown) -> Figure:
    arms, names = _tuned(shown), list(shown.params.tuning.trials)
    across = min(len(arms), COLUMNS)
    rows = math.ceil(len(arms) / across)
    height = rows * (0.17 * len(names) + 0.5) + 0.8
    figure = Figure(figsize=(WIDTH, max(height, 1.8)), layout="constrained")
    panels = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
    scores = [score for arm in arms for trial in arms[arm].trials if (score := _score(shown, trial)) is not None]
    for axes, (arm, choice) in zip(panels, arms.items(), strict=False):
        _draw_choice(axes, shown, choice, names)
        axes.set_title(short(arm, 22), fontsize=8.5)
        axes.tick_params(labelbottom=True)
        axes.tick_params(axis="y", length=0)
    for axes in panels[len(arms) :]:
        axes.remove()
    _scale(panels[0], scores, names)
    for axes in panels[: len(arms)][-across:]:
        axes.set_xlabel(_metric_name(shown))
    _legend(figure, any(trial.failed for choice in arms.values() for trial in choice.trials))
    return figure


def _tuned(shown: Shown) -> dict[str, Choice]:
    return {arm: choice for arm, choice in shown.results.choices.items() if choice.is_tuned}


def _metric_name(shown: Shown) -> str:
    return {"kid": "KID×1000", "fid": "FID"}[shown.params.tuning.metric]


def _score(shown: Shown, trial: Trial) -> float | None:
    metric = shown.params.tuning.metric
    score = trial.score(metric)
    return None if score is None else score * (1000 if metric == "kid" else 1)


def _draw_choice(axes: Axes, shown: Shown, choice: Choice, names: list[str]) -> None:
    """A row per trial: a dot, a ringed one for the chosen, a cross at the edge for one that failed."""
    for trial in choice.trials:
        row, score = names.index(trial.name), _score(shown, trial)
        if score is None:
            row_text(axes, 0.97, row, "× failed")
        elif trial.name == choice.trial:
            axes.plot(score, row, **CHOSEN)
        else:
            axes.plot(score, row, **TRIED)


def _scale(axes: Axes, scores: list[float], names: list[str]) -> None:
    """The common axes of all panels."""
    axes.set_yticks(range(len(names)), [short(name, 16) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    if scores and min(scores) > 0 and max(scores) > WIDE * min(scores):
        axes.set_xscale("log")
        log_values(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.12)


def _legend(figure: Figure, any_failed: bool) -> None:
    looks = {"chosen": CHOSEN, "tried": TRIED, **({"failed": FAILED} if any_failed else {})}
    handles = [Line2D([], [], linestyle="none", label=label, **look) for label, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _caption(shown: Shown) -> str:
    tuning = shown.params.tuning
    return (
        f"Every arm tried the same {len(tuning.trials)} trials with {tuning.budget_fraction:.0%} of the budget each, "
        f"on seed {tuning.seed}, which no other figure uses; the lowest {_metric_name(shown)} was chosen. One seed: "
        "trials that lie close together are not told apart."
    )


def _alt(shown: Shown) -> str:
    chosen = ", ".join(f"{arm} {choice.trial}" for arm, choice in _tuned(shown).items())
    return f"{_metric_name(shown)} of every trial, a panel per arm. Chosen: {chosen}."


def _applies(shown: Shown) -> bool:
    return bool(_tuned(shown))


TUNING = Kind("tuning.png", "What tuning tried", _draw, _caption, _alt, _applies, has_scores=True)
