"""Tensors on disk: safetensors files with a description and a checksum, never pickles."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskdm.base.checksums import NOT_NOW
from maskdm.base.errors import UserError

FORMAT = "maskdm-tensors/2"
Sets = dict[str, dict[str, Tensor]]


class DamagedError(UserError):
    """A file of tensors is damaged, or was not written by `save_tensors`."""


def save_tensors(path: Path, sets: Sets, info: dict[str, Any]) -> None:
    """Write named sets of tensors, such as {"raw": …, "ema": …}; equal content gives equal bytes.

    Args:
        path: the file; it does not exist yet.
        sets: name of the set → name of the tensor → tensor.
        info: plain values that describe the tensors; for weights, they include `architecture`.

    Raises:
        OSError: the file can't be written.
    """
    tensors = {
        f"{kind}/{name}": tensor.detach().cpu().contiguous()
        for kind, named in sets.items()
        for name, tensor in named.items()
    }
    plain = json.loads(json.dumps({"format": FORMAT, **info}))
    # only one metadata key, because safetensors writes several in random order
    metadata = {"maskdm": json.dumps({**plain, "sha256": _digest(tensors, plain)}, sort_keys=True)}
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # safetensors reports a full disk as "… (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def load_weights(path: Path, which: str, architecture: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one set of weights.

    Args:
        path: a file of `save_tensors`.
        which: `ema` or `raw`.
        architecture: the architecture of the network that needs the weights.

    Returns:
        the weights by parameter name, and the file's info.

    Raises:
        UserError: the file is damaged, was not written by maskdm, or has another architecture.
    """
    sets, info = load_tensors(path)
    if "architecture" not in info:
        raise _unreadable(path, "it does not say which architecture its weights have")
    differing = [  # a file need not contain every value: initial weights fit every diffusion
        f"{key} is {value!r} there and {architecture.get(key)!r} in params.yaml"
        for key, value in sorted(info["architecture"].items())
        if value != architecture.get(key)
    ]
    if differing:
        raise UserError(f"{path} holds another architecture: {'; '.join(differing)}. Run its stage again with --force")
    if which not in sets:
        raise _unreadable(path, f"it has no {which} weights")
    return sets[which], info


def load_tensors(path: Path) -> tuple[Sets, dict[str, Any]]:
    """Read and verify all sets of tensors of a file of `save_tensors`, and its info.

    Raises:
        DamagedError: the file is damaged or was not written by maskdm.
        UserError: it can't be read at the moment.
    """
    try:
        path.open("rb").close()  # safetensors reports a file without read permission as missing
        with safe_open(path, framework="pt") as file:
            info = _info(path, file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
            if _digest(tensors, info) != info.pop("sha256", None):
                raise ValueError("its content is not what was written: the checksum differs")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NOT_NOW:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        raise _unreadable(path, str(error)) from None
    sets: Sets = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        sets.setdefault(kind, {})[name] = tensor
    return sets, info


def load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load weights into a network.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights of {path} do not fit the network: {reason}") from None


def _digest(tensors: dict[str, Tensor], info: dict[str, Any]) -> str:
    """The sha256 of the info and of the name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps({**info, "sha256": None}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _info(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        info = json.loads((metadata or {})["maskdm"])
    except (KeyError, ValueError, RecursionError):
        info = None
    found = info.get("format") if isinstance(info, dict) else None
    if not isinstance(info, dict) or found != FORMAT:
        reason = f"expected format {FORMAT!r}, got {found!r}"
        raise DamagedError(
            f"{path} is a safetensors file, but not a checkpoint of this version of maskdm ({reason}), or damaged",
            reason,
        )
    return info


def _unreadable(path: Path, reason: str) -> DamagedError:
    return DamagedError(
        f"{path} is not a readable safetensors file ({reason}): truncated, damaged, or not a checkpoint of maskdm. "
        "Delete it and run the stage that makes it again",
        reason,
    )
