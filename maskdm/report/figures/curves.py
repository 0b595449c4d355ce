"""Lines against the compute spent: the headline's score (FID, except for points), and the training losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskdm.report.comparison import Findings
from maskdm.report.figures.axes import (
    COMPUTE,
    Kind,
    band,
    compute_unit,
    label_below,
    legend_below,
    log_values,
    panel_figure,
    scale_compute,
)
from maskdm.report.figures.looks import FLOOR, NO_MASKING, WIDTH, Look, arm_looks, family, short
from maskdm.report.numbers import score_text

PANEL_COLUMNS = 3
FEW_ARMS, FEW_BANDS = 8, 4  # more lines, or lines with bands, would hide each other in one panel
LOG_FROM = 3.0  # an axis of scores whose values differ by more than this factor is logarithmic
CURVE_POINTS = 200  # of a loss curve; more is noise
MARKED_POINTS = 7  # of a loss curve have the arm's marker
LOSS_PANELS = ("masked pretraining: visible patches", "finetuning and scratch: whole images")


def _draw_scores(found: Findings) -> Figure:
    reference, score, looks = found.baseline, found.headline, arm_looks(found.params)
    groups = _panel_groups(found, reference)
    figure, panels = panel_figure(len(groups), PANEL_COLUMNS, row_height=2.6 if len(groups) > 1 else 3.6)
    groups_of = found.summary.groupby(["arm", "milestone"], sort=True)
    rows = [(arm, at["flops"].mean(), *band(at[score.key])) for (arm, _), at in groups_of]
    bands = pd.DataFrame(rows, columns=["arm", "flops", "mean", "low", "high"]).set_index("arm")
    size, unit = compute_unit(bands["flops"])
    for axes, (title, arms) in zip(panels, groups.items(), strict=True):
        for arm in arms:
            of_arm, look, at = found.summary[found.summary["arm"] == arm], looks[arm], bands.loc[[arm]]
            flops = at["flops"] / size
            axes.plot(flops, at["mean"], marker=look.marker, label=short(arm), **look.line)
            axes.fill_between(flops, at["low"], at["high"], color=look.color, alpha=0.10, linewidth=0)
            if of_arm["seed"].nunique() > 1:
                small: dict[str, Any] = {"color": look.color, "markersize": 2.2, "alpha": 0.7}
                axes.plot(of_arm["flops"] / size, of_arm[score.key], look.marker, **small)
        if reference is not None:
            target = float(bands.loc[[reference], "mean"].iloc[-1])
            label = f"{short(reference)}'s final {score.name} ({score_text(target)})"
            axes.axhline(target, color="black", linestyle="--", linewidth=0.9, label=label)
        axes.set_title(title)
        scale_compute(axes, bands["flops"] / size)
        _scale_scores(axes, found.summary[score.key], found.results.scale_of(score.key))
    label_below(panels, PANEL_COLUMNS, COMPUTE.format(unit))
    figure.supylabel(score.name)
    legend_below(figure, found)
    return figure


def _panel_groups(found: Findings, reference: str | None) -> dict[str, list[str]]:
    """The arms of each panel: all in one, or if there are many, a panel per family, each with scratch."""
    if len(found.arms) <= (FEW_ARMS if found.num_seeds == 1 else FEW_BANDS):
        return {"": found.arms}
    groups: dict[str, list[str]] = {family(config): [] for config in found.params.arms.values()}
    for arm in found.arms:
        groups[family(found.params.arm(arm))].append(arm)
    return {
        name: ([] if reference is None or reference in arms else [reference]) + arms
        for name, arms in groups.items()
        if len(arms) > (name == NO_MASKING)
    }


def _scale_scores(axes: Axes, scores: pd.Series, ends: dict[str, float]) -> None:
    """An axis that fits the arms, because their differences are the question.

    Both ends of the scale, the floor and the untrained network, are lines where they are near, otherwise remarks.
    """
    low, high = float(scores.min()), float(scores.max())
    is_log = low > 0 and high > LOG_FROM * low
    if is_log:
        axes.set_yscale("log")
        log_values(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter("{x:,.10g}")
    floor, untrained = ends["floor"], ends["untrained"]
    room = max(high - low, 0.1 * high)
    axes.margins(y=0.12)  # for the remarks
    if floor > low / LOG_FROM if is_log else low - floor <= 0.6 * room:
        axes.axhline(floor, color=FLOOR, linestyle=":", label=f"floor: real against real ({score_text(floor)})")
    else:
        _remark(axes, f"↓ floor, real against real: {score_text(floor)}", 0.015, "bottom")
    if untrained < high * LOG_FROM if is_log else untrained - high <= 0.6 * room:
        axes.axhline(untrained, color=FLOOR, linestyle=(0, (1, 4)), label=f"untrained ({score_text(untrained)})")
    else:
        _remark(axes, f"↑ untrained: {score_text(untrained)}", 0.985, "top")


def _remark(axes: Axes, text: str, height: float, side: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    axes.text(0.99, height, text, transform=axes.transAxes, color=FLOOR, fontsize=8, va=side, ha="right", bbox=box)


def _draw_losses(found: Findings) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    panels, looks = figure.subplots(1, 2), arm_looks(found.params)
    size, unit = compute_unit(found.summary["flops"])
    for arm in found.arms:
        runs = [run for run in found.results.runs if run.arm == arm]
        _draw_loss(panels[0], [run.pretrain_curve for run in runs], short(arm), looks[arm], size)
        _draw_loss(panels[1], [run.finetune_curve for run in runs], short(arm), looks[arm], size)
    for axes, title in zip(panels, LOSS_PANELS, strict=True):
        axes.set_title(title)
        if axes.lines:
            axes.set_yscale("log")
            log_values(axes.yaxis)
            scale_compute(axes, pd.Series([0.0, 1.0]))  # from the first step on: never logarithmic
        else:
            axes.set(xticks=[], yticks=[])
            look: dict[str, Any] = {"ha": "center", "va": "center", "color": FLOOR}
            axes.text(0.5, 0.5, "no arm was pretrained", transform=axes.transAxes, **look)
    label_below(list(panels), 2, COMPUTE.format(unit))
    panels[0].set_ylabel(f"training loss (squared error of {found.params.diffusion.prediction})")
    legend_below(figure, found)
    return figure


def _draw_loss(axes: Axes, curves: Sequence[pd.DataFrame], label: str, look: Look, size: float) -> None:
    """The mean over seeds, averaged over bins so that a long curve is a line and not a band of noise."""
    rows = pd.concat(curves)[["step", "flops", "loss"]].astype(float)
    mean = rows.groupby("step", as_index=False).mean()
    bins = np.arange(len(mean)) * min(CURVE_POINTS, len(mean)) // max(len(mean), 1)
    line = mean.groupby(bins).mean()
    if len(line):
        every = max(len(line) // MARKED_POINTS, 1)
        marks: dict[str, Any] = {"marker": look.marker, "markersize": 3.5, "markevery": (every // 2, every)}
        axes.plot(line["flops"] / size, line["loss"], label=label, linewidth=1.1, **marks, **look.line)


FID_VS_COMPUTE = Kind("fid_vs_compute.png", _draw_scores, has_scores=True)
LOSSES = Kind("losses.png", _draw_losses)
