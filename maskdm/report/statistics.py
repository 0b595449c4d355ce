"""Statistics of a few seeds: Student-t intervals, paired differences, Holm's correction, and where two curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-9  # of a segment's length
ENOUGH = 3  # with fewer values no interval is given: with two, Student's t is a formality


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: NaN without values.
        std: of the values, n − 1 in the denominator; NaN for n < 2.
        low: lower end of the mean's 95 % interval by Student's t; NaN for n < `ENOUGH`.
        high: its upper end.
        n: number of values.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int

    @property
    def has_interval(self) -> bool:
        """Whether there are enough values for an interval."""
        return self.n >= ENOUGH

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and zero lies outside it."""
        return self.low > 0 or self.high < 0

    def times(self, factor: float) -> Estimate:
        """The estimate of the values multiplied by a factor above 0."""
        return Estimate(factor * self.mean, factor * self.std, factor * self.low, factor * self.high, self.n)


@dataclass(frozen=True)
class Paired:
    """A mean difference, and the two-sided p-value of a paired t-test that it is zero; NaN for n < `ENOUGH`."""

    difference: Estimate
    p_value: float


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of independent values with its 95 % interval by Student's t, which assumes that they are normal."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    mean = float(array.mean()) if n else math.nan
    std = float(array.std(ddof=1)) if n > 1 else math.nan
    half = half_width(std, n)
    return Estimate(mean, std, mean - half, mean + half, n)


def half_width(std: float, n: int) -> float:
    """Half the 95 % interval of a mean of n values with this standard deviation; NaN for n < `ENOUGH`."""
    return _t_quantile(n) * std / math.sqrt(n) if n >= ENOUGH else math.nan


def paired(values: Sequence[float] | np.ndarray, base: Sequence[float] | np.ndarray) -> Paired:
    """The differences of two lists of values, one of each per seed and in the same order.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(values) != len(base):
        raise ValueError(f"paired values: expected as many of both, got {len(values)} and {len(base)}")
    difference = estimate(np.asarray(values, dtype=np.float64) - np.asarray(base, dtype=np.float64))
    if not difference.has_interval:
        return Paired(difference, math.nan)
    if difference.std == 0:
        return Paired(difference, 1.0 if difference.mean == 0 else 0.0)
    t = difference.mean / (difference.std / math.sqrt(difference.n))
    return Paired(difference, float(2 * stats.t.sf(abs(t), difference.n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false one below 5 % is at most 5 %; NaNs stay and do not count.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    adjusted = [math.nan] * len(p_values)
    tested = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, index in enumerate(tested):
        largest = max(largest, min((len(tested) - rank) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Crossing:
    """Where an arm's curve reaches a target and stays there.

    Attributes:
        at: the compute from which on the mean curve stays at or below the mean target; None: not within the budget.
        at_most: the mean curve is at or below the target from its first milestone on, which `at` then is.
        low: lower end of the 95 % interval; None: open, below the first milestone (or, for n < `ENOUGH`, unknown).
        high: upper end; None: open, beyond the last milestone (or unknown).
        n: number of seeds.
    """

    at: float | None
    at_most: bool
    low: float | None
    high: float | None
    n: int

    @property
    def has_interval(self) -> bool:
        """Whether there are enough seeds for an interval; its ends may be open."""
        return self.n >= ENOUGH


def crossing(compute: np.ndarray, curves: np.ndarray, targets: np.ndarray) -> Crossing:
    """The compute at which an arm's FID falls to a target, by interpolation in log compute, with a 95 % interval.

    Let D_s(c) = curve_s(c) − target_s, each seed's curve linear in log c between milestones. The point estimate is the
    compute from which on the mean of D stays ≤ 0 until the last milestone. The interval inverts a test, as Fieller's
    theorem does for a ratio: it spans the c at which a t-interval of the mean of D(c) contains 0. This covers: at the
    true crossing c* the expectation of D is 0, so the t-interval *there* contains 0, and c* belongs to the set, in
    95 % of experiments, however noise is correlated along a curve or with the target. (A delta-method interval around
    the estimate would need a steep curve and many seeds.) Where D is not clearly above 0 at the first milestone, the
    set has no lower end within the budget; where D is not clearly below 0 at the last one, it has no upper end.

    Assumed: seeds are independent and D is normal over seeds; the expected curve is linear in log c between
    milestones, else the interval is around the crossing of its interpolation.

    Args:
        compute: (K,) increasing, > 0: FLOPs at the milestones.
        curves: (n, K) FID of each seed.
        targets: (n,) FID to reach, of the same seeds.

    Raises:
        ValueError: the shapes do not fit, or the compute does not increase.

    Source: Fieller 1954, Some problems in interval estimation.
    """
    fits = curves.ndim == 2 and targets.shape == curves.shape[:1] and compute.shape == curves.shape[1:] and curves.size
    if not fits:
        raise ValueError(f"expected (K,), (n, K), (n,), got {compute.shape}, {curves.shape}, {targets.shape}")
    if compute[0] <= 0 or np.any(np.diff(compute) <= 0):
        raise ValueError(f"expected increasing compute above 0, got {compute.tolist()}")
    log_compute = np.log(compute.astype(np.float64))
    gaps = curves.astype(np.float64) - targets[:, None]
    at, at_most = _last_descent(log_compute, gaps.mean(axis=0))
    low, high = _inverted_test(log_compute, gaps) if len(gaps) >= ENOUGH else (None, None)
    # exp(log c) of a milestone need not be c to the last digit.
    ends = {float(log): float(c) for log, c in zip(log_compute, compute, strict=True)}
    at, low, high = (None if x is None else ends.get(x, math.exp(x)) for x in (at, low, high))
    return Crossing(at, at_most, low, high, len(gaps))


def _last_descent(x: np.ndarray, mean: np.ndarray) -> tuple[float | None, bool]:
    """Where a piecewise linear function falls to 0 for the last time, if it ends there; whether it started there."""
    if mean[-1] > 0:
        return None, False
    above = np.flatnonzero(mean > 0)
    if len(above) == 0:
        return float(x[0]), True
    k = above[-1]
    return float(x[k] + (x[k + 1] - x[k]) * mean[k] / (mean[k] - mean[k + 1])), False


def _inverted_test(x: np.ndarray, gaps: np.ndarray) -> tuple[float | None, float | None]:
    """Ends of the set where the t-interval of the mean gap contains 0; None where it has none within the budget."""
    first, last = estimate(gaps[:, 0]), estimate(gaps[:, -1])
    accepted = [u for k in range(len(x) - 1) for u in _accepted(x[k : k + 2], gaps[:, k : k + 2])]
    low = None if first.low <= 0 else min(accepted, default=float(x[-1]))
    high = None if last.high >= 0 else max(accepted, default=float(x[0]))
    return low, high


def _accepted(x: np.ndarray, gaps: np.ndarray) -> list[float]:
    """The ends of the part of a segment that is in the set.

    With u from 0 to 1 along the segment, the mean gap is linear in u and its variance is quadratic: the set is where
    the quadratic mean(u)² − t²·variance(u)/n is at most 0.
    """
    mean_0, slope = gaps[:, 0].mean(), (gaps[:, 1] - gaps[:, 0]).mean()
    covariance = np.cov(gaps[:, 0], gaps[:, 1] - gaps[:, 0])
    weight = _t_quantile(len(gaps)) ** 2 / len(gaps)
    quadratic = np.array(
        [
            slope**2 - weight * covariance[1, 1],
            2 * (mean_0 * slope - weight * covariance[0, 1]),
            mean_0**2 - weight * covariance[0, 0],
        ]
    )
    ends = [u for u in (0.0, 1.0) if np.polyval(quadratic, u) <= 0]
    ends += [r.real for r in np.roots(quadratic) if r.imag == 0]
    if slope != 0:  # where the mean itself is 0: without spread the set is this point, which no rounded root finds
        ends.append(-mean_0 / slope)
    return [float(x[0] + min(max(u, 0.0), 1.0) * (x[1] - x[0])) for u in ends if -ROUNDING <= u <= 1 + ROUNDING]


def _t_quantile(n: int) -> float:
    """Student's t with n − 1 degrees of freedom, two-sided."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
