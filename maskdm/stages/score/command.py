"""What `maskdm score` and `maskdm export-images` do."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskdm.base.errors import UserError
from maskdm.base.progress import progress
from maskdm.base.publishing import publish_folder, publish_json
from maskdm.config import ComputeConfig, EvaluationConfig, paths
from maskdm.report.numbers import number_text
from maskdm.scoring.classifier import write_classifier
from maskdm.scoring.extractors import FeatureExtractor, Knobs, open_classifier, open_extractor
from maskdm.scoring.protocol import (
    Protocol,
    bias_note,
    differences,
    extractor_caution,
    few_samples_caution,
    metrics_as,
    shaping_of,
)
from maskdm.scoring.references import make_reference
from maskdm.scoring.scores import compute_metrics
from maskdm.stages.score.sets import ImageSet, Reading, open_pair, open_set
from maskdm.training import devices

ON_COMMAND_LINE = Knobs("--features ", "--weights")


def score(options: argparse.Namespace) -> None:
    """Score A against B, print the scores, and write a JSON file if asked.

    Args:
        options: those of `options.add_score`.

    Raises:
        UserError: A or B can't be opened, they differ in shape or have too few images, or there is no such extractor.
    """
    config, reading = _config(options), _reading(options)
    compute = devices.resolve(reading.machine)
    with tempfile.TemporaryDirectory() as scratch:
        a, b = open_pair(options.a, options.b, reading, Path(scratch))
        for images in (a, b):
            _check_count(images, config)
        (folder := Path(scratch) / "features").mkdir()
        extractor = _extractor(options, config, b, folder, compute)
        title = f"features of {b.name}"
        reference = make_reference(folder, b.pixels, b.sha256, extractor, config, title, should_keep=False)
        features = extractor.features(a.pixels, config.batch_size, f"features of {a.name}")
        scores = compute_metrics(features, reference, config)
    protocol = Protocol(
        images=b.about,
        shape=b.shape,
        reference="given",
        num_real=len(b),
        real_sha256=b.sha256,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        weights_sha256=extractor.weights_sha256,
        num_samples=len(a),
        drawn=a.drawn,
        metrics=metrics_as(config),
    )
    cautions = list(_cautions(a, b, protocol, features.shape[1]))
    print(f"A  {a.text}\nB  {b.text}\n")
    print(f"FID        {number_text(round(scores.fid, 6) + 0.0)}")  # not −0
    print(f"KID×1000   {number_text(1000 * scores.kid)} ± {number_text(1000 * scores.kid_std)} (SD of the subsets)")
    print(f"precision  {scores.precision:.3f}\nrecall     {scores.recall:.3f}\n")
    print("\n".join([protocol.text, *(f"Caution. {text}" for text in cautions)]))
    if options.json is not None:
        weights = {"a_weights_sha256": a.weights_sha256, "b_weights_sha256": b.weights_sha256}
        content = {"a": a.name, "b": b.name, **scores.as_dict(), "cautions": cautions, **weights}
        publish_json(options.json.absolute(), {**content, "protocol": protocol.as_dict()})


def export_images(options: argparse.Namespace) -> None:
    """Write a set of images as PNG files, all or none.

    Args:
        options: those of `options.add_export_images`.

    Raises:
        UserError: the images can't be opened, or the folder exists or can't be written.
    """
    if options.out.exists():
        raise UserError(f"{options.out} exists: name a new folder with --out")
    with tempfile.TemporaryDirectory() as scratch:
        images = open_set(options.source, _reading(options), Path(scratch))
        with publish_folder(options.out.absolute()) as folder:
            write_pngs(images, folder)
    print(f"{images.text} → {options.out}")


def write_pngs(images: ImageSet, folder: Path) -> None:
    """Write 00000000.png and so on into an existing, empty folder."""
    for number in progress(range(len(images)), len(images), "Writing PNG files", "images"):
        (pixels,) = np.asarray(images.pixels[number : number + 1])
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(folder / f"{number:08d}.png", format="PNG")


def _reading(options: argparse.Namespace) -> Reading:
    return Reading(
        options.image_size,
        options.channels,
        options.crop,
        options.resize_filter,
        options.num_samples,
        options.seed,
        ComputeConfig(device=options.device, precision="auto", threads=options.threads),
    )


def _config(options: argparse.Namespace) -> EvaluationConfig:
    """The options as the section `evaluation` of params.yaml, which does not name a classifier's file."""
    is_ours = options.features in ("classifier", "pixels")
    if options.features == "pixels" and options.weights:
        raise UserError("--features pixels takes no --weights: it compares pixel values")
    names = ("features", "batch_size", "kid_subsets", "kid_subset_size", "prc_neighborhood", "classifier_epochs")
    weights = None if is_ours or options.weights is None else str(options.weights)
    try:
        return EvaluationConfig(**{name: getattr(options, name) for name in names}, weights=weights)
    except ValueError as error:
        raise UserError(f"--weights: {str(error).splitlines()[-2].strip().removeprefix('Value error, ')}") from None


def _check_count(images: ImageSet, config: EvaluationConfig) -> None:
    start = f"{images.name} has {len(images)} images"
    if len(images) < config.kid_subset_size:
        raise UserError(
            f"{start}, fewer than KID's subsets of {config.kid_subset_size}: give more, or a smaller --kid-subset-size"
        )
    if len(images) <= config.prc_neighborhood:
        raise UserError(
            f"{start}: precision and recall need {config.prc_neighborhood} neighbours of each; "
            "give more, or a smaller --prc-neighborhood"
        )


def _extractor(
    options: argparse.Namespace, config: EvaluationConfig, real: ImageSet, folder: Path, compute: devices.Compute
) -> FeatureExtractor:
    """The extractor of --features; a classifier is read from --weights, or trained on the labels of B."""
    file = folder / paths.CLASSIFIER
    if config.features != "classifier":
        return open_extractor(config, compute.device, file, ON_COMMAND_LINE)
    if options.weights is None:
        if real.labels is None or real.num_classes < 2:
            raise UserError(
                f"--features classifier is trained on the labels of B, and {real.name} has none: give a prepared "
                "dataset with classes or class folders, --weights results/features/classifier.safetensors, or another "
                "extractor"
            )
        write_classifier(file, real.pixels, real.labels, real.num_classes, config.classifier_epochs)
        return open_classifier(file, compute.device)
    extractor = open_classifier(options.weights, compute.device)
    try:
        with torch.inference_mode():
            extractor.embed(torch.tensor(real.pixels[:1], device=extractor.device))
    except RuntimeError:
        raise UserError(
            f"{options.weights} is a classifier of other images than {real.text}; --channels says whether grey is "
            "read as RGB"
        ) from None
    return extractor


def _cautions(a: ImageSet, b: ImageSet, protocol: Protocol, num_features: int) -> Iterator[str]:
    """The report's cautions about such numbers; and how the files were turned into images, if A and B differ in it."""
    shaping_a, shaping_b = shaping_of(a.about), shaping_of(b.about)
    if shaping_a and shaping_b and (differing := list(differences(shaping_a, shaping_b))):
        yield (
            f"A and B were made from their files in different ways ({'; '.join(differing)}): FID counts that as a "
            "difference between the images."
        )
    fewest = min(protocol.num_samples, protocol.num_real)
    for text in (extractor_caution(protocol.extractor), few_samples_caution(fewest, num_features)):
        if text:
            yield text
    yield bias_note(protocol.num_samples)
