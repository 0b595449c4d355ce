"""A trained network as a folder for use elsewhere: plain safetensors, a config.json and a model card.

`config.exported_config` describes the files; `maskdm export` and `maskdm import-checkpoint` write them. Nothing in such
a folder is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError, printable
from maskdm.base.publishing import publish_folder
from maskdm.base.tensors import Sets
from maskdm.config import Params, parse_params
from maskdm.config.exported_config import CARD, CONFIG, FORMAT, SECOND, WEIGHTS, Config, check_fits, read_config
from maskdm.config.paths import WeightSet
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import UViT

NAMES = {WEIGHTS, CONFIG, CARD, *SECOND.values()}


def check_replaceable(output: Path) -> None:
    """Check whether an exported network may be written to this place.

    Raises:
        UserError: something else is there; it is kept.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output} is there already, and is not a folder; name another one with --out")
    names = {path.name for path in output.iterdir()}
    try:
        is_ours = names <= NAMES and json.loads((output / CONFIG).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        is_ours = False
    if names and not is_ours:
        raise UserError(
            f"{output} is there already, and holds other files than an exported model; name another folder with --out, "
            "or empty this one"
        )


def publish_exported(
    output: Path, params: Params, num_classes: int, sets: Sets, which: WeightSet, source: Mapping[str, Any], card: str
) -> None:
    """Write an exported folder; it appears whole or not at all.

    Args:
        output: the folder; it is replaced if `check_replaceable` allows it.
        params: the params that describe the network and how images are drawn from it.
        num_classes: number of classes of the dataset; ignored unless the network is class-conditional.
        sets: raw weights, averaged weights, or both, by the names of `UViT.named_parameters`.
        which: the set that becomes model.safetensors.
        source: plain values about the origin, for config.json.
        card: the text of the model card.

    Raises:
        ParamsError: the params are not valid on their own; nothing is written.
        UserError: the place can't be written.
    """
    check_replaceable(output)
    content = params.model_dump(mode="json", exclude_unset=True)
    parse_params(content, source=f"the params for {output / CONFIG}")
    with publish_folder(output.absolute()) as folder:
        weights = {}
        for kind in sets:
            file = folder / (WEIGHTS if kind == which else SECOND[kind])  # type: ignore[index]
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sets[kind].items()}
            file.write_bytes(save(tensors, {"format": "pt"}))
            weights[kind] = {"file": file.name, "sha256": file_sha256(file)}
        config = {
            "format": FORMAT,
            "params": content,
            "num_classes": num_classes,
            "which": which,
            "weights": weights,
            "source": dict(source),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")


def load_network(folder: Path, which: WeightSet | None = None) -> tuple[UViT, Params, Config]:
    """Load the network of an exported folder on the CPU, with its params and its config.json.

    Args:
        folder: a folder of `maskdm export` or `maskdm import-checkpoint`.
        which: the set of weights; None takes the one in model.safetensors.

    Raises:
        UserError: it is not such a folder, it is damaged, or its weights do not fit its params.
    """
    config, params = read_config(folder)
    with torch.device("meta"):
        model = build_model(params, config.num_classes)
    path, sha256 = config.weights_file(folder, which)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if file_sha256(path) != sha256:
            raise ValueError("it is not the file that config.json describes: its sha256 differs")
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
        if reason := misfit(model, weights):
            raise ValueError(f"it is of another network than config.json says: {reason}")
    except (SafetensorError, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path} can't be used ({reason}); export or import the model again") from None
    model.load_state_dict(weights, assign=True)
    return model.eval(), params, config


def weights_for(folder: Path, params: Params, num_classes: int) -> dict[str, Tensor]:
    """The weights in model.safetensors, by parameter name, for training in another experiment.

    Args:
        folder: a folder of `maskdm export` or `maskdm import-checkpoint`.
        params: the other experiment.
        num_classes: number of classes of its dataset.

    Raises:
        UserError: it is not such a folder, it is damaged, or it has another network or diffusion.
    """
    check_fits(folder, params, num_classes)
    return load_network(folder)[0].state_dict()


def misfit(model: UViT, tensors: Mapping[str, Tensor], shown: Callable[[str], str] = str) -> str:
    """The first difference between tensors and the parameters of a network, in words; empty if there is none.

    Args:
        model: the network; it may be on the meta device.
        tensors: by the names of `UViT.named_parameters`.
        shown: turns such a name into the name in the file, for the message.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [f"{shown(name)} is missing" for name in expected if name not in tensors]
    wrong += [f"{printable(shown(name))} is not part of this network" for name in tensors if name not in expected]
    wrong += [
        f"{shown(name)} is {times(tensors[name].shape)}: expected {times(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}" if wrong else ""


def times(shape: tuple[int, ...]) -> str:
    """A shape for people: `16×64`."""
    return "×".join(map(str, shape)) or "a single number"
