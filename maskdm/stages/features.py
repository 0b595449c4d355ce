"""Stage `features`: the feature extractor, and the real images' features with all that scoring needs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskdm import device, paths, references
from maskdm.checksums import file_sha256
from maskdm.config import EvaluationConfig, Params
from maskdm.errors import UserError
from maskdm.evaluation import FEWEST_REAL, Reference, check_counts
from maskdm.extractors import FeatureExtractor, open_classifier, open_fixed, write_classifier
from maskdm.protocol import images_of
from maskdm.publishing import publish_description, publish_folder
from maskdm.stages.real_images import Dataset, open_dataset
from maskdm.stages.session import stage_session
from maskdm.stored_images import StoredImages

CLASSIFIER_FILE = "classifier.safetensors"
REFERENCE_FILE = references.FEATURES
INFO_FILE = "features.json"


def run(params: Params) -> None:
    """Compute the reference features of the dataset into results/features.

    Raises:
        UserError: no labels for a classifier, no weights for a pretrained extractor, or too few images.
    """
    compute = device.resolve(params.compute)
    dataset = open_dataset(params, verify=True)
    num_real = len(dataset.reference(params.evaluation.reference))
    check_counts(params.sampling.num_samples, num_real, params.evaluation)
    if num_real < FEWEST_REAL:
        raise UserError(f"{num_real} real images are fewer than the scale of the metrics needs: {FEWEST_REAL}")
    inputs = {
        "evaluation": params.evaluation,
        "compute": params.compute,
        "weights_sha256": _weights_sha256(params.evaluation),
        **dataset.hashes,
    }
    with stage_session(params, "features", inputs=inputs, output=paths.FEATURES) as session:
        if session.is_to_do:
            info = _compute(params, dataset, compute)
            session.record.update(info)
            session.tracked.tags(extractor=info["extractor"], extractor_sha256=info["extractor_sha256"])
            session.tracked.log(0, **{k: v for k, v in info.items() if isinstance(v, float)})


def _compute(params: Params, dataset: Dataset, compute: device.Compute) -> dict[str, Any]:
    """Publish extractor, features and statistics; what they are."""
    real = dataset.reference(params.evaluation.reference)
    with publish_folder(paths.FEATURES) as folder:
        accuracy = None
        if params.evaluation.features == "classifier":
            accuracy = _train_classifier(params, dataset.all, folder / CLASSIFIER_FILE)
        extractor = open_extractor(params, folder, compute)
        num_features = _write_reference(params.evaluation, extractor, real, folder)
        info = {
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "weights_sha256": extractor.weights_sha256,
            "num_features": num_features,
            "num_real": len(real),
            "real_sha256": real.sha256,
            "images": images_of(dataset.train.manifest),
            "classifier_accuracy": accuracy,
            "reference_sha256": file_sha256(folder / REFERENCE_FILE),
            **dataset.hashes,
        }
        publish_description(folder / INFO_FILE, info)
    return info


def _write_reference(config: EvaluationConfig, extractor: FeatureExtractor, real: StoredImages, folder: Path) -> int:
    """Write the features of the real images and their statistics; D.

    Those of a pretrained extractor are kept for other experiments, and taken from there.
    """
    is_costly = config.features not in ("classifier", "pixels")
    key = references.key_of(real.sha256, extractor, config.batch_size, config.prc_neighborhood)
    if not (is_costly and references.bring_back(key, folder)):
        features = extractor.write_features(folder / REFERENCE_FILE, real, config.batch_size, "real features")
        features.flush()  # type: ignore[attr-defined]  # a memory map
        reference = Reference.of(features, config.prc_neighborhood)
        references.save_statistics(folder, reference, file_sha256(folder / REFERENCE_FILE))
        if is_costly:
            references.keep(key, folder)
    written: np.ndarray = np.lib.format.open_memmap(folder / REFERENCE_FILE, mode="r")
    return int(written.shape[1])


def _weights_sha256(evaluation: EvaluationConfig) -> str | None:
    """Of the user's weights file, which may change under its name."""
    weights = Path(evaluation.weights) if evaluation.weights else None
    return file_sha256(weights) if weights is not None and weights.is_file() else None


def open_extractor(params: Params, folder: Path, compute: device.Compute) -> FeatureExtractor:
    """The extractor that params name; the classifier is read from `folder`.

    Raises:
        UserError: its weights can't be had.
    """
    if params.evaluation.features == "classifier":
        return open_classifier(folder / CLASSIFIER_FILE, compute.device)
    return open_fixed(params.evaluation, compute.device)


def _train_classifier(params: Params, images: StoredImages, path: Path) -> float:
    if images.labels is None or images.num_classes < 2:
        raise UserError(
            "evaluation.features: classifier needs a dataset with labels of at least two classes, and this one has "
            "none: sort the images into class folders, or name a torch-fidelity extractor, e.g. inception-v3-compat"
        )
    return write_classifier(path, images, images.labels, images.num_classes, params.evaluation.classifier_epochs)
