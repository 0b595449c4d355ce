"""Metrics between two sets of features: FID, KID, precision, recall, equal to torch-fidelity's.

Tests compare them with torch-fidelity, whose import takes longer than scoring the default experiment. What depends on
the real images alone is computed once (`Reference`), in blocks: the features need not fit into memory. To add a metric,
see `maskdm.scoring.headline`.

Source: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID), Kynkäänniemi et al. 2019 (precision, recall).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from maskdm.base import rng
from maskdm.base.errors import UserError
from maskdm.config import EvaluationConfig
from maskdm.config.image_counts import MIN_REAL as MIN_REAL  # of `floor_metrics`

PRC_BLOCK = 1000  # rows and columns of a block of the distance matrix: 8 MB
KID_SEED = 2020  # of the random subsets; the same as torch-fidelity's
STATISTICS_BLOCK = 2**14  # rows converted to double precision at a time


@dataclass(frozen=True)
class Metrics:
    """Scores of samples against real images.

    Attributes:
        fid: Fréchet distance; biased: it falls as the number of samples grows.
        kid: mean of unbiased estimates over random subsets; may be slightly negative.
        kid_std: standard deviation over the subsets.
        precision: fraction of samples within the real images' manifold.
        recall: fraction of real images within the samples' manifold.
        num_samples: number of scored samples.
    """

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    num_samples: int

    def as_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """Features of the real images, and their statistics, which do not depend on the samples.

    Attributes:
        features: (M, D); may be memory-mapped.
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased.
        radii: (M,) float64: distance of each image to its `neighborhood`-th nearest neighbour.
        neighborhood: k of precision and recall.
    """

    features: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    radii: np.ndarray
    neighborhood: int

    @classmethod
    def of(cls, features: np.ndarray, neighborhood: int) -> Self:
        """Compute the statistics of features (M, D), in blocks; memory grows with M only by 8 bytes per image."""
        return cls(features, *mean_and_covariance(features), _radii(features, neighborhood).numpy(), neighborhood)

    def __len__(self) -> int:
        return len(self.features)


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (M, D), in float64."""
    count = len(features)
    mean = sum(block.sum(axis=0) for block in _blocks(features, STATISTICS_BLOCK)) / count
    centred = (block - mean for block in _blocks(features, STATISTICS_BLOCK))
    return mean, np.asarray(sum(block.T @ block for block in centred)) * (1 / (count - 1))


def compute_metrics(samples: np.ndarray, real: np.ndarray | Reference, config: EvaluationConfig) -> Metrics:
    """Score features of samples against features of real images.

    Args:
        samples: (N, D).
        real: (M, D), or their `Reference`.
        config: KID's subsets, and the neighbourhood of precision and recall.

    Raises:
        UserError: a set is smaller than a metric needs.
    """
    check_counts(len(samples), len(real), config)
    reference = real if isinstance(real, Reference) else Reference.of(real, config.prc_neighborhood)
    assert reference.neighborhood == config.prc_neighborhood, "the radii belong to the configured neighbourhood"
    kid, kid_std = kernel_distance(samples, reference.features, config)
    reach_of_real, reach_of_samples = torch.from_numpy(reference.radii), _radii(samples, config.prc_neighborhood)
    return Metrics(
        fid=frechet_distance(samples, reference),
        kid=kid,
        kid_std=kid_std,
        precision=share_within_reach(samples, reference.features, reach_of_real),
        recall=share_within_reach(reference.features, samples, reach_of_samples),
        num_samples=len(samples),
    )


def check_counts(num_samples: int, num_real: int, config: EvaluationConfig) -> None:
    """Raise a `UserError` if there are fewer samples or real images than the metrics need."""
    for what, count in (("samples", num_samples), ("real images", num_real)):
        if shortage := config.shortage(count, what):
            raise UserError(f"{shortage}; lower kid_subset_size or use more {what}")


def frechet_distance(samples: np.ndarray, real: Reference) -> float:
    """FID of samples (N, D): ‖μ − μ′‖² + tr(Σ + Σ′ − 2 √(Σ Σ′)).

    The trace of the matrix root is the sum of the roots of the eigenvalues of Σ Σ′.
    """
    mean, covariance = mean_and_covariance(samples)
    difference = mean - real.mean
    roots = np.sqrt(np.linalg.eigvals(covariance @ real.covariance).astype(complex)).real
    return float(difference @ difference + np.trace(covariance) + np.trace(real.covariance) - 2 * roots.sum())


def kernel_distance(samples: np.ndarray, real: np.ndarray, config: EvaluationConfig) -> tuple[float, float]:
    """KID: mean and standard deviation of MMD² over random subsets, drawn as torch-fidelity draws them by default.

    Differs: only the rows of the current subset are in double precision.

    Args:
        samples: (N, D).
        real: (M, D).
        config: number and size of the subsets.
    """
    numbers = np.random.RandomState(KID_SEED)
    estimates = []
    for _ in range(config.kid_subsets):
        x, y = (
            features[numbers.choice(len(features), config.kid_subset_size, replace=False)].astype(np.float64)
            for features in (samples, real)
        )
        estimates.append(squared_mmd(x, y))
    return float(np.mean(estimates)), float(np.std(estimates))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of MMD² between two sets (M, D), with the kernel k(x, y) = (x·y / D + 1)³."""
    count = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within / (count * (count - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # ** 3 takes ten times as long


def share_within_reach(features: np.ndarray, centres: np.ndarray, radii: Tensor) -> float:
    """The fraction of features (N, D) that are within the radius (M,) of at least one centre (M, D).

    Precision is the fraction of samples within reach of real images; recall swaps the two sets.
    """
    reached = []
    for block in _rows(features):
        is_reached = torch.zeros(len(block), dtype=torch.bool)
        for others, reach in zip(_rows(centres), radii.split(PRC_BLOCK), strict=True):
            is_reached |= (torch.cdist(block, others) <= reach).any(dim=1)
        reached.append(is_reached)
    return float(torch.cat(reached).float().mean())


def _radii(features: np.ndarray, neighborhood: int) -> Tensor:
    """The distance of each row (M, D) to its `neighborhood`-th nearest neighbour: (M,)."""
    radii = []
    for block in _rows(features):
        nearest = torch.empty(len(block), 0, dtype=block.dtype)  # ascending, the row itself first
        for others in _rows(features):
            found = torch.cat([nearest, torch.cdist(block, others)], dim=1)
            nearest = found.topk(min(neighborhood + 1, found.shape[1]), dim=1, largest=False, sorted=True).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _rows(features: np.ndarray) -> Iterator[Tensor]:
    return map(torch.from_numpy, _blocks(features, PRC_BLOCK))


def _blocks(features: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows in float64, `size` at a time."""
    return (features[start : start + size].astype(np.float64) for start in range(0, len(features), size))


def floor_metrics(real: np.ndarray, num_samples: int, config: EvaluationConfig) -> Metrics:
    """Score some real images against the other real images: about what a perfect model would get.

    The floor uses as many real images as there are samples, but at most half. Samples are scored against all real
    images, the floor only against the others, so its bias is larger: with few others, the floor of FID is too high.
    KID's subsets and the neighbourhood are reduced if there are too few images.

    Holds a copy of all features in memory; Inception's take 8 KB per image.

    Args:
        real: features of the real images, (M, D), M ≥ `MIN_REAL`.
        num_samples: number of samples that are scored.
        config: as for the samples.
    """
    order = torch.randperm(len(real), generator=rng.generator(0, "floor")).numpy()
    count = min(num_samples, len(real) // 2)
    fitting = config.model_copy(
        update={
            "kid_subset_size": min(config.kid_subset_size, count),
            "prc_neighborhood": min(config.prc_neighborhood, count - 1),
        }
    )
    return compute_metrics(real[order[:count]], real[order[count:]], fitting)
