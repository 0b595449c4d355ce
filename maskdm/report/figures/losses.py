"""Training losses against compute: whether training went well, not which arm is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskdm.report.figures.axes import compute_label, compute_unit, label_below, legend_below, log_values, scale_compute
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import BASELINES, FLOOR, WIDTH, Look, arm_looks, short

CURVE_POINTS = 200  # of a curve; more is noise
MARKED_POINTS = 7  # of them carry the arm's marker
PANELS = ("masked pretraining: visible patches", "finetuning and scratch: whole images")


def _draw(shown: Shown) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    panels = figure.subplots(1, 2)
    looks = arm_looks(shown.params)
    size, unit = compute_unit(shown.summary["flops"])
    for arm in shown.arms:
        runs = [run for run in shown.results.runs if run.arm == arm]
        for axes, curves in zip(
            panels, ([run.pretrain_curve for run in runs], [run.finetune_curve for run in runs]), strict=True
        ):
            _draw_curve(axes, curves, short(arm), looks[arm], size)
    for axes, title in zip(panels, PANELS, strict=True):
        axes.set_title(title)
        _finish(axes)
    label_below(list(panels), compute_label(unit))
    panels[0].set_ylabel(f"training loss (squared error of {shown.params.diffusion.prediction})")
    legend_below(figure, shown)
    return figure


def _draw_curve(axes: Axes, curves: Sequence[pd.DataFrame], label: str, look: Look, size: float) -> None:
    """The mean over seeds, averaged over bins so that a long curve is a line and not a band of noise."""
    rows = pd.concat(curves)[["step", "flops", "loss"]].astype(float)
    mean = rows.groupby("step", as_index=False).mean()
    bins = np.arange(len(mean)) * min(CURVE_POINTS, len(mean)) // max(len(mean), 1)
    line = mean.groupby(bins).mean()
    if len(line):
        every = max(len(line) // MARKED_POINTS, 1)
        front = 3 if look.color == BASELINES[0] else 2
        marks: dict[str, Any] = {"marker": look.marker, "markersize": 3.5, "markevery": (every // 2, every)}
        axes.plot(line["flops"] / size, line["loss"], label=label, linewidth=1.1, zorder=front, **marks, **look.line)


def _finish(axes: Axes) -> None:
    if axes.lines:
        axes.set_yscale("log")
        log_values(axes.yaxis)
        scale_compute(axes, pd.Series([0.0, 1.0]))  # from the first step on: never logarithmic
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no arm was pretrained", ha="center", va="center", transform=axes.transAxes, color=FLOOR)


def _caption(shown: Shown) -> str:
    return (
        f"{'Averaged over seeds. ' if shown.num_seeds > 1 else ''}Losses of masked pretraining and of whole images are "
        "errors on different problems, and so are those of different mask rates: only the curves on the right compare "
        "with each other. A finetuning curve starts where its pretraining stopped."
    )


def _alt(shown: Shown) -> str:
    ends = ", ".join(f"{arm} {_last_loss(shown, arm):.3g}" for arm in shown.arms)
    return f"Training losses against compute: pretraining, and finetuning, which ended at: {ends}."


def _last_loss(shown: Shown, arm: str) -> float:
    return float(np.mean([run.finetune_curve["loss"].iloc[-1] for run in shown.results.runs if run.arm == arm]))


LOSSES = Kind("losses.png", "Training losses", _draw, _caption, _alt)
