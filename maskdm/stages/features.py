"""Stage `features`: the feature extractor and the real images' features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskdm import device, paths
from maskdm.checksums import file_sha256
from maskdm.config import EvaluationConfig, Params
from maskdm.data.arrays import ImageArrays
from maskdm.errors import UserError
from maskdm.evaluation import check_counts
from maskdm.extractors import FeatureExtractor, open_classifier, open_pretrained, save_classifier
from maskdm.publishing import publish_description, publish_folder
from maskdm.stages.inputs import open_data
from maskdm.stages.session import stage_session

CLASSIFIER_FILE = "classifier.safetensors"
REFERENCE_FILE = "reference.npy"
INFO_FILE = "features.json"


def run(params: Params) -> None:
    """Compute the reference features of the dataset into results/features.

    Raises:
        UserError: no labels for a classifier, no weights for a pretrained extractor, or too few images.
    """
    compute = device.resolve(params.compute)
    images = open_data(params, verify=True)
    check_counts(params.sampling.num_samples, len(images), params.evaluation)
    inputs = {
        "evaluation": params.evaluation,
        "compute": params.compute,
        "weights_sha256": _weights_sha256(params.evaluation),
        "data_sha256": images.sha256,
    }
    with stage_session(params, "features", inputs=inputs, output=paths.FEATURES) as session:
        if session.is_to_do:
            info = _compute(params, images, compute)
            session.record.update(info)
            session.tracked.tags(extractor=info["extractor"], extractor_sha256=info["extractor_sha256"])
            session.tracked.log(0, **{k: v for k, v in info.items() if isinstance(v, float)})


def _compute(params: Params, images: ImageArrays, compute: device.Compute) -> dict[str, Any]:
    """Publish extractor and features; what they are."""
    with publish_folder(paths.FEATURES) as folder:
        accuracy = None
        if params.evaluation.features == "classifier":
            accuracy = _train_classifier(params, images, folder / CLASSIFIER_FILE)
        extractor = open_extractor(params, folder, compute)
        real = extractor.features(images.all(), params.evaluation.batch_size, "real features")
        np.save(folder / REFERENCE_FILE, real)
        info = {
            **_describe(extractor, real, accuracy),
            "reference_sha256": file_sha256(folder / REFERENCE_FILE),
            "data_sha256": images.sha256,
        }
        publish_description(folder / INFO_FILE, info)
    return info


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
    return open_pretrained(params.evaluation, compute.device)


def _train_classifier(params: Params, images: ImageArrays, path: Path) -> float:
    if images.labels is None or images.num_classes < 2:
        raise UserError(
            "evaluation.features: classifier needs a dataset with labels of at least two classes, and this one has "
            "none: sort the images into class folders, or name a torch-fidelity extractor, e.g. inception-v3-compat"
        )
    from maskdm.classifier import train_classifier

    epochs = params.evaluation.classifier_epochs
    trained = train_classifier(images.all(), images.labels, images.num_classes, epochs)
    save_classifier(path, trained)
    return trained.accuracy


def _describe(
    extractor: FeatureExtractor, real: np.ndarray, accuracy: float | None
) -> dict[str, str | int | float | None]:
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "num_features": real.shape[1],
        "num_real": len(real),
        "classifier_accuracy": accuracy,
    }
