"""Stage `features`: the feature extractor, and the features of the real images with their statistics."""

from __future__ import annotations

from pathlib import Path

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description
from maskdm.config import Params, paths
from maskdm.config.image_counts import MIN_REAL
from maskdm.data.arrays import StoredImages
from maskdm.data.inputs import open_dataset
from maskdm.scoring.classifier import write_classifier
from maskdm.scoring.extractors import open_extractor
from maskdm.scoring.protocol import images_of
from maskdm.scoring.references import make_reference
from maskdm.scoring.scores import check_counts
from maskdm.stages.runner import Task
from maskdm.training import devices


def run(task: Task, folder: Path) -> None:
    """Write a trained classifier if one is asked for, and the features and statistics of the real images.

    Raises:
        UserError: there are no labels for a classifier, no weights for a pretrained extractor, or too few images.
    """
    params, config = task.params, task.params.evaluation
    compute, dataset = devices.resolve(params.compute), open_dataset(params, verify=True)
    real = dataset.reference(config.reference)
    check_counts(params.sampling.num_samples, len(real), config)
    if len(real) < MIN_REAL:
        raise UserError(f"{len(real)} real images are too few: the scale of the metrics needs {MIN_REAL}")
    classifier = folder / paths.CLASSIFIER
    accuracy = _train_classifier(params, dataset.all, classifier) if config.features == "classifier" else None
    extractor = open_extractor(config, compute.device, classifier)
    reference = make_reference(folder, real, real.sha256, extractor, config)
    info = {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "weights_sha256": extractor.weights_sha256,
        "num_features": reference.features.shape[1],
        "num_real": len(real),
        "real_sha256": real.sha256,
        "images": images_of(dataset.train.manifest),
        "classifier_accuracy": accuracy,
        "reference_sha256": file_sha256(folder / paths.REAL_FEATURES),
        **dataset.hashes,
    }
    publish_description(folder / paths.FEATURES_INFO, info)
    task.record.update(info, threads=compute.threads)


def _train_classifier(params: Params, images: StoredImages, path: Path) -> float:
    if images.labels is None or images.num_classes < 2:
        raise UserError(
            "evaluation.features: classifier needs a dataset with labels of at least two classes, and this one has "
            "none: sort the images into class folders, or name a torch-fidelity extractor, e.g. inception-v3-compat"
        )
    return write_classifier(path, images, images.labels, images.num_classes, params.evaluation.classifier_epochs)
