"""The four figures, drawn without a display; equal inputs give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from maskdm.config import Params
from maskdm.report.looks import (
    BASELINES,
    FLOOR,
    NO_MASKING,
    STYLE,
    Look,
    arm_looks,
    families,
    rate_lines,
)
from maskdm.report.results import Results, Run, milestone_key
from maskdm.report.tables import decimals, reference_arm

FIGURES = ("fid_vs_mask_rate.png", "fid_vs_flops.png", "losses.png", "samples.png")
COMPUTE_LABEL = "training compute, pretraining included (TFLOPs)"
FEW_ARMS = 8  # more would hide each other in one panel
CURVE_POINTS = 200  # of a loss curve; more is noise
SIDE_STEP = 0.006  # of mask rate
PANEL_PIXELS = 320
SAMPLES_DPI = 100


def draw_figures(params: Params, results: Results, summary: pd.DataFrame, folder: Path) -> None:
    """Draw every figure of `FIGURES` into a folder."""
    with matplotlib.style.context(STYLE, after_reset=True):
        _save(fid_vs_mask_rate(params, summary), folder / "fid_vs_mask_rate.png")
        _save(fid_vs_flops(params, summary), folder / "fid_vs_flops.png")
        _save(losses(params, results), folder / "losses.png")
        _save(samples(params, results), folder / "samples.png", dpi=SAMPLES_DPI)


def _save(figure: Figure, file: Path, dpi: int = 150) -> None:
    # No software version inside: equal figures, equal bytes.
    figure.savefig(file, dpi=dpi, backend="agg", metadata={"Software": None})


def fid_vs_mask_rate(params: Params, summary: pd.DataFrame) -> Figure:
    """The final FID against the realised mask rate: a line per strategy and block size, bars for seeds."""
    last = summary[summary["milestone"] == summary["milestone"].max()]
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    lines = rate_lines(params)
    for index, (keys, (label, look)) in enumerate(lines.items()):
        points = _fid_range(last[last["arm"].isin(keys)], by="realised_mask_rate")
        # Lines that share a rate would hide each other's bars.
        _draw_rate_line(axes, points, _short(label), look, SIDE_STEP * (index - (len(lines) - 1) / 2))
    _draw_reference(axes, last)
    axes.set(xlabel="realised mask rate in pretraining", ylabel="FID after the whole budget", xlim=(-0.03, 1))
    _finish_fid_axes(axes, last["fid"], float(summary["fid_floor"].mean()))
    figure.legend(loc="outside right upper")
    return figure


def _fid_range(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """The mean and the range of the seeds' FIDs."""
    return rows.groupby(by)["fid"].agg(["mean", "min", "max"])


def _draw_rate_line(axes: Axes, points: pd.DataFrame, label: str, look: Look, shift: float) -> None:
    rates = points.index + shift
    axes.plot(rates, points["mean"], marker=look.marker, label=label, **look.line)
    axes.vlines(rates, points["min"], points["max"], color=look.color, linewidth=1.2)


def _draw_reference(axes: Axes, last: pd.DataFrame) -> None:
    """Scratch as a horizontal line, its seeds' range as a band."""
    reference = reference_arm(last)
    if reference is not None:
        fids = last.loc[last["arm"] == reference, "fid"]
        axes.axhline(fids.mean(), color="black", linewidth=1.5, label=f"{reference} ({_fid(fids.mean())})")
        axes.axhspan(fids.min(), fids.max(), color="black", alpha=0.08, linewidth=0)


def _finish_fid_axes(axes: Axes, fids: pd.Series, floor: float) -> None:
    """Scale the FID axis to the arms, and draw the floor, a dotted line, or say that it is far below."""
    low, high = float(fids.min()), float(fids.max())
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    # The differences between the arms are the question: a floor far below them must not flatten them.
    is_log = axes.get_yscale() == "log"
    if floor > low / 10 if is_log else low - floor <= max(high - low, 0.05 * high):
        axes.axhline(floor, color=FLOOR, linestyle=":", label=f"floor: real vs real ({_fid(floor)})")
    else:
        axes.margins(y=0.1)  # room for the note under the lowest point
        note = f"↓ far below: floor, real vs real ({_fid(floor)})"
        axes.text(0.01, 0.015, note, transform=axes.transAxes, color=FLOOR, fontsize=9, va="bottom")


def _fid(value: float) -> str:
    return f"{value:.{decimals(pd.Series([value]))}f}"


def fid_vs_flops(params: Params, summary: pd.DataFrame) -> Figure:
    """FID against the compute spent at each milestone: the mean's line, the seeds' range as a band."""
    groups = _panel_groups(params, reference_arm(summary))
    columns = min(len(groups), 3)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(
        figsize=(8.2 if columns == 1 else 3.1 * columns + 2, 4.6 if rows == 1 else 3.1 * rows),
        layout="constrained",
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    looks = arm_looks(params)
    for axes, (title, keys) in zip(panels, groups.items(), strict=False):
        for key in keys:
            _draw_progress(axes, summary[summary["arm"] == key], key, looks[key])
        axes.set_title(title)
        axes.tick_params(labelbottom=True)  # a shared axis hides them even above an empty place
        _compute_axis(axes)
        _finish_fid_axes(axes, summary["fid"], float(summary["fid_floor"].mean()))
    for axes in panels[len(groups) :]:
        axes.remove()
    figure.supxlabel(COMPUTE_LABEL, fontsize=10)
    figure.supylabel("FID", fontsize=10)
    _legend_once(figure, params)
    return figure


def _panel_groups(params: Params, reference: str | None) -> dict[str, list[str]]:
    """The arms of each panel: all in one, or with many arms a panel per family, scratch in each."""
    if len(params.arms) <= FEW_ARMS:
        return {"": list(params.arms)}
    groups = {name: keys for name, keys in families(params).items() if name != NO_MASKING or len(keys) > 1}
    return {n: ([] if reference is None or reference in keys else [reference]) + keys for n, keys in groups.items()}


def _draw_progress(axes: Axes, rows: pd.DataFrame, label: str, look: Look) -> None:
    points = _fid_range(rows, by="milestone")
    tflops = rows.groupby("milestone")["flops"].mean() / 1e12
    front = 3 if look.color == BASELINES[0] else 2  # scratch is what the others are compared with
    axes.plot(tflops, points["mean"], marker=look.marker, label=_short(label), zorder=front, **look.line)
    axes.fill_between(tflops, points["min"], points["max"], color=look.color, alpha=0.13, linewidth=0)
    axes.plot(rows["flops"] / 1e12, rows["fid"], look.marker, color=look.color, markersize=3, alpha=0.6)


def _compute_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _legend_once(figure: Figure, params: Params) -> None:
    """One legend beside the panels: each arm once, in the order of params.yaml, the floor last."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    arms = [_short(arm) for arm in params.arms]
    labels = sorted(entries, key=lambda label: arms.index(label) if label in arms else len(arms))
    handles = [entries[label] for label in labels]
    figure.legend(handles=handles, labels=labels, loc="outside right upper")


def losses(params: Params, results: Results) -> Figure:
    """Pretraining and finetuning losses against compute, averaged over seeds, in panels of their own."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    looks = arm_looks(params)
    for key in params.arms:
        runs = [run for run in results.runs if run.arm == key]
        _draw_losses(panels[0], [run.pretrain_curve for run in runs], _short(key), looks[key])
        _draw_losses(panels[1], [run.finetune_curve for run in runs], _short(key), looks[key])
    panels[0].set_title("masked pretraining: loss on the visible patches")
    panels[1].set_title("finetuning and scratch: loss on whole images")
    for axes in panels:
        _finish_loss_axes(axes, params.diffusion.prediction)
    _legend_once(figure, params)
    return figure


def _draw_losses(axes: Axes, curves: Sequence[pd.DataFrame], label: str, look: Look) -> None:
    """The mean over seeds, averaged over bins so that a long curve is a line and not a band of noise."""
    rows = pd.concat(curves)[["step", "flops", "loss"]].astype(float)
    mean = rows.groupby("step", as_index=False).mean()
    bins = np.arange(len(mean)) * min(CURVE_POINTS, len(mean)) // max(len(mean), 1)
    line = mean.groupby(bins).mean()
    if len(line):
        axes.plot(line["flops"] / 1e12, line["loss"], label=label, **(look.line | {"linewidth": 1.4}))


def _finish_loss_axes(axes: Axes, prediction: str) -> None:
    axes.set(xlabel=COMPUTE_LABEL, ylabel=f"training loss (squared error of {prediction})")
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _compute_axis(axes)
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no arm was pretrained", ha="center", va="center", transform=axes.transAxes, color=FLOOR)


def samples(params: Params, results: Results) -> Figure:
    """Real images, then each arm's final samples with the first seed: equal cells hold equal image seeds."""
    shown = [run for run in results.runs if run.seed == params.seeds[0]]
    panels = [("real", results.real), *((_panel_title(run, params), run.samples) for run in shown)]
    side = min(_cells(params.dataset.image_size), *(math.isqrt(len(images)) for _, images in panels))
    grids = [(title, image_grid(images, side)) for title, images in panels]
    return _lay_out(grids, columns=min(len(grids), 4))


def _panel_title(run: Run, params: Params) -> str:
    milestone = run.metrics["milestones"][milestone_key(params.budget.milestones[-1])]
    return f"{_short(run.arm)}\nFID {_fid(milestone['fid'])}"


def _cells(image_size: int) -> int:
    """Images along a panel's side."""
    return next((cells for size, cells in ((16, 8), (64, 5)) if image_size <= size), 4)


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def image_grid(images: np.ndarray, side: int) -> np.ndarray:
    """The first side² images as one picture of about `PANEL_PIXELS`, enlarged by nearest neighbour.

    Args:
        images: (N, H, W, C) uint8, N ≥ side².
        side: images along each side.

    Returns:
        (height, width, 3) uint8, images one gap apart on white.
    """
    colored = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    size = max(images.shape[1:3])
    scale = max(PANEL_PIXELS // (side * size), 1)
    gap = 4
    cells = [
        np.pad(_scaled(i, scale, size * side), ((0, gap), (0, gap), (0, 0)), constant_values=255)
        for i in colored[: side**2]
    ]
    return np.concatenate([np.concatenate(cells[r * side : (r + 1) * side], axis=1) for r in range(side)])[:-gap, :-gap]


def _scaled(image: np.ndarray, scale: int, grid_pixels: int) -> np.ndarray:
    """One image enlarged by repeating pixels, or, where a panel would be huge, reduced by averaging them."""
    if grid_pixels < 2 * PANEL_PIXELS:
        return image.repeat(scale, axis=0).repeat(scale, axis=1)
    factor = grid_pixels // PANEL_PIXELS
    height, width = (s // factor for s in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def _lay_out(grids: list[tuple[str, np.ndarray]], columns: int) -> Figure:
    """Place the grids pixel by pixel: any resampling would blur what is to be compared."""
    height, width = (max(grid.shape[axis] for _, grid in grids) for axis in (0, 1))
    rows, title, gap = math.ceil(len(grids) / columns), 40, 14
    total = np.array([columns * (width + gap) + gap, rows * (height + title + gap)])
    figure = Figure(figsize=tuple(total / SAMPLES_DPI))
    for index, (name, grid) in enumerate(grids):
        left = gap + (index % columns) * (width + gap)
        top = title + (index // columns) * (height + title + gap)
        box = (
            left / total[0],
            1 - (top + grid.shape[0]) / total[1],
            grid.shape[1] / total[0],
            grid.shape[0] / total[1],
        )
        axes = figure.add_axes(box)
        axes.imshow(grid, interpolation="none", aspect="auto")
        axes.set_axis_off()
        axes.set_title(name, fontsize=10, loc="left", pad=4)
    return figure
