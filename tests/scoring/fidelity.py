"""A file of random weights of torch-fidelity's Inception."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

from maskdm.base.torchvision_compat import declare_missing_operators


def write_inception_weights(path: Path) -> None:
    """Write random weights of torch-fidelity's Inception, in the format of its own download.

    Scaled so that images still differ behind a hundred layers.
    """
    declare_missing_operators()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with (
        patch.object(module, "load_state_dict_from_url", return_value={}),
        patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(model.state_dict(), path)
