"""What it cost: seconds of each stage by arm, and every trial of tuning with the chosen one."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from maskdm.report.comparison import Findings
from maskdm.report.figures.axes import Kind, label_below, log_values, panel_figure, row_text
from maskdm.report.figures.looks import MISSING, WIDTH, short
from maskdm.report.results import Choice
from maskdm.report.texts import score_of

# Fill and hatch of each stage, which differ for colour-blind readers and in grey.
STAGES = {
    "pretrain": ("#0072B2", ""),
    "finetune": ("#56B4E9", "////"),
    "sample": ("#E69F00", "...."),
    "evaluate": ("#F0E442", "\\\\\\\\"),
}
DEVICE_TIME = "training steps alone"
ROW_HEIGHT = 0.30  # inches
UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
TUNING_COLUMNS = 4
WIDE = 10.0  # scores of trials that differ by more than this factor are on a logarithmic axis
# Looks of a trial's mark.
CHOSEN: dict[str, Any] = {"marker": "*", "color": "#D55E00", "markersize": 10, "markeredgecolor": "black"}
TRIED: dict[str, Any] = {"marker": "o", "color": "#0072B2", "markersize": 4.5}


def _draw_time(found: Findings) -> Figure:
    arms, seconds, tuning = list(found.params.arms), _stage_seconds(found), found.results.tuning_wall_seconds
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(arms) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    largest = max([*seconds.sum(axis=1), *tuning.values()])
    size, unit = next((size, unit) for least, size, unit in UNITS if largest >= least)
    raised, height = (0.08, 0.46) if tuning else (0.0, 0.62)
    for row, arm in enumerate(arms):
        if arm not in seconds.index:
            row_text(axes, 0.01, row, "missing", style="italic", color=MISSING)
        else:
            left = 0.0
            for stage, (color, hatch) in STAGES.items():
                look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "#222222", "linewidth": 0.5}
                width = seconds.loc[arm, stage] / size
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


def _stage_seconds(found: Findings) -> pd.DataFrame:
    """Seconds by arm (rows, without missing ones) and stage, means over seeds."""
    walls = pd.DataFrame([{"arm": run.arm, **run.wall_seconds} for run in found.results.runs])
    return walls.groupby("arm", sort=False)[list(STAGES)].mean()


def _draw_tuning(found: Findings) -> Figure:
    """A panel per arm with a row per trial: a dot, a star for the chosen one, a remark for one without a score."""
    arms, names = _tuned(found), list(found.params.tuning.trials)
    figure, panels = panel_figure(len(arms), TUNING_COLUMNS, 0.17 * len(names) + 0.5, least=1.8)
    metric, scores = score_of(found.params.tuning.metric), []
    for axes, choice in zip(panels, arms.values(), strict=True):
        for trial in choice.trials:
            row, score = names.index(trial.name), trial.scores.get(metric.key)
            if trial.failed or score is None:
                row_text(axes, 0.97, row, "× failed" if trial.failed else f"no {metric.name}")
                continue
            axes.plot(metric.times * score, row, **(CHOSEN if trial.name == choice.trial else TRIED))
            scores.append(metric.times * score)
        axes.set_title(short(choice.arm, 22), fontsize=8.5)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), [short(name, 16) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    if scores and min(scores) > 0 and max(scores) > WIDE * min(scores):
        panels[0].set_xscale("log")
        log_values(panels[0].xaxis)
    else:
        panels[0].xaxis.set_major_locator(MaxNLocator(4))
        panels[0].xaxis.set_major_formatter("{x:,.6g}")
    panels[0].margins(x=0.12)
    label_below(panels, TUNING_COLUMNS, metric.label)
    looks = {"chosen": CHOSEN, "tried": TRIED}
    handles = [Line2D([], [], linestyle="none", label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _tuned(found: Findings) -> dict[str, Choice]:
    return {arm: choice for arm, choice in found.results.choices.items() if choice.trials}


TIME = Kind("time.png", _draw_time)
TUNING = Kind("tuning.png", _draw_tuning, lambda found: bool(_tuned(found)), has_scores=True)
