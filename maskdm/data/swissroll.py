"""The Swiss roll of the paper's Figure 2: points (x, y) as images of 1×2 pixels, which go the way of all images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from maskdm.config import DatasetConfig
from maskdm.data.collection import Collection

NUM_POINTS = 20_000  # where the dataset has no limit
TURNS = (0.75, 2.25)  # of the angle: the field's usual roll
RADIUS = 0.88  # of its outer end, in [−1, 1]: six standard deviations of the noise from the border
NOISE = 0.02  # standard deviation of each coordinate in [−1, 1], 2.5 steps of 8 bits


@contextmanager
def open_swissroll(dataset: DatasetConfig) -> Iterator[Collection]:
    """Points on the roll with Gaussian noise, without labels; `dataset.limit` of them, or `NUM_POINTS`.

    Coordinates are rounded to 8 bits, as pixels are: a step is 1/127.5 = 0.0078 in [−1, 1]. Rounding adds an error of
    0.0023 (standard deviation) to noise of `NOISE`, which makes that 0.7 % larger. Another limit gives other points:
    fewer are not the first of more.

    Args:
        dataset: its limit, and the seed that every point depends on.

    Source: the roll of MaskDM (arXiv 2306.11363), figure 2; angles as in scikit-learn's `make_swiss_roll`, uniform over
    `TURNS`. Differs: two dimensions, and no scikit-learn, whose import takes longer than the three lines.
    """
    points = swissroll(dataset.limit or NUM_POINTS, dataset.seed)
    pixels = np.rint((points + 1.0) * 127.5).astype(np.uint8).reshape(-1, 1, 2)
    yield Collection("swissroll", len(pixels), pixels.__getitem__)


def swissroll(num_points: int, seed: int) -> np.ndarray:
    """Points (num_points, 2) in [−1, 1], not yet rounded to 8 bits; equal arguments give equal points."""
    draws = np.random.default_rng(seed)
    turns = draws.uniform(*TURNS, num_points)
    noise = draws.normal(0.0, NOISE, (num_points, 2))
    return np.clip(on_roll(turns) + noise, -1.0, 1.0)


def on_roll(turns: np.ndarray) -> np.ndarray:
    """Where the roll is after so many turns: (N,) → (N, 2); the radius grows with the angle."""
    angle = 2 * np.pi * turns
    radius = RADIUS * turns / TURNS[1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
