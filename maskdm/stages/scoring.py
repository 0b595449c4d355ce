"""Scoring images against the dataset, with the extractor and the real features that the stage `features` made."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.data.inputs import read_array, read_json
from maskdm.scoring.extractors import FeatureExtractor
from maskdm.scoring.protocol import Protocol, drawn_as, metrics_as
from maskdm.scoring.references import load_statistics
from maskdm.scoring.scores import Metrics, check_counts, compute_metrics
from maskdm.stages import features
from maskdm.training.devices import Compute


class Scorer:
    """Scores images against all real ones.

    Args:
        params: the experiment.
        compute: where the extractor runs.

    Attributes:
        real: features of the real images, (M, D).
        origin: what every score is to be published with: data, extractor and protocol.

    Raises:
        UserError: results/features is damaged or of another extractor, or too few samples are asked for.
    """

    def __init__(self, params: Params, compute: Compute) -> None:
        folder, sha256 = paths.FEATURES, "reference_sha256"
        info = read_json(folder / paths.FEATURES_INFO, "features")
        self._config = params.evaluation
        self._extractor = _open_same_extractor(params, compute, info)
        self.real = read_array(folder / paths.REAL_FEATURES, "features", info[sha256])
        self._reference = load_statistics(folder, self.real, info[sha256], params.evaluation.prc_neighborhood)
        self.origin: dict[str, Any] = {
            **{key: info[key] for key in ("data_sha256", "extractor", "extractor_sha256")},
            "protocol": protocol_of(params, info).as_dict(),
        }
        check_counts(params.sampling.num_samples, len(self.real), params.evaluation)

    def score(self, images: np.ndarray, title: str) -> Metrics:
        """Score uint8 images (N, H, W, C).

        Args:
            images: the samples.
            title: for the progress display.
        """
        found = self._extractor.features(images, self._config.batch_size, title)
        return compute_metrics(found, self._reference, self._config)


def protocol_of(params: Params, info: dict[str, Any]) -> Protocol:
    """What the scores of an experiment are of.

    Args:
        params: the experiment.
        info: the content of features.json.
    """
    config, sampling = params.evaluation, params.sampling
    return Protocol(
        images=info["images"],
        shape=params.dataset.shape,
        reference=config.reference,
        num_real=info["num_real"],
        real_sha256=info["real_sha256"],
        extractor=info["extractor"],
        extractor_sha256=info["extractor_sha256"],
        weights_sha256=info["weights_sha256"],
        num_samples=sampling.num_samples,
        drawn=drawn_as(sampling),
        metrics=metrics_as(config),
    )


def _open_same_extractor(params: Params, compute: Compute, info: dict[str, Any]) -> FeatureExtractor:
    """The extractor that made the reference; weights that are downloaded may be others on another machine."""
    extractor = features.open_extractor(params, paths.FEATURES, compute)
    if extractor.sha256 != info["extractor_sha256"]:
        raise UserError(
            f"results/features was made with {info['extractor']} ({info['extractor_sha256'][:12]}), but here it is "
            f"{extractor.name} ({extractor.sha256[:12]}); run first: maskdm features --force"
        )
    return extractor
