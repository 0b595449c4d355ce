"""Grids of images as PNG files, to look at data and samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from maskdm.data.arrays import Images

MIN_WIDTH = 512  # pixels: small images are enlarged until the grid is at least this wide
GAP = 2  # pixels between images


def save_grid(images: Images, path: Path, columns: int = 8) -> None:
    """Write images as a PNG grid, row by row; small images are enlarged without smoothing.

    Args:
        images: (N, H, W, C) uint8, N ≥ 1, C 1 (grey) or 3 (RGB).
        path: the PNG file.
        columns: images per row; the last row may be shorter.

    Raises:
        ValueError: the images have another shape or dtype.
    """
    if images.ndim != 4 or not len(images) or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(f"expected uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
    columns = min(columns, len(images))
    factor = max(1, math.ceil(MIN_WIDTH / (columns * images.shape[2])))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    number, height, width, channels = images.shape
    down, across = height + GAP, width + GAP
    shape = (GAP + math.ceil(number / columns) * down, GAP + columns * across, channels)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = GAP + index // columns * down, GAP + index % columns * across
        sheet[top : top + height, left : left + width] = image
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(path, format="PNG")
