"""torch-fidelity from outside: a file of Inception's weights, random ones, and its `fidelity` command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from maskdm.base.torchvision_compat import declare_missing_operators

# What the installed command `fidelity` runs; beside a PyTorch without torchvision's operators they are declared first.
FIDELITY = """
from maskdm.base.torchvision_compat import declare_missing_operators
operators = declare_missing_operators()
from torch_fidelity.fidelity import main
main()
"""


def write_inception_weights(path: Path) -> None:
    """Write random weights of torch-fidelity's Inception, in the form of its own download.

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


def fidelity(*words: str) -> dict[str, float]:
    """The scores that `fidelity` prints."""
    command = [sys.executable, "-c", FIDELITY, *words, "--json", "--silent", "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores: dict[str, float] = json.loads(done.stdout)
    return scores
