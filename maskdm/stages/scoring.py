"""Scoring images against the dataset, with the extractor and the real features that the stage `features` made."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskdm import paths
from maskdm.config import Params
from maskdm.device import Compute
from maskdm.errors import UserError
from maskdm.evaluation import Metrics, check_counts, compute_metrics
from maskdm.extractors import FeatureExtractor
from maskdm.stages import features
from maskdm.stages.inputs import read_array, read_json, require


class Scorer:
    """Scores images against all real ones; features of two extractors or datasets never meet.

    Args:
        params: the experiment.
        compute: where the extractor runs.
        data_sha256: of results/data.

    Attributes:
        real: features of the real images, (M, D).
        reference_sha256: of their file.
        origin: what every score is to be published with: data and extractor.

    Raises:
        UserError: results/features is missing, of other data or of another extractor, or too few samples are asked for.
    """

    def __init__(self, params: Params, compute: Compute, data_sha256: str) -> None:
        folder = require(paths.FEATURES, "features")
        info = read_json(folder / features.INFO_FILE, "features")
        if info["data_sha256"] != data_sha256:
            raise UserError("results/features was made from other data than results/data; run first: maskdm features")
        self._config = params.evaluation
        self._extractor = _open_same_extractor(params, compute, info)
        self.reference_sha256 = info["reference_sha256"]
        self.real = read_array(folder / features.REFERENCE_FILE, "features", self.reference_sha256)
        self.origin = {"data_sha256": data_sha256, **{key: info[key] for key in ("extractor", "extractor_sha256")}}
        check_counts(params.sampling.num_samples, len(self.real), params.evaluation)

    def score(self, images: np.ndarray, title: str) -> Metrics:
        """Score uint8 images (N, H, W, C).

        Args:
            images: the samples.
            title: for the progress display.
        """
        return compute_metrics(
            self._extractor.features(images, self._config.batch_size, title), self.real, self._config
        )


def _open_same_extractor(params: Params, compute: Compute, info: dict[str, Any]) -> FeatureExtractor:
    """The extractor that made the reference."""
    wanted: str = params.evaluation.features
    if info["extractor"].split("/")[0] == wanted:
        extractor = features.open_extractor(params, paths.FEATURES, compute)
        if extractor.sha256 == info["extractor_sha256"]:
            return extractor
        wanted = f"{extractor.name} ({extractor.sha256[:12]})"
    raise UserError(
        f"results/features was made with {info['extractor']} ({info['extractor_sha256'][:12]}), but params.yaml "
        f"names {wanted}; run first: maskdm features"
    )
