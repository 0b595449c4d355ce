"""Distances of points against closed forms, and the scale that belongs to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maskdm.config import Params
from maskdm.data.swissroll import swissroll
from maskdm.scoring import points
from tests.factories import tiny_params


def roll_params(**sections: Any) -> Params:
    """An experiment on points."""
    dataset = {"source": "swissroll", "image_size": [1, 2], "limit": 400}
    arms = {"scratch": {"strategy": "none"}}
    given = {"dataset": dataset, "model": {"patch_size": 1}, "evaluation": {"features": "pixels"}, "arms": arms}
    return tiny_params(**{**given, **sections})


def test_the_marginals_of_a_shift_are_its_coordinates_whatever_the_distribution() -> None:
    real = np.random.default_rng(0).normal(size=(500, 3))
    shift = np.array([0.5, -0.25, 0.0])
    assert points.marginal_wasserstein(real + shift, real) == pytest.approx(np.abs(shift))


def test_wasserstein_of_uniform_distributions_is_in_closed_form() -> None:
    grid = (np.arange(20_000)[:, None] + 0.5) / 20_000
    found = points.marginal_wasserstein(3 * grid, grid)
    assert found == pytest.approx([1.0], abs=1e-6)  # the mean of 2u, for every quantile u


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection() -> None:
    real = np.random.default_rng(0).normal(size=(300, 2))
    found = points.sliced_wasserstein(real + np.array([0.3, 0.4]), real)
    assert found == pytest.approx(0.5 * 2 / np.pi, rel=0.1)  # the mean of |cos| over directions is 2/π


def test_the_energy_distance_of_gaussians_is_in_closed_form() -> None:
    draws = np.random.default_rng(0)
    far = points.energy_distance(draws.normal(50.0, 1.0, (4000, 1)), draws.normal(0.0, 1.0, (4000, 1)))
    assert far == pytest.approx(2 * 50 - 2 * 2 / np.sqrt(np.pi), rel=0.01)  # E|X − X'| is 2/√π


def test_the_energy_distance_of_two_points_is_twice_how_far_they_are() -> None:
    assert points.energy_distance(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])) == pytest.approx(10.0)


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 50, 2))
    whole = points.energy_distance(one, other)
    monkeypatch.setattr(points, "PAIRS_AT_ONCE", 120)
    assert points.energy_distance(one, other) == pytest.approx(whole)


def test_equal_sets_are_at_distance_zero_in_any_order() -> None:
    real = swissroll(500, 0)
    found = points.distances(real[::-1], real)
    assert list(found) == ["marginal_0", "marginal_1", "sliced_wasserstein", "energy"]
    assert all(value == pytest.approx(0.0, abs=1e-9) for value in found.values())


def test_only_joint_distances_tell_the_roll_from_its_marginals_and_from_its_gaussian() -> None:
    real, draws = swissroll(3000, 0), np.random.default_rng(0)
    independent = np.stack([draws.permutation(real[:, i]) for i in range(2)], axis=1)
    gaussian = draws.multivariate_normal(real.mean(axis=0), np.cov(real.T), 1500)
    floor = points.sampling_floor(real, 1500)
    threshold = {name: floor["mean"][name] + 4 * floor["std"][name] for name in floor["mean"]}
    found = points.distances(independent[:1500], real)
    assert found["marginal_0"] < threshold["marginal_0"]
    assert found["marginal_1"] < threshold["marginal_1"]
    for other in (found, points.distances(gaussian, real)):
        assert other["sliced_wasserstein"] > threshold["sliced_wasserstein"]
        assert other["energy"] > threshold["energy"]


def test_the_floor_is_what_other_real_points_get() -> None:
    floor = points.sampling_floor(swissroll(1000, 0), 500)
    fresh = points.distances(swissroll(500, 5), swissroll(500, 6))
    assert (floor["num_samples"], floor["draws"]) == (500, points.FLOOR_DRAWS)
    for name, value in fresh.items():
        assert abs(value - floor["mean"][name]) < 5 * floor["std"][name]


def test_the_floor_falls_with_the_number_of_points_and_takes_at_most_half() -> None:
    real = swissroll(1000, 0)
    few, many = points.sampling_floor(real, 25), points.sampling_floor(real, 10_000)
    assert (few["num_samples"], many["num_samples"]) == (25, 500)
    assert all(many["mean"][name] < few["mean"][name] / 2 for name in many["mean"])


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [((3, 2), (3, 3), "got"), ((0, 2), (3, 2), "got"), ((3, 17), (3, 17), "at most 16 dimensions")],
)
def test_other_shapes_are_refused(one: tuple[int, ...], other: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        points.distances(np.zeros(one), np.zeros(other))


def test_distances_are_for_few_pixel_values_alone() -> None:
    images = tiny_params()
    assert points.apply_to(roll_params())
    assert not points.apply_to(roll_params().model_copy(update={"dataset": images.dataset}))
    assert not points.apply_to(images)
    assert points.scale_of(images, np.zeros((2, 2)), np.zeros((2, 2))) == {}


def test_the_scale_has_both_ends() -> None:
    real = swissroll(200, 0)
    scale = points.scale_of(roll_params(), np.zeros((50, 1, 2, 1), dtype=np.uint8), real)["distances"]
    assert scale["floor"]["num_samples"] == 100  # half of the real ones
    assert scale["untrained"]["marginal_0"] == pytest.approx(1 + real[:, 0].mean())  # all at −1
    assert scale["untrained"].keys() == scale["floor"]["mean"].keys()


def test_pixels_become_the_values_that_the_network_sees() -> None:
    images = np.array([[[[0], [255]]], [[[51], [204]]]], dtype=np.uint8)
    assert points.points_of(images) == pytest.approx(np.array([[-1.0, 1.0], [-0.6, 0.6]]))
