"""What an FID is of, reference statistics that are kept, `maskdm score` and `maskdm export-images`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description, publish_json
from maskdm.config import EvaluationConfig, load_params, paths
from maskdm.config.stamps import FILE, read_stamp, stamp_folder
from maskdm.data.arrays import ImageArrays, ShardWriter, StoredImages
from maskdm.models.exported import publish_exported
from maskdm.scoring import references
from maskdm.scoring.extractors import FeatureExtractor, open_pixels
from maskdm.scoring.protocol import Protocol, differences, drawn_as, flips_text, images_of
from maskdm.scoring.scores import Reference
from maskdm.stages.score import command, sets
from maskdm.stages.score.options import add_export_images, add_score
from tests.conftest import ARM, Experiment
from tests.factories import CPU, digits, protocol, tiny_model, tiny_params
from tests.report.made_up_results import stamp_outputs
from tests.scoring.fidelity import write_inception_weights

SCORES = ("fid", "kid", "kid_std", "precision", "recall", "num_samples")
SMALL = ["--kid-subsets", "10", "--kid-subset-size", "50", "--threads", "1"]  # as the tiny experiment


def parsed(add: Callable[[argparse.ArgumentParser], None], *words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add(parser)
    return parser.parse_args([str(word) for word in words])


def score(*words: str | Path) -> str:
    """What `maskdm score` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        command.score(parsed(add_score, *words))
    return out.getvalue()


def scores_of(*words: str | Path) -> dict[str, Any]:
    """What `maskdm score` writes."""
    score(*words, "--json", "scores.json")
    content: dict[str, Any] = json.loads(Path("scores.json").read_text())
    return content


def export_images(*words: str | Path) -> None:
    command.export_images(parsed(add_export_images, *words))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_dataset(folder: Path, images: np.ndarray, labels: np.ndarray | None = None) -> ImageArrays:
    """A prepared dataset in two shards."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, images.shape[1:], len(images) // 2 + 1)
    for number, image in enumerate(images):
        writer.add(image, None if labels is None else int(labels[number]))
    writer.finish(None if labels is None else tuple("0123456789"), {"kind": "made up"}, {"crop": "none"}, [])
    return ImageArrays.open(folder)


def save_pngs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(folder / f"{number:04d}.png")
    return folder


def colour(count: int, seed: int = 0, size: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# --- the protocol


def test_a_protocol_survives_json() -> None:
    assert Protocol.from_dict(json.loads(json.dumps(protocol().as_dict()))) == protocol()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"shape": [1, 2]},
        *(
            {**protocol().as_dict(), **odd}
            for odd in ({"more": 1}, {"images": "x"}, {"images": [1]}, {"metrics": {}}, {"drawn": None})
        ),
    ],
)
def test_what_is_no_protocol_is_told(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a protocol of this version"):
        Protocol.from_dict(content)


def test_a_protocol_says_what_an_fid_is_of() -> None:
    text = protocol().text
    assert len(text.splitlines()) == 2
    for said in (
        *("1,000 generated images (EMA weights, ddim, 50 evaluations each, eta 0)", "2,000 real ones"),
        *("celeba train", "fraction 0.1", "held out", "64×64 RGB", "cropped to 128×128 from row 57, column 25"),
        *("inception-v3-compat/2048", "sha256 bbbbbbbbbbbb", "(file cccccccccccc)", "100 subsets of 500"),
    ):
        assert said in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 999}, "num_samples: 1000 and 999"),
        ({"images": {**protocol().images, "crop": "none"}}, "images.crop: box and none"),
        ({"images": {**protocol().images, "limit": 5}}, "images.limit: none and 5"),
        ({"extractor_sha256": "d" * 64}, "extractor_sha256: bbbbbbbbbbbb… and dddddddddddd…"),
        ({"drawn": {**protocol().drawn, "num_steps": 49}}, "drawn.num_steps: 50 and 49"),
        ({"reference": "train"}, "reference: held_out and train"),
    ],
)
def test_what_differs_between_protocols_is_named(changes: dict[str, Any], message: str) -> None:
    assert list(differences(protocol().as_dict(), protocol(**changes).as_dict())) == [message]
    assert not list(differences(protocol().as_dict(), protocol().as_dict()))


def test_where_the_files_lay_is_no_part_of_it() -> None:
    manifest = {"source": {"kind": "image_folder", "root": "here", "limit": None}, "protocol": {"crop": "none"}}
    assert images_of(manifest) == {"kind": "image_folder", "crop": "none"}


# --- real images


def test_datasets_one_behind_the_other_are_one(tmp_path: Path) -> None:
    images, labels = digits().pixels[:50], digits().labels
    assert labels is not None
    parts = [
        write_dataset(tmp_path / "a", images[:31], labels[:31]),
        write_dataset(tmp_path / "b", images[31:], labels[31:50]),
    ]
    both = StoredImages(parts)
    assert both.shape == (50, 8, 8, 1)
    np.testing.assert_array_equal(both[10:40], images[10:40])
    np.testing.assert_array_equal(both[40:90], images[40:])
    chosen = np.array([49, 0, 31, 30, 31])
    np.testing.assert_array_equal(both[chosen], images[chosen])
    np.testing.assert_array_equal(both.labels, labels[:50])
    assert len({both.sha256, *(part.sha256 for part in parts), StoredImages(parts[::-1]).sha256}) == 4
    assert StoredImages(parts[:1]).sha256 == parts[0].sha256


def features_of(experiment: Experiment) -> dict[str, Any]:
    experiment.succeed("features")
    content: dict[str, Any] = json.loads(experiment.path("results/features/features.json").read_text())
    return content


@pytest.mark.parametrize(("which", "expected"), [("train", "results/data"), ("held_out", "results/data/held_out")])
def test_the_reference_is_the_part_that_was_asked_for(tiny: Experiment, which: str, expected: str) -> None:
    tiny.change(dataset={"held_out": 0.4}, evaluation={"reference": which, "features": "pixels"}).succeed("prepare")
    images, info = ImageArrays.open(tiny.path(expected)), features_of(tiny)
    reference = np.load(tiny.path("results/features/reference.npy"))
    np.testing.assert_allclose(reference, images.all().reshape(len(images), -1) / 127.5 - 1, atol=1e-6)
    assert (info["num_real"], info["real_sha256"]) == (len(images), images.sha256)
    tiny.succeed("scale")
    scale = json.loads(tiny.path("results/metrics/scale.json").read_text())
    assert (scale["protocol"]["reference"], scale["protocol"]["num_real"]) == (which, len(images))


def test_all_is_both_parts_and_the_classifier_learns_from_all_images(tiny: Experiment) -> None:
    tiny.change(dataset={"held_out": 0.4}, evaluation={"reference": "all"}).succeed("prepare")
    of_all = features_of(tiny)
    of_train = features_of(tiny.change(evaluation={"reference": "train"}))
    parts = [ImageArrays.open(tiny.path(place)) for place in ("results/data", "results/data/held_out")]
    assert of_all["num_real"] == sum(map(len, parts)) == 200
    assert of_all["real_sha256"] == StoredImages(parts).sha256
    assert of_all["extractor_sha256"] == of_train["extractor_sha256"]  # of the ruler, which is the same for both


def test_features_of_other_images_held_out_are_refused(tiny: Experiment) -> None:
    tiny.change(dataset={"held_out": 0.4}, evaluation={"features": "pixels"}).succeed("prepare")
    info = features_of(tiny)
    tiny.change(dataset={"seed": 1}).succeed("prepare")
    outcome = tiny.run("scale")
    assert outcome.code == 1
    assert "results/features is out of date: results/data has changed; results/data/held_out has " in outcome.err
    assert "run first: maskdm features" in outcome.err
    assert features_of(tiny)["held_out_sha256"] != info["held_out_sha256"]


def test_the_dataset_is_never_held_whole(prepared: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    gather = ImageArrays.gather
    monkeypatch.setattr(ImageArrays, "gather", lambda self, rows: asked.append(len(rows)) or gather(self, rows))
    monkeypatch.setattr(ImageArrays, "all", lambda _: pytest.fail("the whole dataset was asked for"))
    prepared.change(evaluation={"features": "pixels", "batch_size": 16}).succeed("features")
    assert max(asked) == 16
    assert sum(asked) == 200


# --- statistics and features that are kept


def reference(count: int = 60, dim: int = 4) -> tuple[np.ndarray, Reference]:
    features = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    np.save(paths.REAL_FEATURES, features)
    return features, Reference.of(features, 3)


def test_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    features, expected = reference()
    references.save_statistics(tmp_path, expected)
    found = references.open_reference(tmp_path, 3)
    np.testing.assert_array_equal(found.features, features)
    for name in ("mean", "covariance", "radii"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(("count", "dim", "neighborhood"), [(60, 4, 2), (59, 4, 3), (60, 3, 3)])
def test_statistics_of_other_features_are_refused(tmp_path: Path, count: int, dim: int, neighborhood: int) -> None:
    features, found = reference()
    references.save_statistics(tmp_path, found)
    np.save(paths.REAL_FEATURES, features[:count, :dim])
    with pytest.raises(UserError, match="was computed from other features than those beside it; run first: maskdm fea"):
        references.open_reference(tmp_path, neighborhood)


def test_features_that_were_changed_afterwards_are_refused(tmp_path: Path) -> None:
    features, found = reference()
    references.save_statistics(tmp_path, found)
    np.save(paths.REAL_FEATURES, features + 1)
    with pytest.raises(UserError, match="was computed from other features"):
        references.open_reference(tmp_path, 3)


def test_damaged_statistics_are_refused(prepared: Experiment) -> None:
    prepared.change(evaluation={"features": "pixels"}).succeed("features")
    file = prepared.path("results/features/statistics.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    outcome = prepared.run("scale")
    assert outcome.code == 1
    assert "statistics.safetensors is not a readable safetensors file" in outcome.err


def test_kept_features_are_those_of_equal_images_extractor_and_neighborhood_alone() -> None:
    pixels = open_pixels(CPU)
    other = type(pixels)("pixels", "0" * 64, pixels.embed, CPU)
    keys = {
        references.key_of("a" * 64, pixels, 256, 3),
        references.key_of("b" * 64, pixels, 256, 3),
        references.key_of("a" * 64, other, 256, 3),
        references.key_of("a" * 64, pixels, 128, 3),
        references.key_of("a" * 64, pixels, 256, 5),
    }
    assert len(keys) == 5
    assert references.key_of("a" * 64, pixels, 256, 3) in keys


def test_threads_are_part_of_what_is_kept_of_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, set[str]] = {"cpu": set(), "cuda": set()}
    for threads in (1, 2):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        for kind, found in keys.items():
            found.add(references.key_of("a" * 64, open_pixels(torch.device(kind)), 256, 3))
    assert {kind: len(found) for kind, found in keys.items()} == {"cpu": 2, "cuda": 1}
    assert not keys["cpu"] & keys["cuda"]


def test_what_is_kept_is_brought_back_and_a_damaged_entry_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features, found = reference()
    references.save_statistics(tmp_path, found)
    assert references.restore("k" * 32, tmp_path / "nowhere", 3) is None
    references.keep("k" * 32, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    again = references.restore("k" * 32, other, 3)
    assert again is not None
    assert "real features: taken from" in capsys.readouterr().err
    np.testing.assert_array_equal(again.features, features)
    np.testing.assert_array_equal(again.covariance, found.covariance)
    kept = references.kept_at("k" * 32) / paths.REAL_FEATURES
    kept.unlink()
    kept.write_bytes(b"other")
    for file in other.iterdir():
        file.unlink()
    assert references.restore("k" * 32, other, 3) is None
    assert "are damaged (the sha256 of reference.npy is another): computing them again" in capsys.readouterr().err
    assert not list(other.iterdir()), "what is written there next is not written into the kept file"


@pytest.mark.workflow
def test_experiments_on_equal_images_share_the_features_of_a_pretrained_extractor(
    tiny: Experiment, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path_factory.mktemp("project")
    file = project / "weights.pth"
    write_inception_weights(file)
    (project / ".dvc").mkdir()
    evaluation = {"features": "inception-v3-compat", "weights": str(file), "kid_subset_size": 6}
    tiny.change(dataset={"limit": 8}, evaluation=evaluation, sampling={"num_samples": 8}).succeed("prepare")
    others = [tiny.copy_to(project / name) for name in ("first", "second", "third")]
    computed: list[int] = []
    compute = FeatureExtractor.features
    monkeypatch.setattr(FeatureExtractor, "features", lambda *a, **k: computed.append(1) or compute(*a, **k))
    said = [others[0].succeed("features").err, others[1].succeed("features").err]
    assert len(computed) == 1
    assert "real features: taken from" not in said[0]
    assert "real features: taken from" in said[1]
    (entry,) = (path for path in (project / ".work" / "references").iterdir() if path.is_dir())
    (entry / "statistics.safetensors").unlink()
    assert "are damaged" in others[2].succeed("features").err
    assert len(computed) == 2
    hashes = [list(other.hashes("results/features").values()) for other in others]
    assert hashes[0] == hashes[1] == hashes[2]
    weights = hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(others[1].path("results/features/features.json").read_text())["weights_sha256"] == weights


# --- maskdm score


def metrics_of(experiment: Experiment) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(experiment.path(f"results/metrics/{ARM}-seed-0.json").read_text())
    return content


def test_the_numbers_are_the_pipelines_for_samples_in_every_form(
    scored_once: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = metrics_of(scored_once)
    data = scored_once.path("results/data")
    samples = scored_once.path(f"results/samples/{ARM}/seed-0/milestone-1.000.npy")
    checkpoint = scored_once.path(f"results/finetune/{ARM}/seed-0/milestone-1.000.safetensors")
    classifier = scored_once.path("results/features/classifier.safetensors")
    export_images(samples, "--out", "png")
    use = ["--features", "classifier", *SMALL]
    for source, more in (
        (samples, ["--weights", classifier]),
        (samples, ["--classifier-epochs", "2"]),  # trained on B anew, as the stage `features` has
        (Path("png"), ["--weights", classifier]),
        (checkpoint, ["--weights", classifier, "--num-samples", "64", "--device", "cpu"]),
    ):
        found = scores_of(source, data, *use, *more)
        assert {k: found[k] for k in SCORES} == pytest.approx({k: expected[k] for k in SCORES}, rel=1e-9), source
        assert found["protocol"]["extractor_sha256"] == expected["extractor_sha256"]
        assert found["protocol"]["real_sha256"] == expected["protocol"]["real_sha256"]
        assert found["protocol"]["images"] == expected["protocol"]["images"]
    assert found["protocol"]["drawn"] == expected["protocol"]["drawn"]


def test_images_drawn_from_a_model_come_with_the_flips_of_its_training(
    scored_once: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, words = scored_once.path("results/data"), ("--features", "pixels", "--num-samples", "60", *SMALL)
    trained = scored_once.copy_to(tmp_path / "trained")
    trained.succeed("export", f"results/finetune/{ARM}/seed-0", "--out", "model")
    trained.change(training={"flip": 0.5})  # not what its weights were trained with
    for place in (
        *(f"results/pretrain/{ARM}/seed-0/checkpoint.safetensors", "model"),
        f"results/finetune/{ARM}/seed-0/milestone-1.000.safetensors",
    ):
        assert ", trained without left-right flips\n" in score(trained.path(place), data, *words)
    tell_training(trained, "finetune", flip=0.25)
    assert ", trained with left-right flips of probability 0.25\n" in score(trained.path(place), data, *words)


@pytest.mark.parametrize(("stage", "file"), [("pretrain", "checkpoint"), ("finetune", "milestone-1.000")])
def test_of_what_began_from_weights_of_elsewhere_the_flips_are_not_known(
    scored_once: Experiment, tmp_path: Path, stage: str, file: str
) -> None:
    began = scored_once.copy_to(tmp_path)
    weights = began.path(f"results/{stage}/{ARM}/seed-0/{file}.safetensors")
    words = (weights, scored_once.path("results/data"), "--features", "pixels", "--num-samples", "60", *SMALL)
    assert "flips" in score(*words)
    restamp(began.path(f"results/pretrain/{ARM}/seed-0"), inputs={"pretrain.checkpoint": "c" * 64})
    assert "flips" not in score(*words)


def test_of_what_was_pretrained_again_since_the_flips_are_not_known(scored_once: Experiment, tmp_path: Path) -> None:
    again = scored_once.copy_to(tmp_path)
    (again.path(f"results/pretrain/{ARM}/seed-0") / "more.txt").touch()
    restamp(again.path(f"results/pretrain/{ARM}/seed-0"))
    place = again.path(f"results/finetune/{ARM}/seed-0/milestone-1.000.safetensors")
    words = ("--features", "pixels", "--num-samples", "60", *SMALL)
    assert "flips" not in score(place, scored_once.path("results/data"), *words)


def tell_training(experiment: Experiment, stage: str, **training: Any) -> None:
    """Have a stamp say that the weights beside it were trained with other values."""
    folder = experiment.path(f"results/{stage}/{ARM}/seed-0")
    stamp = read_stamp(folder)
    assert stamp is not None
    restamp(folder, values={**stamp.values, "training": {**stamp.values["training"], **training}})


def restamp(folder: Path, **changes: Any) -> None:
    """Stamp a folder as it is now, with another origin."""
    stamp = read_stamp(folder)
    assert stamp is not None
    (folder / FILE).unlink()
    stamp_folder(folder, replace(stamp, **changes))


def test_the_numbers_come_with_what_they_are_of_and_the_reports_cautions() -> None:
    np.save("a.npy", colour(60))
    save_pngs(Path("b"), colour(80, seed=1))
    text = score("a.npy", "b", "--features", "pixels", *SMALL)
    for said in (
        *("A  a.npy: 60 images, 6×6 RGB", "B  b: 80 images, 6×6 RGB", "Scores are of 60 generated images (a.npy)"),
        *("Features: pixels, sha256", "these are not Inception FIDs", "FID is biased", "does not have full rank"),
    ):
        assert said in text
    assert "trained" not in text.replace("trained on", ""), "of files nothing is known of a training"


@pytest.mark.parametrize("place", ["folder", "zip", "tar", "array", "dataset"])
def test_equal_images_are_equal_whatever_they_lie_in(tmp_path: Path, place: str) -> None:
    images = colour(60)
    folder = save_pngs(Path("folder"), images)
    if place in ("zip", "tar"):
        folder = Path(shutil.make_archive("archive", place, "folder"))
    elif place == "array":
        folder = Path("array.npy")
        np.save(folder, images)
    elif place == "dataset":
        write_dataset(tmp_path / "dataset", images)
        folder = Path("dataset")
    np.save("images.npy", images)
    scores = scores_of(folder, "images.npy", "--features", "pixels", *SMALL)
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"]) == (1.0, 1.0)


def test_an_exported_model_is_drawn_from() -> None:
    params = tiny_params(sampling={"num_steps": 2, "num_samples": 500})
    weights = tiny_model(params).state_dict()
    publish_exported(Path("model"), params, 0, {"ema": dict(weights)}, "ema", {}, "a card")
    np.save("b.npy", digits().pixels[:80])
    words = ["model", "b.npy", "--features", "pixels", "--num-samples", "60", "--device", "cpu", *SMALL]
    first = scores_of(*words)
    assert first["num_samples"] == 60
    assert first["protocol"]["drawn"] == drawn_as(params.sampling)
    assert scores_of(*words) == first
    assert scores_of(*words, "--seed", "1")["fid"] != first["fid"]
    weights_sha256 = hashlib.sha256(Path("model/model.safetensors").read_bytes()).hexdigest()
    assert (first["a_weights_sha256"], first["b_weights_sha256"]) == (weights_sha256, None)
    assert f"drawn from weights of sha256 {weights_sha256[:12]}\n" in score(*words), "its training is not known"


def test_how_files_were_made_is_told_of_both_sets() -> None:
    save_pngs(Path("a"), colour(60, size=9))
    write_dataset(Path("b"), colour(60))  # crop: none
    words = ["--features", "pixels", "--image-size", "6", *SMALL]
    text = score("a", "b", *words, "--resize-filter", "bicubic")
    assert "60 generated images (a, not cropped, resized by bicubic, antialiased)" in text
    assert "made from their files in different ways (resize_filter: bicubic and none)" in text
    assert "in different ways (crop: center and none; resize" in score("a", "b", *words, "--crop", "center")
    assert scores_of("a", "a", *words)["protocol"]["drawn"] == {"from": "a", "crop": "none", "resize_filter": "lanczos"}
    assert "in different ways" not in score("a", "a", *words)
    np.save("c.npy", colour(60))
    assert "in different ways" not in score("a", "c.npy", *words), "of an array nothing is known"


def test_a_pretrained_checkpoint_is_drawn_at_the_size_of_its_own_dataset(prepared: Experiment) -> None:
    other = {**prepared.content["dataset"], "image_size": 16}
    pretrain = {**prepared.content["arms"][ARM].get("pretrain", {}), "dataset": "large"}
    arms = {ARM: {**prepared.content["arms"][ARM], "pretrain": pretrain}}
    prepared.keep_arm(ARM).change(datasets={"large": other}, arms=arms).succeed("prepare")
    prepared.succeed("pretrain", "--arm", ARM, "--seed", "0")
    checkpoint = prepared.path(f"results/pretrain/{ARM}/seed-0/checkpoint.safetensors")
    export_images(checkpoint, "--out", "png", "--num-samples", "2", "--device", "cpu", "--threads", "1")
    for file in Path("png").iterdir():
        with Image.open(file) as image:
            assert image.size == (16, 16)


def test_files_take_the_channels_of_the_other_set() -> None:
    grey = digits().pixels[:60]
    np.save("grey.npy", grey)
    save_pngs(Path("png"), np.repeat(grey, 3, axis=3))
    assert scores_of("png", "grey.npy", "--features", "pixels", *SMALL)["protocol"]["shape"] == [8, 8, 1]
    assert scores_of("png", "png", "--features", "pixels", *SMALL)["protocol"]["shape"] == [8, 8, 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_files_are_read_with_one_channel_and_that_is_said(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        for number, image in enumerate(colour(60, seed)[..., :1]):
            path = save_pngs(Path(name) / str(number), image[None]) / "0000.png"
            if mode == "I;16":
                Image.fromarray(image[..., 0].astype(np.uint16)).save(path)
            else:
                Image.open(path).convert(mode).save(path)
    words = ["--features", "pixels", *SMALL]
    assert scores_of("a", "b", *words)["protocol"]["shape"] == [6, 6, 1]
    assert "the images of A and B are grey: read with one channel (--channels 3" in capsys.readouterr().err
    assert scores_of("a", "b", *words, "--channels", "3")["protocol"]["shape"] == [6, 6, 3]
    assert "grey" not in capsys.readouterr().err


def test_one_image_in_colour_makes_all_rgb(capsys: pytest.CaptureFixture[str]) -> None:
    grey = digits().pixels[:60]
    for name in "abc":
        save_pngs(Path(name), grey)
    Image.new("RGB", (8, 8), "red").save("b/0059.png")
    words = ["--features", "pixels", *SMALL]
    assert scores_of("a", "b", *words)["protocol"]["shape"] == [8, 8, 3]
    assert "the images of a are grey, not all of b are: both are read as RGB (--channels 1" in capsys.readouterr().err
    assert scores_of("b", "b", *words)["protocol"]["shape"] == [8, 8, 3]
    assert "grey" not in capsys.readouterr().err, "both are in colour"
    assert scores_of("b", "c", *words, "--channels", "1")["protocol"]["shape"] == [8, 8, 1]


def test_a_set_in_colour_is_known_by_its_first_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are opened once, to be decoded."""
    opened: list[bool] = []
    looked = sets.is_grey
    monkeypatch.setattr(sets, "is_grey", lambda *a: opened.append(True) or looked(*a))
    save_pngs(Path("a"), colour(60))
    score("a", "a", "--features", "pixels", *SMALL)
    assert len(opened) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_exported_files_are_as_grey_as_those_they_were_made_of(channels: int) -> None:
    images = colour(3)[..., :channels]
    save_pngs(Path("a"), images)
    export_images("a", "--out", "png")
    np.testing.assert_array_equal(
        np.stack([np.array(Image.open(f)) for f in sorted(Path("png").iterdir())]).reshape(images.shape), images
    )


def test_sizes_that_differ_are_resized_if_asked() -> None:
    save_pngs(Path("a"), colour(60, size=9))
    np.save("b.npy", colour(60, size=6))
    scores = scores_of("a", "b.npy", "--features", "pixels", "--image-size", "6", "--resize-filter", "bicubic", *SMALL)
    assert scores["protocol"]["shape"] == [6, 6, 3]


def _no_images() -> None:
    Path("a").mkdir()


def _two_sizes() -> None:
    save_pngs(Path("a"), colour(60))
    Image.new("RGB", (5, 6)).save("a/0059.png")


def _bad_image() -> None:
    save_pngs(Path("a"), colour(60))
    Path("a/0030.png").write_bytes(Path("a/0030.png").read_bytes()[:40])


def _bad_first_image() -> None:
    save_pngs(Path("a"), colour(60))
    Path("a/0000.png").write_bytes(b"no image")


def _nonsense() -> None:
    Path("a.npy").write_bytes(b"\x93NUMPY nonsense")


def _floats() -> None:
    np.save("a.npy", np.zeros((60, 6, 6, 3)))


def _pickle() -> None:
    np.save("a.npy", np.array([{}], dtype=object), allow_pickle=True)


def _few() -> None:
    np.save("a.npy", colour(49))


def _good() -> None:
    np.save("a.npy", colour(60))


def _text() -> None:
    _good()
    Path("text").write_text("some text")


def _larger() -> None:
    np.save("a.npy", colour(60, size=7))


def _checkpoint() -> None:
    Path("a.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("make", "a", "more", "message"),
    [
        (_good, "missing", [], "there is no missing"),
        (_no_images, "a", [], "no images in a"),
        (_two_sizes, "a", [], r"0059\.png is 6×5 pixels, a/0000\.png is 6×6: say with --image-size N"),
        (_bad_image, "a", [], r"bad image a/0030\.png"),
        (_bad_first_image, "a", [], r"bad image a/0000\.png: not an image of a known format"),
        (_nonsense, "a.npy", [], r"a\.npy can't be read as a \.npy array"),
        (_pickle, "a.npy", [], r"a\.npy can't be read as a \.npy array"),
        (_floats, "a.npy", [], r"a\.npy holds float64 \(60, 6, 6, 3\); expected images, uint8"),
        (_few, "a.npy", [], r"a\.npy has 49 images, fewer than KID's subsets of 50: .* a smaller --kid-subset-size"),
        (_larger, "a.npy", [], r"must be images of one size and kind, and a\.npy: 60 images, 7×7 RGB, but b\.npy: 60"),
        (_checkpoint, "a.safetensors", [], "a.safetensors is a model: --num-samples N says"),
        (_checkpoint, "a.safetensors", ["--num-samples", "60"], r"no folder above it has a params\.yaml"),
        (_good, "a.npy", ["--features", "classifier"], r"trained on the labels of B, and b\.npy has none"),
        (_good, "a.npy", ["--features", "pixels", "--weights", "w"], "--features pixels takes no --weights"),
        (
            _good,
            "a.npy",
            ["--features", "inception-v3-compat", "--weights", "b.npy"],
            "^--weights: b.npy is not a plain",
        ),
        (
            _text,
            "a.npy",
            ["--features", "inception-v3-compat", "--weights", "text"],
            "^--weights: text is not a plain PyTorch weights file: .* expected the file that .* or no --weights",
        ),
        (_good, "a.npy", ["--features", "classifier", "--weights", "b.npy"], "not a readable safetensors file"),
        (_good, "a.npy", ["--features", "dinov2-vit-s-14", "--weights", "b.npy"], "weights"),
    ],
)
def test_bad_input_is_told_and_nothing_written(make: Callable[[], None], a: str, more: list[str], message: str) -> None:
    make()
    np.save("b.npy", colour(60, seed=1))
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message):
        score(a, "b.npy", "--features", "pixels", *SMALL, *more, "--json", "scores.json")
    assert sorted(Path().rglob("*")) == before


# --- maskdm export-images


@pytest.mark.parametrize("channels", [1, 3])
def test_exported_files_are_the_images_bit_by_bit(channels: int) -> None:
    images = colour(30)[..., :channels]
    np.save("a.npy", images)
    export_images("a.npy", "--out", "png")
    files = sorted(Path("png").iterdir())
    assert [file.name for file in files] == [f"{number:08d}.png" for number in range(30)]
    read = np.stack([np.array(Image.open(file)) for file in files]).reshape(images.shape)
    np.testing.assert_array_equal(read, images)


def test_a_dataset_is_exported(tmp_path: Path) -> None:
    arrays = write_dataset(tmp_path / "data", digits().pixels[:30])
    export_images("data", "--out", "png")
    np.testing.assert_array_equal(np.array(Image.open("png/00000029.png"))[..., None], arrays.all()[29])


def test_a_folder_that_is_there_is_not_touched() -> None:
    np.save("a.npy", colour(3))
    Path("png").mkdir()
    Path("png/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="png exists: name a new folder"):
        export_images("a.npy", "--out", "png")
    assert [file.name for file in Path("png").iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_an_export_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("a.npy", colour(600))
    written = []

    def save(self: Image.Image, file: Path, **_: Any) -> None:
        written.append(file)
        if len(written) == 300:
            raise OSError(28, "No space left on device")
        file.write_bytes(b"png")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match="No space left on device"):
        export_images("a.npy", "--out", "png")
    assert [path.name for path in Path().iterdir()] == ["a.npy"]


# --- the report


@pytest.mark.parametrize(
    ("flips", "text"),
    [
        ({}, ""),
        ({"scratch": 0.0, ARM: 0.0}, "Trained without left-right flips."),
        ({"scratch": 0.5, ARM: 0.5}, "Trained with left-right flips of probability 0.5."),
        (
            {"scratch": 0.5, ARM: 0.0, "b": 0.5},
            f"Trained with left-right flips of probability 0.5: scratch, b; without left-right flips: {ARM}.",
        ),
    ],
)
def test_flips_are_told_by_arm_where_they_differ(flips: dict[str, float], text: str) -> None:
    assert flips_text(flips) == text


def test_the_report_shows_the_flips_of_training_wherever_it_shows_fid(finished: Experiment) -> None:
    folder = finished.path("results/report")
    said = "Trained without left-right flips."
    for printed in (
        finished.succeed("summary").out,
        *((folder / f).read_text() for f in ("summary.md", "report.html")),
    ):
        assert said in printed
    path = finished.path(f"results/metrics/{ARM}-seed-0.json")
    publish_json(path, {**json.loads(path.read_text()), "flip": 0.25})
    stamp(finished)
    said = f"Trained without left-right flips: scratch, block2-m75; with left-right flips of probability 0.25: {ARM}."
    assert said in " ".join(finished.succeed("report").out.split()), "no part of the protocol: still one table"
    assert said in " ".join(finished.succeed("summary").out.split())
    assert f"with probability 0, but {ARM} 0.25" in (folder / "summary.md").read_text()


@pytest.mark.parametrize("content", ["{", '{"flip": 1}', '{"flip": {"scratch": "often"}}', "{}"])
def test_flips_that_can_not_be_read_are_told(finished: Experiment, content: str) -> None:
    place = finished.path("results/report/training.json")
    if content == "{":
        place.write_text(content)
    else:
        publish_description(place, json.loads(content))
    outcome = finished.run("summary")
    assert outcome.code == 1
    assert "training.json can't be read" in outcome.err
    assert "run first: maskdm report" in outcome.err


def stamp(experiment: Experiment) -> None:
    """Stamp all outputs as they are now."""
    with contextlib.chdir(experiment.folder):
        stamp_outputs(load_params())


def test_the_report_shows_the_protocol_wherever_it_shows_fid(finished_once: Experiment) -> None:
    expected = Protocol.from_dict(metrics_of(finished_once)["protocol"])
    folder = finished_once.path("results/report")
    assert (
        Protocol.from_dict(
            {k: v for k, v in json.loads((folder / "protocol.json").read_text()).items() if k != "checksum"}
        )
        == expected
    )
    assert "64 generated images (EMA weights, ddim, 5 evaluations each" in expected.text
    first_words = " ".join(expected.text.split()[:12])
    for printed in (finished_once.succeed("summary").out, (folder / "summary.md").read_text()):
        assert first_words in " ".join(printed.split())
    assert "64 generated images (EMA weights, ddim" in (folder / "report.html").read_text()


def test_the_defaults_of_the_command_are_those_of_the_pipeline() -> None:
    options, config = parsed(add_score, "a", "b"), EvaluationConfig()
    names = ("batch_size", "kid_subsets", "kid_subset_size", "prc_neighborhood", "classifier_epochs")
    assert [getattr(options, name) for name in names] == [getattr(config, name) for name in names]
