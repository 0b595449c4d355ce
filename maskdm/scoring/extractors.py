"""Feature extractors for scoring: the dataset's own classifier, pixel values, or one of torch-fidelity's by name.

torch-fidelity and torchvision are imported only when one of their extractors is opened: the import takes 1.5 s.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError, printable
from maskdm.base.progress import Progress
from maskdm.base.torchvision_compat import declare_missing_operators
from maskdm.config import EvaluationConfig
from maskdm.data.batches import to_model_range
from maskdm.scoring.classifier import Pixels, load_classifier
from maskdm.training.devices import explain_out_of_memory

# The files that torch-fidelity downloads for extractors whose weights may also be a local file of plain tensors.
PUBLISHED = {"inception-v3-compat": "weights-inception-2015-12-05-6726825d.pth", "vgg16": "vgg16-397923af.pth"}
# The reason in an error of torch.load, without its advice to execute the file anyway.
REASON = re.compile(r"(Unsupported|Trying|Detected)[^\n]*?(?= was not an allowed|\. The |\.?\n|$)")


class Knobs(NamedTuple):
    """The names of the user's settings, for messages: keys of params.yaml or command-line options.

    Attributes:
        features: prefix of an extractor's name.
        weights: name of the setting for a local weights file.
    """

    features: str = "evaluation.features: "
    weights: str = "evaluation.weights"


IN_PARAMS = Knobs()


@dataclass(frozen=True)
class FeatureExtractor:
    """Computes features of images.

    Attributes:
        name: as in `evaluation.features`, followed by the layer if the network has several.
        sha256: hash of its weights; scores are comparable only if these are equal.
        embed: uint8 (B, H, W, C) on the device → float features (B, D).
        device: the device it computes on.
        weights_sha256: hash of the user's weights file; None if the weights were downloaded or trained.
    """

    name: str
    sha256: str
    embed: Callable[[Tensor], Tensor]
    device: torch.device
    weights_sha256: str | None = None

    def features(
        self, images: Pixels, batch_size: int, description: str = "features", path: Path | None = None
    ) -> np.ndarray:
        """Compute the features of images, batch by batch.

        Args:
            images: uint8 (N, H, W, C), N ≥ 1.
            batch_size: images per batch.
            description: for the progress display.
            path: a .npy file to write the features to, if they may not fit into memory.

        Returns:
            float32 (N, D), memory-mapped if `path` is given.

        Raises:
            UserError: a batch does not fit into memory.
        """
        found: np.ndarray | None = None
        bar = Progress(len(images), description, "images")
        advice = f"{description}: batches of {batch_size} images did not fit; lower evaluation.batch_size"
        for start in range(0, len(images), batch_size):
            with explain_out_of_memory(advice), torch.inference_mode():
                # a copy: memory maps are read-only
                batch = torch.tensor(images[start : start + batch_size], device=self.device)
                features = self.embed(batch).float().cpu().numpy()
            if found is None:
                shape = (len(images), features.shape[1])
                if path is None:
                    found = np.empty(shape, np.float32)
                else:
                    found = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            found[start : start + len(batch)] = features
            bar.update(len(batch))
        bar.close()
        assert found is not None, "there are images"
        if isinstance(found, np.memmap):
            found.flush()
        return found


def open_extractor(
    config: EvaluationConfig, device: torch.device, classifier: Path, knobs: Knobs = IN_PARAMS
) -> FeatureExtractor:
    """Open the extractor that `config.features` names.

    Args:
        config: the section `evaluation`.
        device: the device to compute on.
        classifier: the file of the dataset's own classifier, if the config names that.
        knobs: names of the settings, for messages.

    Raises:
        UserError: the weights are missing or damaged, or hold more than plain tensors.
    """
    if config.features == "classifier":
        return open_classifier(classifier, device)
    return open_pixels(device) if config.features == "pixels" else open_pretrained(config, device, knobs)


def open_pixels(device: torch.device) -> FeatureExtractor:
    """Use pixel values in [−1, 1] as features, in the order (row, column, channel)."""
    digest = hashlib.sha256(b"pixels: uint8 / 127.5 - 1, flattened as (row, column, channel)").hexdigest()
    return FeatureExtractor("pixels", digest, lambda x: to_model_range(x).permute(0, 2, 3, 1).flatten(1), device)


def open_classifier(path: Path, device: torch.device) -> FeatureExtractor:
    """Open a classifier that `write_classifier` wrote.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    model = load_classifier(path).to(device)
    return FeatureExtractor("classifier", file_sha256(path), lambda x: model.embed(to_model_range(x)), device)


def open_pretrained(config: EvaluationConfig, device: torch.device, knobs: Knobs = IN_PARAMS) -> FeatureExtractor:
    """Open one of torch-fidelity's extractors, with its own weights (downloaded once) or a local file.

    Args:
        config: the section `evaluation`.
        device: the device to compute on.
        knobs: names of the settings, for messages.

    Raises:
        UserError: the weights are missing, or hold more than plain tensors.
    """
    name, path = config.features, config.weights
    if path is not None:
        _check_weights(name, Path(path), knobs)
    declare_missing_operators()
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    extractor = FEATURE_EXTRACTORS_REGISTRY[name]
    layer = extractor.get_default_feature_layer_for_metric("fid")
    try:
        model = extractor(name, [layer], feature_extractor_weights_path=path)
    except (OSError, HTTPException) as error:
        offline = f"give a local file in {knobs.weights}"
        if name.startswith("dinov2"):  # torch-fidelity reads it only from torch.hub's folder
            offline = f"load it once where there is a network and copy its folder {torch.hub.get_dir()} here"
        raise UserError(
            f"the weights of {name} can't be downloaded ({_reason(error)}); {offline}, "
            f"or use {knobs.features}classifier"
        ) from None
    except (RuntimeError, KeyError, AttributeError, TypeError, EOFError, UnpicklingError) as error:
        file = f"the downloaded file in torch's hub folder {torch.hub.get_dir()}" if path is None else path
        again = "; delete it and try again" if path is None else _expected(name, knobs)
        raise UserError(f"{file} does not hold the weights of {name}: {_reason(error)}{again}") from None
    model.to(device)

    def embed(images: Tensor) -> Tensor:
        rgb = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # grey becomes RGB
        return model(rgb)[0].flatten(1)

    file_hash = None if path is None else file_sha256(Path(path))
    return FeatureExtractor(f"{name}/{layer}", _state_sha256(model), embed, device, file_hash)


def _check_weights(name: str, path: Path, knobs: Knobs) -> None:
    """Refuse a file that is not the extractor's weights: torch-fidelity would execute pickled code in it."""
    if not path.is_file():
        raise UserError(f"{knobs.weights}: there is no file {path}{_expected(name, knobs)}")
    if name.startswith("clip"):  # TorchScript, which is a program: only the published file is opened
        declare_missing_operators()
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

        expected, found = MODEL_METADATA[name]["hash"], file_sha256(path)
        if found != expected:
            raise UserError(
                f"{knobs.weights}: {path} is not the published file of {name}, {Path(MODEL_URLS[name]).name}: its "
                f"sha256 is {found}, expected {expected}"
            )
        return
    try:
        load_plain(path)
    except ValueError as error:
        raise UserError(
            f"{knobs.weights}: {path} is not a plain PyTorch weights file: {error}{_expected(name, knobs)}"
        ) from None


def _expected(name: str, knobs: Knobs) -> str:
    """The end of a message: which file was expected."""
    if name not in PUBLISHED:
        return ""
    file = PUBLISHED[name]
    return f"; expected the file that torch-fidelity downloads, {file}: use that, or no {knobs.weights} to download it"


def _reason(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _state_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    state: dict[str, Any] = model.state_dict()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_plain(path: Path) -> Any:
    """Read a file of `torch.save`: tensors on the CPU, plain values and containers of them.

    Nothing in the file is executed. Tensors are memory-mapped if the file's layout allows it. A tensor may claim more
    elements than the file holds (with a stride of 0): check sizes before copying.

    Args:
        path: a regular file (reading a pipe would block).

    Raises:
        ValueError: the file is damaged, or holds more than plain tensors; the message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Detected pickle protocol")  # a better reason than the error after it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file may raise almost anything
        text = str(error) or "it is empty or cut off"
        reason = shorten(found.group() if (found := REASON.search(text)) else text, 200, placeholder=" …")
        raise ValueError(f"{printable(reason)} (only plain tensors are accepted)") from None
