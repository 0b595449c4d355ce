"""Feature extractors for scoring: the dataset's own classifier, pixel values, or one of torch-fidelity's by name.

torch-fidelity and torchvision are imported where one of theirs is opened and nowhere else: that takes 1.5 s.
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

# What torch-fidelity downloads for the extractors whose weights may also be a local file of plain tensors.
PUBLISHED = {"inception-v3-compat": "weights-inception-2015-12-05-6726825d.pth", "vgg16": "vgg16-397923af.pth"}
# What is wrong, as torch.load says it between pieces of advice to execute the file all the same.
REASON = re.compile(r"(Unsupported|Trying|Detected)[^\n]*?(?= was not an allowed|\. The |\.?\n|$)")


class Knobs(NamedTuple):
    """How messages call the user's knobs.

    Attributes:
        features: what stands before an extractor's name.
        weights: the local file.
    """

    features: str = "evaluation.features: "
    weights: str = "evaluation.weights"


IN_PARAMS = Knobs()


@dataclass(frozen=True)
class FeatureExtractor:
    """Turns images into features.

    Attributes:
        name: as in `evaluation.features`, with its layer where it has several.
        sha256: of its weights: numbers are comparable only for equal hashes.
        embed: uint8 (B, H, W, C) on the device → float features (B, D).
        device: where it computes.
        weights_sha256: of the user's file that its weights came from, if they did.
    """

    name: str
    sha256: str
    embed: Callable[[Tensor], Tensor]
    device: torch.device
    weights_sha256: str | None = None

    def features(
        self, images: Pixels, batch_size: int, description: str = "features", path: Path | None = None
    ) -> np.ndarray:
        """Features of images, batch by batch.

        Args:
            images: uint8 (N, H, W, C), N ≥ 1.
            batch_size: of what is computed at once.
            description: for the progress display.
            path: a .npy file to write them to as they come: they need not fit into memory.

        Returns:
            float32 (N, D), memory-mapped where they are written.

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
    """The extractor that the config names.

    Args:
        config: names it.
        device: where it computes.
        classifier: the file of the dataset's own, should that be it.
        knobs: what the user calls what the config says.

    Raises:
        UserError: its weights can't be had, are damaged, or hold more than plain tensors.
    """
    if config.features == "classifier":
        return open_classifier(classifier, device)
    return open_pixels(device) if config.features == "pixels" else open_pretrained(config, device, knobs)


def open_pixels(device: torch.device) -> FeatureExtractor:
    """Pixel values in [−1, 1] as features, in the order (row, column, channel): nothing is trained or loaded."""
    digest = hashlib.sha256(b"pixels: uint8 / 127.5 - 1, flattened as (row, column, channel)").hexdigest()
    return FeatureExtractor("pixels", digest, lambda x: to_model_range(x).permute(0, 2, 3, 1).flatten(1), device)


def open_classifier(path: Path, device: torch.device) -> FeatureExtractor:
    """The extractor of a file of `write_classifier`.

    Raises:
        UserError: the file is damaged or not ours.
    """
    model = load_classifier(path).to(device)
    return FeatureExtractor("classifier", file_sha256(path), lambda x: model.embed(to_model_range(x)), device)


def open_pretrained(config: EvaluationConfig, device: torch.device, knobs: Knobs = IN_PARAMS) -> FeatureExtractor:
    """One of torch-fidelity's extractors, with its own weights (downloaded once) or a local file.

    Args:
        config: names it.
        device: where it computes.
        knobs: what the user calls what the config says.

    Raises:
        UserError: the weights can't be had, or hold more than plain tensors.
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
        if name.startswith("dinov2"):  # torch-fidelity reads it from torch.hub's folder alone
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
    """Refuse a file that is not what the extractor reads: torch-fidelity would execute what is pickled in it."""
    if not path.is_file():
        raise UserError(f"{knobs.weights}: there is no file {path}{_expected(name, knobs)}")
    if name.startswith("clip"):  # a program (TorchScript): only the very file that was published is opened
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
    """What a local file should have been."""
    if name not in PUBLISHED:
        return ""
    file = PUBLISHED[name]
    return f"; expected the file that torch-fidelity downloads, {file}: give that, or no {knobs.weights} to download it"


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
    """The content of a file of `torch.save`: tensors on the CPU, plain values and containers of them.

    Nothing in the file is executed. Tensors are mapped into memory where its layout allows that. One may claim more
    elements than the file holds (a stride of 0): look at sizes before copying.

    Args:
        path: a regular file; a pipe would be waited for.

    Raises:
        ValueError: it is damaged, or holds more than plain tensors; the reason in one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Detected pickle protocol")  # a better reason than the error after it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged file raises may be almost anything
        text = str(error) or "it is empty or cut off"
        reason = shorten(found.group() if (found := REASON.search(text)) else text, 200, placeholder=" …")
        raise ValueError(f"{printable(reason)} (only plain tensors are accepted)") from None
