"""Weights on disk: safetensors with a description of what they are, never pickles."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskdm.config import Params
from maskdm.errors import UserError

FORMAT = "maskdm-weights/1"
Which = Literal["raw", "ema"]


def architecture_of(params: Params, num_classes: int) -> dict[str, Any]:
    """What two checkpoints must share to be exchangeable."""
    return {
        **params.model.model_dump(),
        "image_size": params.dataset.image_size,
        "channels": params.dataset.channels,
        "num_classes": num_classes if params.model.class_conditional else 0,
        **params.diffusion.model_dump(),
    }


def save_weights(path: Path, states: dict[str, dict[str, Tensor]], info: dict[str, Any]) -> None:
    """Write named sets of weights, e.g. {"raw": …, "ema": …}; equal content gives equal bytes.

    Args:
        path: the file, not there yet.
        states: name of the set → name of the parameter → tensor.
        info: plain values that describe them; must hold `architecture`.

    Raises:
        OSError: the file can't be written.
    """
    tensors = {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for kind, state in states.items()
        for name, tensor in state.items()
    }
    # one metadata key: several would be written in random order
    metadata = {"maskdm": json.dumps({"format": FORMAT, **info}, sort_keys=True)}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how safetensors reports a full disk: "… (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def load_weights(path: Path, which: Which, architecture: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one set of weights.

    Args:
        path: a file of `save_weights`.
        which: `ema` or `raw`.
        architecture: what the weights must be for.

    Returns:
        the weights by parameter name, and the file's info.

    Raises:
        UserError: the file is damaged, not ours, or for another architecture.
    """
    states, info = load_all(path)
    _check_architecture(path, info["architecture"], architecture)
    if which not in states:
        raise _unreadable(path, f"it has no {which} weights")
    return states[which], info


def load_all(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read every set of weights of a file of `save_weights`, and its info.

    Raises:
        UserError: the file is damaged or not ours.
    """
    states: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            info = _info(path, file.metadata())
            for key in file.keys():  # noqa: SIM118  (no mapping)
                kind, name = key.split("/", 1)
                states.setdefault(kind, {})[name] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    return states, info


def load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put weights into a network.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights of {path} do not fit the network: {reason}") from None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _info(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        info = json.loads((metadata or {})["maskdm"])
    except (KeyError, ValueError):
        info = None
    found = info.get("format") if isinstance(info, dict) else None
    if not isinstance(info, dict) or found != FORMAT or not isinstance(info.get("architecture"), dict):
        raise UserError(
            f"{path} is a safetensors file, but not a checkpoint of this version of maskdm "
            f"(expected format {FORMAT!r}, got {found!r}), or damaged"
        )
    return info


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not a readable safetensors file ({reason}): truncated, damaged, or not a checkpoint of maskdm. "
        "Delete it and run the stage that makes it again"
    )


def _check_architecture(path: Path, got: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = [
        f"{key} is {got.get(key)!r} there and {expected.get(key)!r} in params.yaml"
        for key in sorted({*got, *expected})
        if got.get(key) != expected.get(key)
    ]
    if differing:
        raise UserError(f"{path} holds another architecture: {'; '.join(differing)}. Run the pretrain stage again")
