"""Samples of all arms from the same seeds, side by side, the real images first."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from maskdm.report.figures.axes import fid_text
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.figures.pixels import as_color, enlarged, lay_out, reduced
from maskdm.report.looks import short
from maskdm.report.results import Run, milestone_key
from maskdm.scoring.headline import flat_scores

COLUMNS = 4
PANEL_PIXELS = 336
IMAGE_GAP = 4


def _draw(shown: Shown) -> Figure:
    runs = _runs(shown)
    panels = [("real images", shown.results.real), *((_title(run, shown), run.samples) for run in runs)]
    side = min(_cells(shown.params.dataset.width), *(math.isqrt(len(images)) for _, images in panels))
    return lay_out([(title, image_grid(images, side)) for title, images in panels], columns=COLUMNS)


def _runs(shown: Shown) -> list[Run]:
    """A run of every arm, with the first seed that it has."""
    first: dict[str, Run] = {}
    for run in shown.results.runs:
        first.setdefault(run.arm, run)
    return list(first.values())


def _title(run: Run, shown: Shown) -> str:
    milestone = run.metrics["milestones"][milestone_key(shown.params.budget.milestones[-1])]
    seed = "" if run.seed == shown.params.seeds[0] else f" (seed {run.seed})"
    headline = shown.headline
    score = headline.times * flat_scores(milestone)[headline.key]
    return f"{short(run.arm, 26)}\n{headline.label} {fid_text(score)}{seed}"


def _cells(image_size: int) -> int:
    """Images along a panel's side."""
    return next((cells for size, cells in ((16, 8), (64, 5)) if image_size <= size), 4)


def image_grid(images: np.ndarray, side: int) -> np.ndarray:
    """The first side² images as one picture of about `PANEL_PIXELS`, enlarged by nearest neighbour.

    Args:
        images: (N, H, W, C) uint8, N ≥ side².
        side: images along each side.

    Returns:
        (height, width, 3) uint8, images one gap apart on white.
    """
    size = max(images.shape[1:3])
    space = (PANEL_PIXELS + IMAGE_GAP) // side - IMAGE_GAP
    scaled = enlarged if space >= size else reduced
    factor = max(space // size, 1) if space >= size else math.ceil(size / space)
    edge = ((0, IMAGE_GAP), (0, IMAGE_GAP), (0, 0))
    cells = [np.pad(scaled(i, factor), edge, constant_values=255) for i in as_color(images[: side**2])]
    rows = [np.concatenate(cells[row * side : (row + 1) * side], axis=1) for row in range(side)]
    return np.concatenate(rows)[:-IMAGE_GAP, :-IMAGE_GAP]


def _caption(shown: Shown) -> str:
    return (
        f"Real images, and samples at the end of the budget, seed {shown.params.seeds[0]}: the same cell holds the "
        "same image seed in every arm; none was selected. Scores are those of this seed."
    )


def _alt(shown: Shown) -> str:
    return f"Grids of real images and of samples of {', '.join(shown.arms)}."


SAMPLES = Kind("samples.png", "Samples of every arm from the same seeds", _draw, _caption, _alt, has_scores=True)
