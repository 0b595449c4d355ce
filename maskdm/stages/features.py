"""Stage `features`: the feature extractor, and the real images' features with all that scoring needs of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description
from maskdm.config import EvaluationConfig, Params, paths
from maskdm.data.real_images import open_dataset
from maskdm.data.stored_images import StoredImages
from maskdm.scoring import references
from maskdm.scoring.extractors import FeatureExtractor, open_classifier, open_fixed, write_classifier
from maskdm.scoring.protocol import images_of
from maskdm.scoring.scores import FEWEST_REAL, Reference, check_counts
from maskdm.stages.runner import Task
from maskdm.training import devices


def run(task: Task, folder: Path) -> None:
    """Write extractor, features and statistics of the dataset.

    Raises:
        UserError: no labels for a classifier, no weights for a pretrained extractor, or too few images.
    """
    params = task.params
    compute, dataset = devices.resolve(params.compute), open_dataset(params, verify=True)
    real = dataset.reference(params.evaluation.reference)
    check_counts(params.sampling.num_samples, len(real), params.evaluation)
    if len(real) < FEWEST_REAL:
        raise UserError(f"{len(real)} real images are fewer than the scale of the metrics needs: {FEWEST_REAL}")
    accuracy = None
    if params.evaluation.features == "classifier":
        accuracy = _train_classifier(params, dataset.all, folder / paths.CLASSIFIER)
    extractor = open_extractor(params, folder, compute)
    info = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "weights_sha256": extractor.weights_sha256,
        "num_features": _write_reference(params.evaluation, extractor, real, folder),
        "num_real": len(real),
        "real_sha256": real.sha256,
        "images": images_of(dataset.train.manifest),
        "classifier_accuracy": accuracy,
        "reference_sha256": file_sha256(folder / paths.REAL_FEATURES),
        **dataset.hashes,
    }
    publish_description(folder / paths.FEATURES_INFO, info)
    task.record.update(info, threads=compute.threads)
    task.tracked.tags(extractor=info["extractor"], extractor_sha256=info["extractor_sha256"])
    task.tracked.log(0, **{k: v for k, v in info.items() if isinstance(v, float)})


def _write_reference(config: EvaluationConfig, extractor: FeatureExtractor, real: StoredImages, folder: Path) -> int:
    """Write the features of the real images and their statistics; D.

    Those of a pretrained extractor are kept for other experiments, and taken from there.
    """
    is_costly = config.features not in ("classifier", "pixels")
    key = references.key_of(real.sha256, extractor, config.batch_size, config.prc_neighborhood)
    if not (is_costly and references.bring_back(key, folder)):
        features = extractor.write_features(folder / paths.REAL_FEATURES, real, config.batch_size, "real features")
        features.flush()  # type: ignore[attr-defined]  # a memory map
        reference = Reference.of(features, config.prc_neighborhood)
        references.save_statistics(folder, reference, file_sha256(folder / paths.REAL_FEATURES))
        if is_costly:
            references.keep(key, folder)
    written: np.ndarray = np.lib.format.open_memmap(folder / paths.REAL_FEATURES, mode="r")
    return int(written.shape[1])


def open_extractor(params: Params, folder: Path, compute: devices.Compute) -> FeatureExtractor:
    """The extractor that params name; the classifier is read from `folder`.

    Raises:
        UserError: its weights can't be had.
    """
    if params.evaluation.features == "classifier":
        return open_classifier(folder / paths.CLASSIFIER, compute.device)
    return open_fixed(params.evaluation, compute.device)


def _train_classifier(params: Params, images: StoredImages, path: Path) -> float:
    if images.labels is None or images.num_classes < 2:
        raise UserError(
            "evaluation.features: classifier needs a dataset with labels of at least two classes, and this one has "
            "none: sort the images into class folders, or name a torch-fidelity extractor, e.g. inception-v3-compat"
        )
    return write_classifier(path, images, images.labels, images.num_classes, params.evaluation.classifier_epochs)
