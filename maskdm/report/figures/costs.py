"""What it took: seconds of each stage by arm, and every trial of tuning with the one chosen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from maskdm.report.comparison import Findings
from maskdm.report.figures.axes import Kind, label_below, log_values, row_text
from maskdm.report.figures.looks import MISSING, REMARK, WIDTH, short
from maskdm.report.prose import score_of
from maskdm.report.results import Choice

# Fill and hatch of each stage, apart for the colour-blind and in grey.
STAGES = {
    "pretrain": ("#0072B2", ""),
    "finetune": ("#56B4E9", "////"),
    "sample": ("#E69F00", "...."),
    "evaluate": ("#F0E442", "\\\\\\\\"),
}
DEVICE_TIME = "in training steps"
ROW_HEIGHT = 0.30  # inches
UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
TUNING_COLUMNS = 4
WIDE = 10.0  # scores of trials that differ by more than this factor are on a logarithmic axis
# Looks of a trial's mark.
CHOSEN: dict[str, Any] = {"marker": "*", "color": "#D55E00", "markersize": 10, "markeredgecolor": "black"}
TRIED: dict[str, Any] = {"marker": "o", "color": "#0072B2", "markersize": 4.5}
FAILED: dict[str, Any] = {"marker": "x", "color": REMARK, "markersize": 5}


def _draw_time(found: Findings) -> Figure:
    arms = list(found.params.arms)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(arms) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    seconds, tuning = _stage_seconds(found), found.results.tuning_wall_seconds
    largest = max([sum(stages.values()) for stages in seconds.values()] + list(tuning.values()))
    size, unit = next((size, unit) for least, size, unit in UNITS if largest >= least)
    raised, height = (0.08, 0.46) if tuning else (0.0, 0.62)
    for row, arm in enumerate(arms):
        if arm not in seconds:
            row_text(axes, 0.01, row, "missing", style="italic", color=MISSING)
        else:
            left = 0.0
            for stage, (color, hatch) in STAGES.items():
                look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "#222222", "linewidth": 0.5}
                width = seconds[arm][stage] / size
                axes.barh(row - raised, width, height, left=left, label=stage, **look)
                left += width
            look = {"color": "white", "markeredgecolor": "black", "markersize": 5.5, "zorder": 3}
            axes.plot([found.compared[arm].device_seconds / size], [row - raised], "D", label=DEVICE_TIME, **look)
        if arm in tuning:
            look = {"color": "#FFFFFF", "hatch": "xxxx", "edgecolor": "#555555", "linewidth": 0.5}
            axes.barh(row + 0.28, tuning[arm] / size, 0.2, label="tuning, all trials", **look)
    axes.set_yticks(range(len(arms)), [short(arm) for arm in arms])
    axes.set(ylim=(len(arms) - 0.4, -0.6), xlim=(0, None), xlabel=f"wall-clock time ({unit})")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0] == DEVICE_TIME))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once), handleheight=1.2)
    return figure


def _stage_seconds(found: Findings) -> dict[str, dict[str, float]]:
    """By arm, the mean over its seeds of every stage's seconds."""
    walls: dict[str, list[dict[str, float]]] = {}
    for run in found.results.runs:
        walls.setdefault(run.arm, []).append(run.wall_seconds)
    return {arm: {stage: float(np.mean([w[stage] for w in of])) for stage in STAGES} for arm, of in walls.items()}


def _time_caption(found: Findings) -> str:
    mean = f"Means over the seeds ({found.num_seeds} at most). " if found.num_seeds > 1 else ""
    tuning = " The narrow bar is what the arm's trials took together." if found.results.tuning_wall_seconds else ""
    return (
        f"{mean}Bars are whole stages by the clock, with starting up, logging and saving; the diamond is the device "
        f"time of pretraining and finetuning, from 0 on: seconds in training steps alone.{tuning} Seconds compare only "
        "between runs on one machine that did nothing else."
    )


def _time_alt(found: Findings) -> str:
    totals = ", ".join(f"{arm} {sum(stages.values()):,.0f} s" for arm, stages in _stage_seconds(found).items())
    return f"Stacked bars of wall-clock time per stage and arm. Totals: {totals}."


def _draw_tuning(found: Findings) -> Figure:
    """A panel per arm with a row per trial: a dot, a star for the chosen one, a remark for one that failed."""
    arms, names = _tuned(found), list(found.params.tuning.trials)
    across = min(len(arms), TUNING_COLUMNS)
    rows = math.ceil(len(arms) / across)
    figure = Figure(figsize=(WIDTH, max(rows * (0.17 * len(names) + 0.5) + 0.8, 1.8)), layout="constrained")
    panels = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel()
    metric = score_of(found.params.tuning.metric)
    all_scores, any_failed = [], False
    for axes, choice in zip(panels, arms.values(), strict=False):
        for trial in choice.trials:
            row, score = names.index(trial.name), trial.scores[metric.key]
            any_failed |= trial.failed is not None
            if score is None:
                row_text(axes, 0.97, row, "× failed")
                continue
            axes.plot(metric.times * score, row, **(CHOSEN if trial.name == choice.trial else TRIED))
            all_scores.append(metric.times * score)
        axes.set_title(short(choice.arm, 22), fontsize=8.5)
        axes.tick_params(labelbottom=True)
        axes.tick_params(axis="y", length=0)
    for axes in panels[len(arms) :]:
        axes.remove()
    panels[0].set_yticks(range(len(names)), [short(name, 16) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    if all_scores and min(all_scores) > 0 and max(all_scores) > WIDE * min(all_scores):
        panels[0].set_xscale("log")
        log_values(panels[0].xaxis)
    else:
        panels[0].xaxis.set_major_locator(MaxNLocator(4))
        panels[0].xaxis.set_major_formatter("{x:,.6g}")
    panels[0].margins(x=0.12)
    label_below(list(panels[: len(arms)]), metric.label, columns=across)
    looks = {"chosen": CHOSEN, "tried": TRIED, **({"failed": FAILED} if any_failed else {})}
    handles = [Line2D([], [], linestyle="none", label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _tuned(found: Findings) -> dict[str, Choice]:
    return {arm: choice for arm, choice in found.results.choices.items() if choice.trials}


def _tuning_caption(found: Findings) -> str:
    tuning = found.params.tuning
    return (
        f"Every arm tried the same {len(tuning.trials)} trials with {tuning.budget_fraction:.0%} of the budget each, "
        f"on seed {tuning.seed}, which no other figure uses; the lowest {score_of(tuning.metric).label} was chosen. "
        "One seed: trials that lie close together are not told apart."
    )


def _tuning_alt(found: Findings) -> str:
    chosen = ", ".join(f"{arm} {choice.trial}" for arm, choice in _tuned(found).items())
    return f"{score_of(found.params.tuning.metric).label} of every trial, a panel per arm. Chosen: {chosen}."


TIME = Kind("time.png", "Time per stage", _draw_time, _time_caption, _time_alt)
TUNING = Kind(
    "tuning.png",
    "What tuning tried",
    _draw_tuning,
    _tuning_caption,
    _tuning_alt,
    lambda found: bool(_tuned(found)),
    has_scores=True,
)
