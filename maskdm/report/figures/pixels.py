"""Pictures laid out pixel by pixel: any resampling would blur what is to be compared."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from maskdm.report.looks import DPI, WIDTH

GAP = 12  # pixels between panels
LINE_HEIGHT = 25  # pixels of a line of a title of 8 points
PAGE_PIXELS = round(WIDTH * DPI)


def as_color(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 1 or 3) as (N, H, W, 3)."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def lay_out(panels: list[tuple[str, np.ndarray]], columns: int) -> Figure:
    """Panels with titles (one or two lines) in rows, on the page's width, or wider where they need it.

    Args:
        panels: titles, and images (H, W, 3) uint8.
        columns: panels in a row.
    """
    height, width = (max(picture.shape[axis] for _, picture in panels) for axis in (0, 1))
    rows, title = math.ceil(len(panels) / columns), LINE_HEIGHT * max(t.count("\n") + 1 for t, _ in panels) + 8
    gap = max((PAGE_PIXELS - columns * width) // (columns + 1), GAP)
    total = max(columns * (width + gap) + gap, PAGE_PIXELS), rows * (height + title + GAP)
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI))
    for index, (name, picture) in enumerate(panels):
        left = gap + (index % columns) * (width + gap)
        top = title + (index // columns) * (height + title + GAP)
        high, wide = picture.shape[:2]
        axes = figure.add_axes((left / total[0], 1 - (top + high) / total[1], wide / total[0], high / total[1]))
        axes.imshow(picture, interpolation="none", aspect="auto")
        axes.set_axis_off()
        # Line by line: a text of two lines stands lower or higher by its letters.
        for up, line in enumerate(reversed(name.split("\n"))):
            figure.text(left / total[0], 1 - (top - 8 - up * LINE_HEIGHT) / total[1], line, fontsize=8)
    return figure


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel of (H, W, …) a square of factor × factor."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def reduced(image: np.ndarray, factor: int) -> np.ndarray:
    """Squares of factor × factor pixels of (H, W, 3) averaged; what is left over at the edges is cut."""
    height, width = (side // factor for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)
