"""Statistics of the report: closed forms, hand computation, and intervals that cover as often as they claim."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from maskdm.report import statistics
from maskdm.report.statistics import Crossing, crossing, estimate, holm, paired

DRAWS = 200
FLOPS = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0]) * 1e12
TRUTH = 3.5e12  # within a segment
TARGET = 5.0


def test_an_estimate_is_student_s():
    found = estimate([1.0, 2.0, 4.5])
    assert (found.mean, found.n) == (2.5, 3)
    assert found.std == pytest.approx(math.sqrt((2.25 + 0.25 + 4.0) / 2))
    half = 4.302652729911275 * found.std / math.sqrt(3)  # t for 97.5 % with 2 degrees of freedom, from a table
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))


def test_the_interval_is_scipy_s_of_the_one_sample_t_test():
    values = np.random.default_rng(0).normal(3.0, 2.0, 7)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = estimate(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("values", "std_known"), [([], False), ([1.5], False), ([1.5, 2.5], True)])
def test_fewer_than_three_values_have_no_interval(values, std_known):
    found = estimate(values)
    assert math.isnan(found.low) and math.isnan(found.high) and not found.has_interval and not found.excludes_zero
    assert math.isnan(found.std) != std_known


def test_paired_differences_are_the_paired_t_test():
    values, base = [9.0, 10.5, 8.0, 9.9], [10.0, 11.0, 9.5, 10.0]
    found = paired(values, base)
    assert found.difference.mean == pytest.approx((-1.0 - 0.5 - 1.5 - 0.1) / 4)
    assert found.p_value == pytest.approx(stats.ttest_rel(values, base).pvalue)
    assert found.difference.excludes_zero == (found.p_value < 0.05)


@pytest.mark.parametrize(("values", "p_value"), [((1.0, 2.0, 3.0), 1.0), ((2.0, 3.0, 4.0), 0.0)])
def test_differences_without_spread_are_certain(values, p_value):
    assert paired(values, (1.0, 2.0, 3.0)).p_value == p_value


def test_two_pairs_have_no_p_value_and_unequal_numbers_are_refused():
    assert math.isnan(paired([1.0, 2.0], [3.0, 5.0]).p_value)
    assert paired([1.0, 2.0], [3.0, 5.0]).difference.mean == -2.5
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_holm_by_hand():
    # sorted: 0.005·4 = 0.02, 0.01·3 = 0.03, 0.03·2 = 0.06, 0.04·1 = 0.04, which may not be below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_nan_and_does_not_count_it():
    adjusted = holm([math.nan, 0.02, 0.03])
    assert math.isnan(adjusted[0]) and adjusted[1:] == pytest.approx([0.04, 0.04])


def curve(*fids: float) -> np.ndarray:
    return np.array([fids])


def test_a_crossing_is_interpolated_in_log_compute():
    found = crossing(np.array([1.0, 4.0, 16.0]), curve(3.0, 1.0, -1.0) + 5.0, np.array([5.0]))
    assert found.at == pytest.approx(8.0)  # halfway between 4 and 16 in log compute
    assert (found.at_most, found.low, found.high, found.n) == (False, None, None, 1)


@pytest.mark.parametrize(
    ("fids", "at", "at_most"),
    [
        ((3.0, 2.0, 1.0), None, False),  # never
        ((-1.0, -2.0, -3.0), 1.0, True),  # from the first milestone on, or before it
        ((0.0, -2.0, -3.0), 1.0, True),
        ((1.0, 0.0, 0.0), 4.0, False),  # exactly at a milestone
        ((2.0, -2.0, 1.0), None, False),  # it was there, and did not stay
        ((-1.0, 2.0, -2.0), 8.0, False),  # the last time is for good
    ],
)
def test_the_crossing_is_from_where_the_curve_stays_below(fids, at, at_most):
    found = crossing(np.array([1.0, 4.0, 16.0]), curve(*fids) + 5.0, np.array([5.0]))
    assert found.at == (None if at is None else pytest.approx(at)) and found.at_most == at_most


def test_one_milestone_is_enough_to_say_at_most_or_never():
    one = np.array([7.0])
    assert crossing(one, np.array([[4.0], [4.1], [3.9]]), np.full(3, 5.0)) == Crossing(7.0, True, None, 7.0, 3)
    assert crossing(one, np.array([[6.0], [6.1], [5.9]]), np.full(3, 5.0)) == Crossing(None, False, 7.0, None, 3)


def test_seeds_without_spread_leave_a_point():
    found = crossing(np.array([1.0, 4.0, 16.0]), np.tile([8.0, 6.0, 4.0], (3, 1)), np.full(3, 5.0))
    assert (found.at, found.low, found.high) == pytest.approx((8.0, 8.0, 8.0))


def test_an_interval_that_reaches_an_end_of_the_budget_is_open_there():
    noise = np.array([[-1.0], [0.0], [1.0]]) * np.ones((1, 3))
    compute, targets = np.array([1.0, 4.0, 16.0]), np.zeros(3)  # half width 2.48 everywhere
    late = crossing(compute, np.add(noise, (5.0, 1.0, -1.0)), targets)
    assert late.low == pytest.approx(4.0 ** ((5.0 - 2.484) / 4.0), rel=1e-3) and late.high is None
    early = crossing(compute, np.add(noise, (1.0, -5.0, -9.0)), targets)
    assert early.low is None and early.high == pytest.approx(4.0 ** ((1.0 + 2.484) / 6.0), rel=1e-3)
    unclear = crossing(compute, np.add(noise, (1.0, 0.5, -1.0)), targets)
    assert unclear.at is not None and (unclear.low, unclear.high) == (None, None)


def test_a_curve_that_is_clearly_there_from_the_start_is_at_most_the_first_milestone():
    noise = np.array([[-0.1], [0.0], [0.1]]) * np.ones((1, 3))
    assert crossing(np.array([1.0, 4.0, 16.0]), noise - 5.0, np.zeros(3)) == Crossing(1.0, True, None, 1.0, 3)
    assert crossing(np.array([1.0, 4.0, 16.0]), noise + 5.0, np.zeros(3)) == Crossing(None, False, 16.0, None, 3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 6), spread=st.floats(0.01, 3.0))
@example(seed=156, n=3, spread=2.1656477463588915)  # touches the set at a milestone, for less than a step of the grid
def test_the_interval_is_that_of_a_fine_grid(seed, n, spread):
    generator = np.random.default_rng(seed)
    curves = 5.0 - 2.0 * np.log(FLOPS / TRUTH) + spread * generator.standard_normal((n, len(FLOPS)))
    targets = TARGET + spread * generator.standard_normal(n)
    found = crossing(FLOPS, curves, targets)
    # With the milestones: between two of them mean − half width is concave, so that a set within one step touches one.
    grid = np.union1d(np.geomspace(FLOPS[0], FLOPS[-1], 4001), FLOPS)
    on_grid = np.array([np.interp(np.log(grid), np.log(FLOPS), row) for row in curves]) - targets[:, None]
    half = stats.t.ppf(0.975, n - 1) * on_grid.std(axis=0, ddof=1) / math.sqrt(n)
    above, below = on_grid.mean(axis=0) > half, on_grid.mean(axis=0) < -half
    low = None if not above[0] else FLOPS[-1] if above.all() else grid[np.argmin(above)]
    high = None if not below[-1] else FLOPS[0] if below.all() else grid[len(grid) - 1 - np.argmin(below[::-1])]
    assert found.low == (None if low is None else pytest.approx(low, rel=2e-3))
    assert found.high == (None if high is None else pytest.approx(high, rel=2e-3))


@pytest.mark.parametrize(
    ("compute", "curves", "targets", "message"),
    [
        ([2.0, 1.0], [[1.0, 1.0]], [1.0], "increasing"),
        ([0.0, 1.0], [[1.0, 1.0]], [1.0], "above 0"),
        ([1.0, 2.0], [[1.0, 1.0, 1.0]], [1.0], "expected"),
        ([1.0, 2.0], [[1.0, 1.0]], [1.0, 2.0], "expected"),
        ([1.0, 2.0], np.empty((0, 2)), [], "expected"),
    ],
)
def test_impossible_curves_are_refused(compute, curves, targets, message):
    with pytest.raises(ValueError, match=message):
        crossing(np.array(compute), np.array(curves), np.array(targets))


def independent(generator: np.random.Generator, n: int) -> np.ndarray:
    """Noise of each seed and milestone."""
    return 0.4 * generator.standard_normal((n, len(FLOPS)))


def along_the_curve(generator: np.random.Generator, n: int) -> np.ndarray:
    """A seed that is worse is worse at all milestones, and so is its neighbour a little."""
    drift = np.cumsum(0.15 * generator.standard_normal((n, len(FLOPS))), axis=1)
    return 0.3 * generator.standard_normal((n, 1)) + drift


def covered(truth: float, n: int, noise: Callable[[np.random.Generator, int], np.ndarray], slope: float = 3.0) -> int:
    """In how many of `DRAWS` made-up experiments with a known crossing its interval covers it."""
    generator, count = np.random.default_rng(20), 0
    for _ in range(DRAWS):
        curves = TARGET - slope * np.log(FLOPS / truth) + noise(generator, n)
        found = crossing(FLOPS, curves, TARGET + 0.2 * generator.standard_normal(n))
        count += (found.low is None or found.low <= truth) and (found.high is None or truth <= found.high)
    return count


def is_95_percent(count: int) -> bool:
    """Whether so many of `DRAWS` are what 95 % would give, 1 in 1000 aside."""
    low, high = stats.binom.interval(0.999, DRAWS, 0.95)
    return bool(low <= count <= high)


@pytest.mark.parametrize("noise", [independent, along_the_curve])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_a_known_crossing_in_95_percent_of_draws(n, noise):
    assert is_95_percent(covered(TRUTH, n, noise))


@pytest.mark.parametrize(("factor", "n"), [(0.455, 3), (0.7, 5), (2.0, 3)])
def test_an_interval_of_another_width_would_not(factor, n, monkeypatch):
    right = statistics._t_quantile
    # 0.455 makes Student's t with 2 degrees of freedom the normal's 1.96
    monkeypatch.setattr(statistics, "_t_quantile", lambda count: factor * right(count))
    assert not is_95_percent(covered(TRUTH, n, independent))


@pytest.mark.parametrize("truth", [0.5e12, 20e12])
def test_a_crossing_beyond_the_milestones_is_covered_by_an_open_end(truth):
    # A gentle slope: the ends are often unclear.
    assert covered(truth, 3, independent, slope=0.5) >= stats.binom.ppf(0.001, DRAWS, 0.95)


def test_the_estimate_itself_is_near_the_truth():
    generator = np.random.default_rng(3)
    found = [
        crossing(FLOPS, TARGET - 3 * np.log(FLOPS / TRUTH) + independent(generator, 5), np.full(5, TARGET)).at
        for _ in range(DRAWS)
    ]
    assert np.exp(np.mean(np.log([at for at in found if at is not None]))) == pytest.approx(TRUTH, rel=0.03)
    assert None not in found
