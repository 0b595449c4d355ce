"""Scores against their definitions in numpy and scipy, and the extractors that make the features."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import fields
from http.client import IncompleteRead
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import scipy.linalg
import torch
from pydantic import ValidationError

from maskdm.base.errors import UserError
from maskdm.base.tensors import save_tensors
from maskdm.base.torchvision_compat import declare_missing_operators
from maskdm.config import EvaluationConfig
from maskdm.data.batches import to_model_range
from maskdm.scoring.classifier import FEATURE_DIM, train_classifier, write_classifier
from maskdm.scoring.extractors import PUBLISHED, FeatureExtractor, open_classifier, open_pixels, open_pretrained
from maskdm.scoring.headline import SCORE_KEYS, SCORES, scale_scores
from maskdm.scoring.scores import (
    PRC_BLOCK,
    Metrics,
    Reference,
    check_counts,
    compute_metrics,
    floor_metrics,
    mean_and_covariance,
)
from maskdm.stages.score.command import write_pngs
from maskdm.stages.score.sets import Reading, open_set
from tests.factories import CPU, digits
from tests.scoring.fidelity import write_inception_weights

NUM_CLASSES = 10


def config(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"kid_subset_size": 100, "kid_subsets": 10, **changes})


def gaussian(count: int, dim: int = 8, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Correlated features, float32 (count, dim)."""
    numbers = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / dim**0.5
    return (shift + scale * numbers.normal(size=(count, dim)) @ mixing).astype(np.float32)


# --- metrics


def oracle_fid(x: np.ndarray, y: np.ndarray) -> float:
    """|μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    difference = x.mean(0) - y.mean(0)
    return float(difference @ difference + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real))


def oracle_kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased MMD² with the kernel (x·y/d + 1)³, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3

    n = len(x)
    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (n * (n - 1)) for z in (x, y)]
    return float(sum(within) - 2 * kernel(x, y).mean())


def oracle_coverage(x: np.ndarray, y: np.ndarray, neighbourhood: int) -> float:
    """The share of x within reach of some y: no farther from it than y's k-th neighbour among y."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=-1)

    reach = np.sort(distances(y, y), axis=1)[:, neighbourhood]  # the 0-th is y itself
    return float((distances(x, y) <= reach).any(axis=1).mean())


def test_the_table_of_scores_names_those_that_are_computed_and_their_better_direction() -> None:
    assert list(SCORE_KEYS) == [field.name for field in fields(Metrics)]
    real = gaussian(500, seed=1)
    better, worse = (compute_metrics(gaussian(500, shift=s, seed=2), real, config()).as_dict() for s in (0.0, 1.0))
    assert list(better) == list(SCORE_KEYS)
    for score in SCORES:
        assert (better[score.key] < worse[score.key]) == score.is_lower_better, score.name


def test_both_ends_of_the_scale_stand_beside_the_scores_of_arms() -> None:
    scale = {end: dict.fromkeys(SCORE_KEYS, value) for end, value in (("floor", 1.0), ("untrained", 2.0))}
    assert scale_scores(scale) == {"fid_floor": 1.0, "kid_floor": 1.0, "fid_untrained": 2.0, "kid_untrained": 2.0}


@pytest.mark.parametrize(
    ("shift", "scale", "count", "dim"),
    [(0.0, 1.0, 150, 8), (0.3, 1.0, 400, 64), (0.0, 1.7, 150, 8), (-1.0, 0.5, 150, 8)],
)
def test_fid_is_the_frechet_distance(shift: float, scale: float, count: int, dim: int) -> None:
    x, y = gaussian(count, dim, shift, scale, seed=1), gaussian(count + 37, dim, seed=2)
    assert compute_metrics(x, y, config()).fid == pytest.approx(oracle_fid(x, y), rel=1e-4)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.0, 1.7)])
def test_kid_of_everything_is_its_formula(shift: float, scale: float) -> None:
    x, y = gaussian(120, 16, shift, scale, seed=1), gaussian(120, 16, seed=2)
    metrics = compute_metrics(x, y, config(kid_subset_size=120, kid_subsets=3))
    assert metrics.kid == pytest.approx(oracle_kid(x, y), rel=1e-8)
    assert metrics.kid_std == pytest.approx(0, abs=1e-9)


def test_kid_over_subsets_scatters_around_its_formula() -> None:
    x, y = gaussian(300, 16, 0.3, seed=1), gaussian(300, 16, seed=2)
    metrics = compute_metrics(x, y, config(kid_subset_size=100, kid_subsets=50))
    assert metrics.kid_std > 0
    assert metrics.kid == pytest.approx(oracle_kid(x, y), abs=4 * metrics.kid_std / 50**0.5)


@pytest.mark.parametrize(("count", "neighbourhood"), [(110, 1), (110, 3), (110, 7), (PRC_BLOCK + 10, 3)])
def test_precision_and_recall_are_their_definitions(count: int, neighbourhood: int) -> None:
    x, y = gaussian(count, 4, 0.8, 0.6, seed=1), gaussian(count + 20, 4, seed=2)
    metrics = compute_metrics(x, y, config(prc_neighborhood=neighbourhood))
    assert metrics.precision == pytest.approx(oracle_coverage(x, y, neighbourhood), abs=1e-6)
    assert metrics.recall == pytest.approx(oracle_coverage(y, x, neighbourhood), abs=1e-6)


@pytest.mark.parametrize("count", [150, 2300])
def test_scores_are_torch_fidelitys_to_the_last_digits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    declare_missing_operators()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    monkeypatch.setattr("maskdm.scoring.scores.STATISTICS_BLOCK", 1000)  # several of the larger set
    x, y = gaussian(count, 32, 0.2, seed=1), gaussian(count + 37, 32, seed=2)
    ours = compute_metrics(x, y, config())
    both = [torch.from_numpy(features.astype(np.float64)) for features in (x, y)]
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, both), verbose=False)
    kid = kid_features_to_metric(*both, kid_subsets=10, kid_subset_size=100, verbose=False)
    prc = prc_features_to_metric(*both, verbose=False)
    assert ours.fid == pytest.approx(fid["frechet_inception_distance"], rel=1e-9)
    assert ours.kid == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.kid_std == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-9)
    assert (ours.precision, ours.recall) == (prc["precision"], prc["recall"])


@pytest.mark.parametrize("neighborhood", [1, 3, 12])
def test_distances_in_blocks_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, neighborhood: int) -> None:
    """Also where a block has fewer columns than neighbours are asked for; few columns are held at a time."""
    monkeypatch.setattr("maskdm.scoring.scores.PRC_BLOCK", 7)
    columns, cat = [0], torch.cat

    def counting(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        joined = cat(parts, dim)
        columns.append(joined.shape[1] if dim == 1 else 0)
        return joined

    monkeypatch.setattr("torch.cat", counting)
    x, y = gaussian(40), gaussian(33, shift=0.5, seed=1)
    found = compute_metrics(x, y, config(kid_subset_size=20, prc_neighborhood=neighborhood))
    to_real, of_x, of_y = (np.linalg.norm(a[:, None].astype(float) - b, axis=2) for a, b in ((x, y), (x, x), (y, y)))
    radii_x, radii_y = (np.sort(square, axis=1)[:, neighborhood] for square in (of_x, of_y))
    assert found.precision == pytest.approx((to_real <= radii_y).any(axis=1).mean())
    assert found.recall == pytest.approx((to_real <= radii_x[:, None]).any(axis=0).mean())
    assert max(columns) <= 7 + neighborhood + 1


def test_what_is_known_of_the_real_images_before_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussian(150, seed=1), gaussian(200, seed=2)
    reference = Reference.of(y, neighborhood=3)
    expected, seen = compute_metrics(x, y, config()), []
    monkeypatch.setattr(
        "maskdm.scoring.scores.mean_and_covariance", lambda f: seen.append(len(f)) or mean_and_covariance(f)
    )
    assert compute_metrics(x, reference, config()) == expected
    assert seen == [150]


def test_precision_is_of_the_samples_and_recall_of_the_real_images() -> None:
    real = gaussian(500, seed=1)
    one_mode = real[0] + 0.01 * gaussian(500, seed=2)
    metrics = compute_metrics(one_mode, real, config())
    assert metrics.precision == 1.0
    assert metrics.recall < 0.1


def test_identical_sets_are_at_distance_0_and_cover_each_other() -> None:
    x = gaussian(300, 32)
    metrics = compute_metrics(x, x.copy(), config(kid_subset_size=300))
    assert metrics.fid == pytest.approx(0, abs=1e-6)
    assert metrics.kid < 0  # unbiased: the diagonal of the kernel counts in one of its terms alone
    assert (metrics.precision, metrics.recall, metrics.num_samples) == (1.0, 1.0, 300)


def test_metrics_are_deterministic_and_leave_their_input_and_the_global_generators_alone() -> None:
    x, y = gaussian(200, seed=1), gaussian(200, seed=2)
    copies = x.copy(), y.copy()
    np.random.seed(1)  # noqa: NPY002  (the generator that must not be used)
    first = compute_metrics(x, y, config())
    np.random.seed(2)  # noqa: NPY002
    assert compute_metrics(x, y, config()) == first
    assert all(np.array_equal(a, b) for a, b in zip((x, y), copies, strict=True))


def test_the_floor_of_many_samples_is_between_halves_and_the_same_every_time() -> None:
    real = gaussian(401)
    floor = floor_metrics(real, 300, config())
    assert floor == floor_metrics(real, 300, config())
    assert floor.num_samples == 200
    assert 0 < floor.fid < compute_metrics(gaussian(200, shift=0.5, seed=5), real, config()).fid
    assert floor.kid == pytest.approx(0, abs=0.1)


def test_the_floor_has_the_bias_of_as_many_samples() -> None:
    """FID of fewer samples is higher, also of perfect ones: a floor at another number would be no floor."""
    real = gaussian(1000, dim=16)
    floors = {count: floor_metrics(real, count, config()) for count in (100, 250, 500)}
    assert [floor.num_samples for floor in floors.values()] == [100, 250, 500]
    assert floors[100].fid > 1.5 * floors[250].fid > 1.5 * floors[500].fid
    for count, floor in floors.items():
        perfect = [compute_metrics(gaussian(count, 16, seed=s), real, config()).fid for s in range(1, 6)]
        assert floor.fid == pytest.approx(np.mean(perfect), rel=0.5)


def test_the_neighbourhood_of_the_floor_shrinks_with_few_real_images() -> None:
    floor = floor_metrics(gaussian(5), 4, config(kid_subset_size=2, prc_neighborhood=3))
    assert floor == floor_metrics(gaussian(5), 4, config(kid_subset_size=2, prc_neighborhood=1))
    assert floor.num_samples == 2


def test_the_floor_compares_images_with_others_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    real = np.arange(1000, dtype=np.float32).reshape(500, 2)
    monkeypatch.setattr("maskdm.scoring.scores.compute_metrics", lambda x, y, _: seen.append((x, y)))
    floor_metrics(real, 100, config())
    ((samples, others),) = seen
    assert (len(samples), len(others)) == (100, 400)
    assert {*samples[:, 0], *others[:, 0]} == {*real[:, 0]}


def test_kid_of_the_floor_is_of_smaller_subsets_where_it_must() -> None:
    real = gaussian(150)
    floor = floor_metrics(real, 120, config(kid_subset_size=100))
    assert floor.num_samples == 75
    assert floor == floor_metrics(real, 120, config(kid_subset_size=75))


@pytest.mark.parametrize(
    ("num_samples", "num_real", "changes", "message"),
    [
        (99, 500, {}, r"99 samples are fewer than the metrics need: 100 \(evaluation\.kid_subset_size 100"),
        (500, 99, {}, "99 real images are fewer than the metrics need: 100"),
        (10, 500, {"kid_subset_size": 2, "prc_neighborhood": 10}, "10 samples are fewer than the metrics need: 11"),
    ],
)
def test_too_few_features_are_refused(num_samples: int, num_real: int, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_counts(num_samples, num_real, config(**changes))
    with pytest.raises(UserError, match=message):
        compute_metrics(gaussian(num_samples), gaussian(num_real), config(**changes))


def test_just_enough_features_are_scored() -> None:
    tight = config(kid_subset_size=5, prc_neighborhood=4)
    assert np.isfinite(compute_metrics(gaussian(5, 2, seed=1), gaussian(5, 2, seed=2), tight).fid)


# --- the dataset's own classifier


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The file of a classifier, and its accuracy."""
    images, path = digits(), tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    assert images.labels is not None
    return path, write_classifier(path, images.pixels, images.labels, NUM_CLASSES, num_epochs=4)


@pytest.fixture
def classifier(trained: tuple[Path, float]) -> FeatureExtractor:
    return open_classifier(trained[0], CPU)


def test_the_classifier_knows_held_out_digits(trained: tuple[Path, float]) -> None:
    assert 0.9 < trained[1] <= 1.0


def test_the_classifier_is_the_same_every_time() -> None:
    images, labels = digits().pixels[:300], digits().labels
    assert labels is not None
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(train_classifier(images, labels[:300], NUM_CLASSES, num_epochs=2)[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_accuracy_is_of_images_it_was_not_trained_on() -> None:
    numbers = np.random.default_rng(0)
    images = digits().pixels[:300]
    labels = numbers.integers(0, NUM_CLASSES, 300)  # nothing but memory can know these
    assert train_classifier(images, labels, NUM_CLASSES, num_epochs=12)[1] < 0.4


def test_features_have_mean_square_1_over_the_images(classifier: FeatureExtractor) -> None:
    features = classifier.features(digits().pixels, 1000)
    assert features.shape == (1797, FEATURE_DIM)
    assert float(np.square(features).mean()) == pytest.approx(1, rel=0.05)


def test_a_written_classifier_is_the_one_that_was_trained(tmp_path: Path) -> None:
    images, labels = digits().pixels[:300], digits().labels
    assert labels is not None
    model, accuracy = train_classifier(images, labels[:300], NUM_CLASSES, num_epochs=1)
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    assert [write_classifier(file, images, labels[:300], NUM_CLASSES, 1) for file in files] == [accuracy, accuracy]
    assert files[0].read_bytes() == files[1].read_bytes()
    with torch.inference_mode():
        expected = model.embed(to_model_range(torch.from_numpy(images[:50]))).numpy()
    extractor = open_classifier(files[0], CPU)
    np.testing.assert_array_equal(extractor.features(images[:50], 50), expected)
    assert extractor.name == "classifier"
    assert extractor.sha256 == hashlib.sha256(files[0].read_bytes()).hexdigest()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_features_do_not_depend_on_the_batch_size(classifier: FeatureExtractor, batch_size: int) -> None:
    images = digits().pixels[:100]
    images.flags.writeable = False  # as a memory map of the stages
    features = classifier.features(images, batch_size)
    assert features.shape == (100, FEATURE_DIM)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, classifier.features(images, 100), rtol=1e-5, atol=1e-5)


def test_fid_tells_real_digits_from_shuffled_ones(classifier: FeatureExtractor) -> None:
    real, other = (classifier.features(digits().pixels[part], 500) for part in (slice(0, 800), slice(800, 1600)))
    pixels = digits().pixels[:800].reshape(800, -1)
    shuffled = np.random.default_rng(0).permuted(pixels, axis=1).reshape(800, 8, 8, 1)
    close, far = (
        compute_metrics(features, real, config()).fid for features in (other, classifier.features(shuffled, 500))
    )
    assert close < 0.2 * far


def test_a_classifier_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_classifier(path, CPU)
    path.unlink()
    save_tensors(path, {"ema": {"head.weight": torch.zeros(3)}}, {"architecture": {}})
    with pytest.raises(UserError, match="holds no classifier; run first: maskdm features --force"):
        open_classifier(path, CPU)


# --- pixel values


def test_pixels_are_their_values_in_the_order_of_rows_columns_and_channels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), dtype=np.uint8)
    extractor = open_pixels(CPU)
    np.testing.assert_allclose(extractor.features(images, 2), images.reshape(5, 18) / 127.5 - 1, atol=1e-6)
    assert (extractor.name, len(extractor.sha256), extractor.weights_sha256) == ("pixels", 64, None)


def test_written_features_are_those_in_memory(tmp_path: Path) -> None:
    images = digits().pixels[:50]
    extractor = open_pixels(CPU)
    written = extractor.features(images, batch_size=7, path=tmp_path / "features.npy")
    expected = extractor.features(images, batch_size=7)
    np.testing.assert_array_equal(written, expected)
    np.save(tmp_path / "expected.npy", expected)
    assert (tmp_path / "features.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


# --- torch-fidelity's extractors


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of torch-fidelity's Inception, as its own download would be."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    write_inception_weights(path)
    return path


def open_inception(weights: Path) -> FeatureExtractor:
    return open_pretrained(EvaluationConfig(features="inception-v3-compat", weights=str(weights)), CPU)


@pytest.fixture(scope="module")
def inception(inception_weights: Path) -> FeatureExtractor:
    return open_inception(inception_weights)


def test_inception_gives_2048_features_of_grey_and_colour_images_alike(inception: FeatureExtractor) -> None:
    grey = digits().pixels[:3]
    features = inception.features(grey, batch_size=2)
    assert features.shape == (3, 2048)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert len(np.unique(features, axis=0)) == 3
    colour = np.repeat(grey, 3, axis=-1)
    np.testing.assert_allclose(inception.features(colour, batch_size=3), features, rtol=1e-3, atol=1e-5)
    assert inception.name == "inception-v3-compat/2048"


@pytest.mark.filterwarnings("ignore")  # torch-fidelity's own
def test_scores_are_those_of_torch_fidelity_on_the_exported_files(
    inception: FeatureExtractor, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grey images against coloured ones, through the function behind the `fidelity` command.

    FID is left out: the eigenvalues of 2048 features take 17 seconds, and another test holds it on given features.
    """
    monkeypatch.setattr("maskdm.scoring.scores.frechet_distance", lambda *_: 0.0)
    numbers = np.random.default_rng(0)
    grey = digits().pixels[:10]
    colour = np.uint8(0.7 * digits().pixels[100:112] + numbers.integers(0, 70, (12, 1, 1, 3)))
    for name, images in (("grey", grey), ("colour", colour)):
        np.save(tmp_path / f"{name}.npy", images)
        (tmp_path / name).mkdir()
        write_pngs(open_set(tmp_path / f"{name}.npy", Reading(), tmp_path), tmp_path / name)
    features = [inception.features(images, batch_size=8) for images in (grey, colour)]
    ours = compute_metrics(features[0], features[1], config(kid_subset_size=8))
    from torch_fidelity import calculate_metrics

    theirs = calculate_metrics(
        input1=str(tmp_path / "grey"),
        input2=str(tmp_path / "colour"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        **{"kid": True, "prc": True, "kid_subset_size": 8, "kid_subsets": 10},
        **{"cuda": False, "batch_size": 8, "save_cpu_ram": True, "verbose": False, "cache": False},
    )
    assert ours.kid > 1e-2
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.kid_std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_the_hash_of_an_extractor_is_of_its_weights(
    inception: FeatureExtractor, inception_weights: Path, tmp_path: Path
) -> None:
    state, other = torch.load(inception_weights, weights_only=True), tmp_path / "other.pth"
    assert len(inception.sha256) == 64
    assert inception.weights_sha256 == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    torch.save(dict(reversed(state.items())), other)  # another file, the same weights
    assert open_inception(other).sha256 == inception.sha256
    state["fc.bias"][0] += 1e-3
    torch.save(state, other)
    assert open_inception(other).sha256 != inception.sha256


def test_weights_that_hold_code_are_refused_without_running_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(trace),)

    torch.save({"fc.weight": Payload()}, path)
    with pytest.raises(UserError, match=rf"evaluation\.weights: {path} is not a plain PyTorch weights file"):
        open_inception(path)
    assert not trace.exists()


def not_weights(folder: Path, kind: str) -> Path:
    """A path that holds no weights of Inception."""
    path = folder / "weights.pth"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"<html>Not found</html>")
    elif kind in ("other network", "tensor"):
        torch.save({"conv.weight": torch.zeros(3)} if kind == "other network" else torch.zeros(3), path)
    return path


def test_published_weights_are_called_by_the_names_that_they_are_downloaded_by() -> None:
    declare_missing_operators()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import VGG16_Weights

    urls = {"inception-v3-compat": URL_INCEPTION_V3, "vgg16": VGG16_Weights.IMAGENET1K_V1.url}
    assert {name: url.rpartition("/")[2] for name, url in urls.items()} == PUBLISHED


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no file"),
        (
            "empty",
            r"it is empty or cut off \(only .*; expected the file that torch-fidelity downloads, weights-\S+\.pth",
        ),
        ("text", r"is not a plain PyTorch weights file: .*; expected the file that torch-fidelity"),
        ("other network", "does not hold the weights of inception-v3-compat.*; expected the file that torch-fidelity"),
        ("tensor", "does not hold the weights of inception-v3-compat"),
        ("folder", "weights"),
    ],
)
def test_a_file_without_the_weights_is_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    path = not_weights(tmp_path, kind)
    with pytest.raises(UserError, match=message) as caught:
        open_inception(path)
    assert str(path) in str(caught.value)


def test_clip_takes_the_published_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    path.write_bytes(b"another program")
    with pytest.raises(UserError, match=r"is not the published file of clip-vit-b-32, ViT-B-32\.pt.*expected 40d36571"):
        open_pretrained(EvaluationConfig(features="clip-vit-b-32", weights=str(path)), CPU)


def test_dinov2_takes_no_file_and_the_error_says_what_to_do() -> None:
    with pytest.raises(
        ValidationError, match=r"takes no local weights: remove weights, and copy the folder of torch\.hub"
    ):
        EvaluationConfig(features="dinov2-vit-s-14", weights="dino.pth")


def test_without_a_download_the_error_says_what_to_do() -> None:
    declare_missing_operators()
    target = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with (
        patch(target, side_effect=OSError("no network")),
        pytest.raises(UserError, match=r"can't be downloaded \(no network\); give a local file in evaluation\.weights"),
    ):
        open_pretrained(EvaluationConfig(features="inception-v3-compat"), CPU)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (IncompleteRead(b""), "can't be downloaded"),
        (
            EOFError("Ran out of input"),
            "the downloaded file in torch's hub folder .* does not hold the weights of ince",
        ),
        (UnpicklingError("invalid load key"), "the downloaded file in torch's hub folder .*; delete it and try again"),
        (RuntimeError('invalid hash value (expected "a")'), "the downloaded file in torch's hub folder .*invalid hash"),
    ],
    ids=str,
)
def test_a_broken_download_is_reported(error: Exception, says: str) -> None:
    declare_missing_operators()
    target = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with patch(target, side_effect=error), pytest.raises(UserError, match=says) as refusal:
        open_pretrained(EvaluationConfig(features="inception-v3-compat"), CPU)
    assert "None" not in str(refusal.value)
