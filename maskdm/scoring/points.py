"""Distances between two sets of points of few dimensions, which see what a Fréchet distance of two Gaussians does not.

All are 0 between equal sets and grow with every difference of their distributions. Between two finite sets of the same
distribution they are above 0: `sampling_floor` says by how much. How to add one: see `maskdm.scoring.headline`.

Source: Rubner et al. 2000 (Wasserstein-1 in one dimension: the area between the distribution functions), Bonneel et al.
2015 (sliced Wasserstein), Székely and Rizzo 2013 (energy distance).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from maskdm.config import Params

MAX_DIMENSIONS = 16
NUM_PROJECTIONS = 64
FLOOR_DRAWS = 10
MAX_POINTS = 4000  # of each set in the energy distance, which looks at all pairs
PAIRS_AT_ONCE = 2**22  # 32 MiB of distances


def apply_to(params: Params) -> bool:
    """Whether an experiment is scored by these distances: on pixel values, of images with few enough of them."""
    return params.evaluation.features == "pixels" and math.prod(params.dataset.shape) <= MAX_DIMENSIONS


def points_of(images: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W, C) as points (N, H·W·C) in [−1, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1.0


def distances(points: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Every distance between two sets of points, in the units of their coordinates.

    Args:
        points: (N, D).
        real: (M, D).

    Returns:
        by name, in the order in which they are shown: Wasserstein-1 of every coordinate alone, sliced Wasserstein-1,
        and the energy distance.

    Raises:
        ValueError: the dimensions differ, a set is empty, or D is more than `MAX_DIMENSIONS`.
    """
    if points.ndim != 2 or real.ndim != 2 or points.shape[1] != real.shape[1] or not len(points) or not len(real):
        raise ValueError(f"expected (N, D) and (M, D), got {points.shape} and {real.shape}")
    if points.shape[1] > MAX_DIMENSIONS:
        raise ValueError(f"expected at most {MAX_DIMENSIONS} dimensions, got {points.shape[1]}")
    return {
        **{f"marginal_{i}": value for i, value in enumerate(marginal_wasserstein(points, real))},
        "sliced_wasserstein": sliced_wasserstein(points, real),
        "energy": energy_distance(points, real),
    }


def marginal_wasserstein(points: np.ndarray, real: np.ndarray) -> list[float]:
    """Wasserstein-1 between the distributions of each coordinate."""
    from scipy.stats import wasserstein_distance  # most experiments have no use for SciPy

    return [float(wasserstein_distance(points[:, i], real[:, i])) for i in range(points.shape[1])]


def sliced_wasserstein(points: np.ndarray, real: np.ndarray) -> float:
    """The mean Wasserstein-1 over projections on `NUM_PROJECTIONS` directions, the same in every call.

    Source: Bonneel et al. 2015, equation 8, with the absolute in the place of the squared distance.
    """
    directions = np.random.default_rng(0).normal(size=(NUM_PROJECTIONS, points.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean(marginal_wasserstein(points @ directions.T, real @ directions.T)))


def energy_distance(points: np.ndarray, real: np.ndarray) -> float:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ of at most `MAX_POINTS` of both, drawn at random; never negative.

    Source: Székely and Rizzo 2013, equation 5, pairs of a point with itself included.
    """
    points, real = _at_most(MAX_POINTS, points), _at_most(MAX_POINTS, real)
    within = _mean_distance(points, points) + _mean_distance(real, real)
    return max(2 * _mean_distance(points, real) - within, 0.0)  # rounding


def _at_most(count: int, points: np.ndarray) -> np.ndarray:
    """All points, or so many of them: the same in every call."""
    return points if len(points) <= count else points[np.random.default_rng(0).permutation(len(points))[:count]]


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.spatial.distance import cdist

    rows = max(1, PAIRS_AT_ONCE // len(b))
    total = sum(float(cdist(a[start : start + rows], b).sum()) for start in range(0, len(a), rows))
    return total / (len(a) * len(b))


def sampling_floor(real: np.ndarray, num_points: int) -> dict[str, Any]:
    """What real points in the place of samples get against the other real ones: about what a perfect model would.

    Args:
        real: (M, D), M ≥ 2.
        num_points: of the samples that it is the scale for; at most half of the real ones are taken.

    Returns:
        `mean` and `std` of every distance over `draws` random splits, and `num_samples`, the points in the place of
        samples.
    """
    count = min(num_points, len(real) // 2)
    orders = [np.random.default_rng(draw).permutation(len(real)) for draw in range(FLOOR_DRAWS)]
    found = [distances(real[order[:count]], real[order[count:]]) for order in orders]
    by_name = {name: np.array([one[name] for one in found]) for name in found[0]}
    return {
        "mean": {name: float(values.mean()) for name, values in by_name.items()},
        "std": {name: float(values.std(ddof=1)) for name, values in by_name.items()},
        "draws": FLOOR_DRAWS,
        "num_samples": count,
    }


def scale_of(params: Params, untrained: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Both ends of the scale, as `distances`: `floor` and `untrained`; nothing where they do not apply.

    Args:
        params: the experiment.
        untrained: uint8 images (N, H, W, C) of the network before any training.
        real: (M, D) points.
    """
    if not apply_to(params):
        return {}
    floor = sampling_floor(real, params.sampling.num_samples)
    return {"distances": {"floor": floor, "untrained": distances(points_of(untrained), real)}}
