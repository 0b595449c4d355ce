"""The headline's score, FID as a rule, against the compute spent, and where an arm crosses scratch's final one."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maskdm.report.figures.axes import (
    compute_label,
    compute_unit,
    fid_text,
    label_below,
    legend_below,
    panel_figure,
    scale_compute,
    scale_scores,
)
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import BASELINES, NO_MASKING, Look, arm_looks, families, short
from maskdm.report.statistics import estimate

FEW_ARMS, FEW_BANDS = 8, 4  # more lines, or lines with bands, would hide each other in one panel


def _draw(shown: Shown) -> Figure:
    reference = shown.reference
    groups = _panel_groups(shown, reference)
    figure, panels = panel_figure(len(groups), height=2.6 if len(groups) > 1 else 3.6)
    looks, bands, score = arm_looks(shown.params), _bands(shown), shown.headline
    size, unit = compute_unit(bands["flops"])
    for axes, (title, arms) in zip(panels, groups.items(), strict=True):
        for arm in arms:
            _draw_arm(axes, bands.loc[[arm]], shown.summary[shown.summary["arm"] == arm], score.key, looks[arm], size)
        if reference is not None:
            _draw_target(axes, reference, score.name, float(bands.loc[[reference], "mean"].iloc[-1]))
        axes.set_title(title)
        scale_compute(axes, bands["flops"] / size)
        scale_scores(axes, shown.summary[score.key], shown.results.scale_of(score.key))
    label_below(panels, compute_label(unit))
    for axes in panels[::3]:
        axes.set_ylabel(score.name)
    legend_below(figure, shown)
    return figure


def _panel_groups(shown: Shown, reference: str | None) -> dict[str, list[str]]:
    """The arms of each panel: all in one, or with many arms a panel per family, scratch in each."""
    if len(shown.arms) <= (FEW_ARMS if shown.num_seeds == 1 else FEW_BANDS):
        return {"": shown.arms}
    present = {name: [a for a in arms if a in shown.arms] for name, arms in families(shown.params).items()}
    groups = {name: arms for name, arms in present.items() if len(arms) > (name == NO_MASKING)}
    return {n: ([] if reference is None or reference in arms else [reference]) + arms for n, arms in groups.items()}


def _bands(shown: Shown) -> pd.DataFrame:
    """By arm, a row per milestone: flops, the mean score, and the band around it."""
    rows = []
    for (arm, _), at in shown.summary.groupby(["arm", "milestone"], sort=True):
        mean, low, high = band(at[shown.headline.key])
        rows.append({"arm": arm, "flops": at["flops"].mean(), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows).set_index("arm")


def band(values: pd.Series) -> tuple[float, float, float]:
    """The mean, and its 95 % t-interval with three values or more, else their range."""
    found = estimate(values.to_numpy())
    if found.has_interval:
        return found.mean, found.low, found.high
    return found.mean, float(values.min()), float(values.max())


def _draw_arm(axes: Axes, points: pd.DataFrame, rows: pd.DataFrame, key: str, look: Look, size: float) -> None:
    front = 3 if look.color == BASELINES[0] else 2  # scratch is what the others are compared with
    flops, name = points["flops"] / size, short(str(points.index[0]))
    axes.plot(flops, points["mean"], marker=look.marker, label=name, zorder=front, **look.line)
    axes.fill_between(flops, points["low"], points["high"], color=look.color, alpha=0.10, linewidth=0)
    if rows["seed"].nunique() > 1:
        axes.plot(rows["flops"] / size, rows[key], look.marker, color=look.color, markersize=2.2, alpha=0.7)


def _draw_target(axes: Axes, reference: str, name: str, score: float) -> None:
    label = f"{short(reference)}'s final {name} ({fid_text(score)})"
    axes.axhline(score, color="black", linestyle="--", linewidth=0.9, label=label)


def _caption(shown: Shown) -> str:
    several = {1: "One seed: no band.", 2: "Lines are means of two seeds, bands their range, small points the seeds."}
    many = (
        "Lines are means over seeds, bands the mean's 95 % t-interval (range with two seeds), small points the seeds."
    )
    reference = shown.reference
    crossing = (
        ""
        if reference is None
        else f" Where a line goes below the dashed one, its arm has reached {reference}'s final {shown.headline.name}."
    )
    return (
        "Each point is a milestone, its compute that of pretraining and finetuning together. "
        f"{several.get(shown.num_seeds, many)}{crossing} The axes need not start at zero."
    )


def _alt(shown: Shown) -> str:
    means = shown.final.groupby("arm", sort=False)[shown.headline.key].mean()
    ends = ", ".join(f"{arm} {fid_text(score)}" for arm, score in means.items())
    return f"Lines of {shown.headline.name} against training compute, one per arm. At the end of the budget: {ends}."


FID_VS_COMPUTE = Kind("fid_vs_compute.png", "{score} against training compute", _draw, _caption, _alt, has_scores=True)
