"""The Swiss roll of the paper's Figure 2: points (x, y) as images of 1×2 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from maskdm.config import DatasetConfig
from maskdm.data.collection import Collection

NUM_POINTS = 20_000  # if the dataset has no limit
TURNS = (0.75, 2.25)  # range of the angle, in turns: the usual roll
RADIUS = 0.88  # of its outer end, in [−1, 1]; the border is six standard deviations of the noise away
NOISE = 0.02  # standard deviation of each coordinate in [−1, 1]: 2.5 steps of 8 bits


@contextmanager
def open_swissroll(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open `dataset.limit` (or `NUM_POINTS`) points on the roll with Gaussian noise, without labels.

    Coordinates are rounded to 8 bits, as pixels are: a step is 1/127.5 = 0.0078 in [−1, 1]. The rounding error has a
    standard deviation of 0.0023, which increases that of the noise by 0.7 %. Another `limit` gives other points, not a
    subset.

    Source: MaskDM (arXiv 2306.11363), figure 2; angles uniform over `TURNS`, as in scikit-learn's `make_swiss_roll`.
    Differs: two dimensions.
    """
    points = swissroll(dataset.limit or NUM_POINTS, dataset.seed)
    pixels = np.rint((points + 1.0) * 127.5).astype(np.uint8).reshape(-1, 1, 2)
    yield Collection("swissroll", len(pixels), pixels.__getitem__)


def swissroll(num_points: int, seed: int) -> np.ndarray:
    """Points (num_points, 2) in [−1, 1], not rounded to 8 bits; equal arguments give equal points."""
    draws = np.random.default_rng(seed)
    turns = draws.uniform(*TURNS, num_points)
    noise = draws.normal(0.0, NOISE, (num_points, 2))
    return np.clip(on_roll(turns) + noise, -1.0, 1.0)


def on_roll(turns: np.ndarray) -> np.ndarray:
    """The roll's points at angles given in turns: (N,) → (N, 2); the radius grows with the angle."""
    angle = 2 * np.pi * turns
    radius = RADIUS * turns / TURNS[1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
