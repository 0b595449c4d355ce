"""What `maskdm fid` does: the scores of A against B, with what they are of and what they are not."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_json
from maskdm.config import ComputeConfig, EvaluationConfig, paths
from maskdm.report.numbers import number_text
from maskdm.report.prose import bias_note, extractor_caution, few_samples_caution
from maskdm.scoring import references
from maskdm.scoring.extractors import FeatureExtractor, Knobs, open_classifier, open_fixed, write_classifier
from maskdm.scoring.protocol import Protocol, differences, metrics_as, shaping_of
from maskdm.scoring.scores import Metrics, Reference, compute_metrics
from maskdm.stages.score.sets import ImageSet, Wanted, open_pair
from maskdm.training import devices

ON_COMMAND_LINE = Knobs("--features ", "--weights")


def run(options: argparse.Namespace) -> None:
    """Score, print, and write the JSON file if asked.

    Args:
        options: of `options.add_fid`.

    Raises:
        UserError: A or B can't be opened, they don't fit together, are too few, or the extractor can't be had.
    """
    config = _config(options)
    wanted = wanted_of(options)
    compute = devices.resolve(wanted.machine)
    with tempfile.TemporaryDirectory() as scratch, open_pair(options.a, options.b, wanted, Path(scratch)) as (a, b):
        _check_counts(a, b, config)
        folder = Path(scratch) / "features"
        folder.mkdir()
        extractor = _extractor(options, config, b, folder, compute)
        reference = _reference(extractor, b, config, folder)
        features = extractor.features(a.pixels, config.batch_size, f"features of {a.name}")
        scores = compute_metrics(features, reference, config)
        protocol = _protocol(a, b, extractor, config)
        cautions = [*_shaping_cautions(a, b), *_cautions(protocol, features.shape[1])]
    _print(a, b, scores, protocol, cautions)
    if options.json is not None:
        content: dict[str, Any] = {"a": a.name, "b": b.name, **scores.as_dict(), "cautions": cautions}
        weights = {"a_weights_sha256": a.weights_sha256, "b_weights_sha256": b.weights_sha256}
        publish_json(options.json.absolute(), {**content, **weights, "protocol": protocol.as_dict()})


def wanted_of(options: argparse.Namespace) -> Wanted:
    """What the command line says about files, models and the machine."""
    return Wanted(
        options.image_size,
        options.channels,
        options.crop,
        options.resize_filter,
        options.num_samples,
        options.seed,
        ComputeConfig(device=options.device, precision="auto", threads=options.threads),
    )


def _config(options: argparse.Namespace) -> EvaluationConfig:
    """As `evaluation` in params.yaml; the classifier's file is no `weights` there."""
    is_trained = options.features in ("classifier", "pixels")
    if options.features == "pixels" and options.weights:
        raise UserError("--features pixels takes no --weights: it compares pixel values")
    try:
        return EvaluationConfig(
            features=options.features,
            weights=None if is_trained or options.weights is None else str(options.weights),
            batch_size=options.batch_size,
            kid_subsets=options.kid_subsets,
            kid_subset_size=options.kid_subset_size,
            prc_neighborhood=options.prc_neighborhood,
            classifier_epochs=options.classifier_epochs,
        )
    except ValueError as error:
        raise UserError(f"--weights: {str(error).splitlines()[-2].strip().removeprefix('Value error, ')}") from None


def _check_counts(a: ImageSet, b: ImageSet, config: EvaluationConfig) -> None:
    for images in (a, b):
        if len(images) < config.kid_subset_size:
            raise UserError(
                f"{images.name} has {len(images)} images, fewer than KID's subsets of {config.kid_subset_size}: give "
                "more, or a smaller --kid-subset-size"
            )
        if len(images) <= config.prc_neighborhood:
            raise UserError(
                f"{images.name} has {len(images)} images: precision and recall look at {config.prc_neighborhood} "
                "neighbours of each; give more, or a smaller --prc-neighborhood"
            )


def _extractor(
    options: argparse.Namespace, config: EvaluationConfig, real: ImageSet, folder: Path, compute: devices.Compute
) -> FeatureExtractor:
    if config.features != "classifier":
        return open_fixed(config, compute.device, ON_COMMAND_LINE)
    if options.weights is not None:
        extractor = open_classifier(options.weights, compute.device)
        _check_fits(extractor, real, options.weights)
        return extractor
    if real.labels is None or real.num_classes < 2:
        raise UserError(
            f"--features classifier is trained on the labels of B, and {real.name} has none: give a prepared dataset "
            "with classes or class folders, --weights results/features/classifier.safetensors, or another extractor"
        )
    file = folder / "classifier.safetensors"
    write_classifier(file, real.pixels, real.labels, real.num_classes, config.classifier_epochs)
    return open_classifier(file, compute.device)


def _check_fits(extractor: FeatureExtractor, real: ImageSet, path: Path) -> None:
    try:
        with torch.inference_mode():
            extractor.embed(torch.tensor(real.pixels[:1], device=extractor.device))
    except RuntimeError:
        raise UserError(
            f"{path} is a classifier of other images than {real.text}; --channels says whether grey is read as RGB"
        ) from None


def _reference(extractor: FeatureExtractor, real: ImageSet, config: EvaluationConfig, folder: Path) -> Reference:
    """B's features and their statistics; those that an experiment has kept are taken."""
    key = references.key_of(real.sha256, extractor, config.batch_size, config.prc_neighborhood)
    file = folder / paths.REAL_FEATURES
    if references.bring_back(key, folder):
        return references.open_reference(folder, config.prc_neighborhood)
    features = extractor.write_features(file, real.pixels, config.batch_size, f"features of {real.name}")
    return Reference.of(features, config.prc_neighborhood)


def _protocol(a: ImageSet, b: ImageSet, extractor: FeatureExtractor, config: EvaluationConfig) -> Protocol:
    return Protocol(
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


def _shaping_cautions(a: ImageSet, b: ImageSet) -> Iterator[str]:
    """Where both sets are known to be made of files, they must have been made alike."""
    one, other = shaping_of(a.about), shaping_of(b.about)
    if one and other and (differing := list(differences(one, other))):
        yield (
            f"A and B were made of their files in different ways ({'; '.join(differing)}): FID counts that as a "
            "difference of the images."
        )


def _cautions(protocol: Protocol, num_features: int) -> Iterator[str]:
    """What the report says of such numbers, too."""
    fewest = min(protocol.num_samples, protocol.num_real)
    for text in (extractor_caution(protocol.extractor), few_samples_caution(fewest, num_features)):
        if text:
            yield text
    yield bias_note(protocol.num_samples)


def _print(a: ImageSet, b: ImageSet, scores: Metrics, protocol: Protocol, cautions: list[str]) -> None:
    print(f"A  {a.text}\nB  {b.text}\n")
    print(f"FID        {number_text(round(scores.fid, 6) + 0.0)}")  # not −0
    print(f"KID×1000   {number_text(1000 * scores.kid)} ± {number_text(1000 * scores.kid_std)} (SD of the subsets)")
    print(f"precision  {scores.precision:.3f}\nrecall     {scores.recall:.3f}\n")
    print("\n".join([protocol.text, *(f"Caution. {text}" for text in cautions)]))
