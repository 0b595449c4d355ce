"""Score images against the dataset, with the extractor and the real features from the stage `features`."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.data.inputs import read_json
from maskdm.scoring.extractors import open_extractor
from maskdm.scoring.protocol import protocol_of
from maskdm.scoring.references import open_reference
from maskdm.scoring.scores import Metrics, check_counts, compute_metrics
from maskdm.training.devices import Compute


class Scorer:
    """Scores images against the real ones.

    Args:
        params: the experiment.
        compute: the device that the extractor runs on.

    Attributes:
        real: features of the real images, (M, D).
        origin: data, extractor and protocol, to be published with every score.

    Raises:
        UserError: results/features is damaged or of another extractor, or `sampling.num_samples` is too small.
    """

    def __init__(self, params: Params, compute: Compute) -> None:
        self._config = config = params.evaluation
        info = read_json(paths.FEATURES / paths.FEATURES_INFO, "features")
        self._extractor = open_extractor(config, compute.device, paths.FEATURES / paths.CLASSIFIER)
        if self._extractor.sha256 != info["extractor_sha256"]:  # downloaded weights may differ between machines
            raise UserError(
                f"results/features was made with {info['extractor']} ({info['extractor_sha256'][:12]}), but here it is "
                f"{self._extractor.name} ({self._extractor.sha256[:12]}); run first: maskdm features --force"
            )
        self._reference = open_reference(paths.FEATURES, config.prc_neighborhood)
        self.real = self._reference.features
        check_counts(params.sampling.num_samples, len(self.real), config)
        self.origin: dict[str, Any] = {
            **{key: info[key] for key in ("data_sha256", "extractor", "extractor_sha256")},
            "protocol": protocol_of(params, info).as_dict(),
        }

    def score(self, images: np.ndarray, title: str) -> Metrics:
        """Score samples, uint8 (N, H, W, C); `title` is for the progress display."""
        features = self._extractor.features(images, self._config.batch_size, title)
        return compute_metrics(features, self._reference, self._config)
