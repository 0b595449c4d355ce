"""Feature extractors for scoring: the dataset's own classifier, or one of torch-fidelity's by name."""

from __future__ import annotations

import hashlib
import pickletools
import re
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskdm.checkpoint import load_into, load_tensors, save_tensors
from maskdm.checksums import file_sha256
from maskdm.classifier import Classifier, TrainedClassifier
from maskdm.config import EvaluationConfig
from maskdm.data.batches import to_model_range
from maskdm.device import explain_out_of_memory
from maskdm.errors import UserError
from maskdm.printable import printable
from maskdm.progress import Progress

# What the pickles of weights call for, each by its name.
PLAIN_NAMES = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)


@dataclass(frozen=True)
class FeatureExtractor:
    """Turns images into features.

    Attributes:
        name: as in `evaluation.features`.
        sha256: of its weights: numbers are comparable only for equal hashes.
        embed: uint8 (B, H, W, C) on the device → float features (B, D).
        device: where it computes.
    """

    name: str
    sha256: str
    embed: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.inference_mode()
    def features(self, images: np.ndarray, batch_size: int, description: str = "features") -> np.ndarray:
        """Features of images, uint8 (N, H, W, C) → float32 (N, D)."""
        parts, bar = [], Progress(len(images), description, "images")
        advice = f"{description}: batches of {batch_size} images did not fit; lower evaluation.batch_size"
        with explain_out_of_memory(advice):
            for start in range(0, len(images), batch_size):
                # a copy: memory maps are read-only
                batch = torch.tensor(images[start : start + batch_size], device=self.device)
                parts.append(self.embed(batch).float().cpu().numpy())
                bar.update(len(batch))
        bar.close()
        return np.concatenate(parts)


def save_classifier(path: Path, trained: TrainedClassifier) -> None:
    """Write a classifier with its held-out accuracy."""
    model = trained.model
    shape = {"channels": model.convolutions[0].in_channels, "num_classes": model.head.out_features}
    save_tensors(path, {"classifier": model.state_dict()}, {"architecture": shape, "accuracy": trained.accuracy})


def open_classifier(path: Path, device: torch.device) -> FeatureExtractor:
    """The extractor of a file of `save_classifier`.

    Raises:
        UserError: the file is damaged or not ours.
    """
    states, info = load_tensors(path)
    if "classifier" not in states or info.get("architecture") != _sizes_of(states["classifier"]):
        raise UserError(f"{path} holds no classifier; run first: maskdm features")
    model = Classifier(**info["architecture"])
    load_into(model, states["classifier"], path)
    model.eval().to(device)
    return FeatureExtractor("classifier", file_sha256(path), lambda x: model.embed(to_model_range(x)), device)


def _sizes_of(state: dict[str, Tensor]) -> dict[str, int] | None:
    """What a classifier of these weights is built from; None of others."""
    first, head = state.get("convolutions.0.weight"), state.get("head.weight")
    if first is None or head is None or first.ndim != 4 or head.ndim != 2:
        return None
    return {"channels": first.shape[1], "num_classes": head.shape[0]}


def open_pretrained(config: EvaluationConfig, device: torch.device) -> FeatureExtractor:
    """One of torch-fidelity's extractors, with its own weights (downloaded once) or a local file.

    Raises:
        UserError: the weights can't be had, or hold more than plain tensors.
    """
    weights = None if config.weights is None else Path(config.weights)
    if weights is not None:
        _check_weights_are_plain(weights)
    model, layer = _create(config.features, weights)
    model.to(device)

    def embed(images: Tensor) -> Tensor:
        rgb = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # grey becomes RGB
        return model(rgb)[0].flatten(1)

    return FeatureExtractor(f"{config.features}/{layer}", _state_sha256(model), embed, device)


def _create(name: str, weights: Path | None) -> tuple[nn.Module, str]:
    from maskdm.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    extractor = FEATURE_EXTRACTORS_REGISTRY[name]
    layer = extractor.get_default_feature_layer_for_metric("fid")
    path = None if weights is None else str(weights)
    try:
        return extractor(name, [layer], feature_extractor_weights_path=path), layer
    except OSError as error:
        raise UserError(
            f"the weights of {name} can't be downloaded ({error}); give a local file in evaluation.weights, "
            "or use evaluation.features: classifier"
        ) from None
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} does not hold the weights of {name}: {' '.join(str(error).split())[:300]}") from None


def _check_weights_are_plain(path: Path) -> None:
    """Refuse a file that would execute code, or fill the memory, when torch-fidelity unpickles it."""
    if not path.is_file():
        raise UserError(f"evaluation.weights: there is no file {path}")
    try:
        _check_names(path)
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises may be almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"evaluation.weights: {path} is not a plain PyTorch weights file: {printable(reason)}"
        ) from None


def _check_names(path: Path) -> None:
    """Refuse a file whose pickles call for more than tensors: `weights_only` lets some through that only take memory.

    Raises:
        ValueError: they do, or what is packed there is larger than the file.
    """
    names = set()
    with ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = archive.infolist()
            if sum(member.file_size for member in members) > path.stat().st_size:  # PyTorch compresses nothing
                raise ValueError("it is compressed")
            pickles = [archive.open(member) for member in members if member.filename.lower().endswith(".pkl")]
        else:  # before PyTorch 1.6: five pickles, then the tensors
            pickles = [stack.enter_context(path.open("rb"))] * 5
        for file in pickles:
            names |= {str(name) for code, name, _ in pickletools.genops(file) if "GLOBAL" in code.name}
    if foreign := sorted(name for name in names if not PLAIN_NAMES.fullmatch(name)):
        raise ValueError(f"it calls for {foreign[0]}")


def _state_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    state: dict[str, Any] = model.state_dict()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
