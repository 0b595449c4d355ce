"""Distances between two sets of points of few dimensions, sensitive to more than mean and covariance.

They are 0 between equal sets and positive between different distributions. Between two finite samples of the same
distribution they are above 0: `sampling_floor` measures by how much. To add one, see `maskdm.scoring.headline`.

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
MAX_POINTS = 4000  # per set in the energy distance, which needs all pairs
PAIRS_AT_ONCE = 2**22  # 32 MiB of distances


def apply_to(params: Params) -> bool:
    """Whether an experiment is scored by these distances: features are pixels, and images have few values."""
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
        distances by name, in the order in which they are shown: Wasserstein-1 of each coordinate, sliced
        Wasserstein-1, and the energy distance.

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
    from scipy.stats import wasserstein_distance  # imported here: most experiments do not need SciPy

    return [float(wasserstein_distance(points[:, i], real[:, i])) for i in range(points.shape[1])]


def sliced_wasserstein(points: np.ndarray, real: np.ndarray) -> float:
    """The mean Wasserstein-1 over projections on `NUM_PROJECTIONS` directions, the same in every call.

    Source: Bonneel et al. 2015, equation 8.
    Differs: the absolute instead of the squared distance.
    """
    directions = np.random.default_rng(0).normal(size=(NUM_PROJECTIONS, points.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return float(np.mean(marginal_wasserstein(points @ directions.T, real @ directions.T)))


def energy_distance(points: np.ndarray, real: np.ndarray) -> float:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖, of at most `MAX_POINTS` random points of each set; never negative.

    Source: Székely and Rizzo 2013, equation 5, including pairs of a point with itself.
    """
    points, real = _at_most(MAX_POINTS, points), _at_most(MAX_POINTS, real)
    within = _mean_distance(points, points) + _mean_distance(real, real)
    return max(2 * _mean_distance(points, real) - within, 0.0)  # rounding


def _at_most(count: int, points: np.ndarray) -> np.ndarray:
    """All points, or `count` random ones, the same in every call."""
    return points if len(points) <= count else points[np.random.default_rng(0).permutation(len(points))[:count]]


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.spatial.distance import cdist

    rows = max(1, PAIRS_AT_ONCE // len(b))
    total = sum(float(cdist(a[start : start + rows], b).sum()) for start in range(0, len(a), rows))
    return total / (len(a) * len(b))


def sampling_floor(real: np.ndarray, num_points: int) -> dict[str, Any]:
    """Distances of some real points to the other real points: about what a perfect model would get.

    Args:
        real: (M, D), M ≥ 2.
        num_points: number of samples that are scored; the floor uses as many real points, but at most half of them.

    Returns:
        `mean` and `std` of every distance over `draws` random splits, and `num_samples`, the number of points used as
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
    """Both ends of the scale, `floor` and `untrained`, under the key `distances`; empty for images.

    Args:
        params: the experiment.
        untrained: uint8 images (N, H, W, C) of the untrained network.
        real: (M, D) points.
    """
    if not apply_to(params):
        return {}
    floor = sampling_floor(real, params.sampling.num_samples)
    return {"distances": {"floor": floor, "untrained": distances(points_of(untrained), real)}}
