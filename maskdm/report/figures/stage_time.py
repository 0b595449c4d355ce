"""Where the time went: seconds of each stage by arm, tuning beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskdm.report.figures.axes import row_text
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import MISSING, WIDTH, short

# Fill and hatch of each stage, apart for the colour-blind and in grey.
STAGES = {
    "pretrain": ("#0072B2", ""),
    "finetune": ("#56B4E9", "////"),
    "sample": ("#E69F00", "...."),
    "evaluate": ("#F0E442", "\\\\\\\\"),
}
TUNING = ("#FFFFFF", "xxxx")
DEVICE_TIME = "in training steps"
ROW_HEIGHT = 0.30  # inches
UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))


def _draw(shown: Shown) -> Figure:
    arms = list(shown.params.arms)
    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(arms) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    seconds = _stage_seconds(shown)
    tuning = shown.results.tuning_wall_seconds
    largest = max([sum(stages.values()) for stages in seconds.values()] + list(tuning.values()))
    size, unit = next((size, unit) for least, size, unit in UNITS if largest >= least)
    for row, arm in enumerate(arms):
        if arm not in seconds:
            row_text(axes, 0.01, row, "missing", style="italic", color=MISSING)
        else:
            _draw_stages(axes, row, {s: v / size for s, v in seconds[arm].items()}, beside=bool(tuning))
            _draw_device_time(axes, row, shown.compared[arm].device_seconds / size, beside=bool(tuning))
        if arm in tuning:
            look: dict[str, Any] = {"color": TUNING[0], "hatch": TUNING[1], "edgecolor": "#555555", "linewidth": 0.5}
            axes.barh(row + 0.28, tuning[arm] / size, 0.2, label="tuning, all trials", **look)
    axes.set_yticks(range(len(arms)), [short(arm) for arm in arms])
    axes.set(ylim=(len(arms) - 0.4, -0.6), xlim=(0, None), xlabel=f"wall-clock time ({unit})")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    _legend(figure, axes)
    return figure


def _stage_seconds(shown: Shown) -> dict[str, dict[str, float]]:
    """By arm, the mean over its seeds of every stage's seconds."""
    return {
        arm: {
            stage: float(np.mean([run.wall_seconds[stage] for run in shown.results.runs if run.arm == arm]))
            for stage in STAGES
        }
        for arm in shown.arms
    }


def _draw_stages(axes: Axes, row: int, stages: dict[str, float], beside: bool) -> None:
    left, center, height = 0.0, row - 0.08 * beside, 0.46 if beside else 0.62
    for stage, (color, hatch) in STAGES.items():
        look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "#222222", "linewidth": 0.5}
        axes.barh(center, stages[stage], height, left=left, label=stage, **look)
        left += stages[stage]


def _draw_device_time(axes: Axes, row: int, seconds: float, beside: bool) -> None:
    place = row - 0.08 * beside
    look: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 5.5, "zorder": 3}
    axes.plot([seconds], [place], "D", label=DEVICE_TIME, **look)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0] == DEVICE_TIME))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once), handleheight=1.2)


def _caption(shown: Shown) -> str:
    mean = f"Means over the seeds ({shown.num_seeds} at most). " if shown.num_seeds > 1 else ""
    tuning = " The narrow bar is what the arm's trials took together." if shown.results.tuning_wall_seconds else ""
    return (
        f"{mean}Bars are whole stages by the clock, with starting up, logging and saving; the diamond is the device "
        f"time of pretraining and finetuning, from 0 on: seconds in training steps alone.{tuning} Seconds compare only "
        "between runs on one machine that did nothing else."
    )


def _alt(shown: Shown) -> str:
    totals = ", ".join(f"{arm} {sum(stages.values()):,.0f} s" for arm, stages in _stage_seconds(shown).items())
    return f"Stacked bars of wall-clock time per stage and arm. Totals: {totals}."


TIME = Kind("time.png", "Time per stage", _draw, _caption, _alt)
