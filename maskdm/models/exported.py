"""A trained network as a folder for use elsewhere: plain safetensors, a config.json and a model card.

`exported_config` says which file is what; `maskdm export` and `maskdm import-checkpoint` write them. A folder may come
from anybody: nothing in it is executed, and no network is built before its tensors are known to be those that its
params describe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.base.publishing import publish_folder
from maskdm.base.tensors import Sets, load_into
from maskdm.config import Params, parse_params
from maskdm.config.exported_config import CARD, CONFIG, FORMAT, NAMES, SECOND, WEIGHTS, Config, misfits, read_config
from maskdm.config.formats import WeightSet
from maskdm.method.backbones.building import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.method.backbones.uvit_shape import described_by, read_shape
from maskdm.models.drawing import draw_images
from maskdm.training import devices


class Exported(NamedTuple):
    """An exported network.

    Attributes:
        params: the experiment that it comes from, as far as it is known.
        model: with its weights, on the CPU.
        num_classes: of the dataset; counts only for a class-conditional network.
    """

    params: Params
    model: UViT
    num_classes: int

    def draw(self, num_images: int, seed: int = 0) -> np.ndarray:
        """Draw images as `params.sampling` says, on a GPU if there is one: uint8 (num_images, H, W, C).

        Image i depends on (seed, i), as in the stage `sample`.

        Raises:
            UserError: memory does not suffice.
        """
        asked = self.params.compute
        compute = devices.resolve(asked if asked.device == "cpu" else asked.model_copy(update={"device": "auto"}))
        model = self.model.to(compute.device)
        return draw_images(self.params, model, self.num_classes, seed, num_images, compute, f"seed {seed}")


def check_replaceable(output: Path) -> None:
    """Whether an exported network may be written there.

    Raises:
        UserError: there is something else, which is kept.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output} is there already, and is no folder; name another one with --out")
    names = {path.name for path in output.iterdir()}
    if names and (names - NAMES or not _is_ours(output / CONFIG)):
        raise UserError(
            f"{output} is there already, and is no exported model alone; name another folder with --out, or empty it"
        )


def publish_exported(
    output: Path, params: Params, num_classes: int, sets: Sets, which: WeightSet, source: Mapping[str, Any], card: str
) -> None:
    """Write the folder whole.

    Args:
        output: its place; what `check_replaceable` lets pass is replaced.
        params: that describe the network and how images are drawn from it.
        num_classes: of the dataset; counts only for a class-conditional network.
        sets: raw weights, averaged ones, or both, by the names of `UViT.named_parameters`.
        which: the set for model.safetensors.
        source: plain values about the origin, for config.json.
        card: the model card.

    Raises:
        ParamsError: the params are not possible on their own; nothing is written.
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


def load_exported(folder: Path | str, which: WeightSet | None = None) -> Exported:
    """The network of an exported folder, ready to draw.

    Args:
        folder: of `maskdm export` or `maskdm import-checkpoint`.
        which: the set of weights; None takes those of model.safetensors.

    Raises:
        UserError: it is no such folder, damaged, or its weights are not those that its params describe.
    """
    config = read_config(Path(folder))
    which = config.which if which is None else which
    params = parse_params(config.params, source=f"{Path(folder) / CONFIG}: params")
    weights = read_weights(Path(folder), config, params, which)
    model = build_model(params, config.num_classes)
    load_into(model, weights, Path(folder) / config.weights[which].file)
    return Exported(params, model.eval(), config.num_classes)


def weights_for(
    folder: Path, params: Params, num_classes: int, which: WeightSet | None = None
) -> tuple[dict[str, Tensor], str]:
    """The weights of an exported folder for a network of another experiment, to train it on.

    Args:
        folder: of `maskdm export` or `maskdm import-checkpoint`.
        params: of the experiment.
        num_classes: of its dataset.
        which: the set of weights; None takes those of model.safetensors.

    Returns:
        the weights by parameter name, and the sha256 of their file.

    Raises:
        UserError: it is no such folder, damaged, or of another network or diffusion.
    """
    config = read_config(folder)
    own = parse_params(config.params, source=f"{folder / CONFIG}: params")
    if differing := list(misfits(config, own, params, num_classes)):
        raise UserError(f"the model in {folder} does not fit the experiment: {'; '.join(differing)}")
    which = config.which if which is None else which
    return read_weights(folder, config, own, which), config.weights[which].sha256


def read_weights(folder: Path, config: Config, params: Params, which: WeightSet) -> dict[str, Tensor]:
    """One set of weights of an exported folder, by the names of `UViT.named_parameters`.

    Args:
        folder: it.
        config: its config.json.
        params: those of `config`.
        which: the set.

    Raises:
        UserError: it is not there, not the file that was written, or not of the network of `params`.
    """
    if which not in config.weights:
        raise UserError(f"{folder} has no {which} weights, only {', '.join(config.weights)}")
    path = folder / config.weights[which].file
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if file_sha256(path) != config.weights[which].sha256:
            raise ValueError("it is not the file that config.json describes: its sha256 differs")
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if differing := read_shape(shapes).differences(described_by(params, config.num_classes)):
                raise ValueError(f"it is of another network than config.json says: {differing[0]}")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} can't be used ({printable(reason)}); export or import the model again") from None
    return {name: tensor.float() for name, tensor in tensors.items()}


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
