"""Models ready to draw from: an exported folder, a checkpoint in results/, or a model that was logged to MLflow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskdm.base.errors import UserError
from maskdm.base.tensors import load_tensors
from maskdm.config import PARAMS_FILE, Params, load_params, parse_params, paths
from maskdm.config.exported_config import CONFIG
from maskdm.config.paths import WeightSet
from maskdm.config.stamps import read_stamp
from maskdm.method.backbones.uvit import UViT
from maskdm.models.drawing import draw_images, load_model
from maskdm.models.exported import load_network
from maskdm.training import devices
from maskdm.training.devices import Compute

LOGGED_WEIGHTS, LOGGED_PARAMS = "weights.safetensors", "params.json"  # in `artifacts` of a logged model


@dataclass(frozen=True)
class Model:
    """A trained network and what is known of it.

    Attributes:
        params: the experiment that it comes from, as far as it is known.
        network: the network with its weights, on the device of `compute`.
        num_classes: number of classes of the dataset; ignored unless the network is class-conditional.
        compute: device and precision.
        file: the file of the weights.
        which: the set of weights.
        flip: the probability of a left-right flip in its training; None if it is not known.
    """

    params: Params
    network: UViT
    num_classes: int
    compute: Compute
    file: Path
    which: WeightSet
    flip: float | None

    def draw(self, num_images: int, seed: int = 0) -> np.ndarray:
        """Draw images as `params.sampling` says, uint8 (num_images, H, W, C).

        Image i is a function of (seed, i), as in the stage `sample`.

        Raises:
            UserError: there is not enough memory.
        """
        title = f"draw from {self.file}"
        return draw_images(self.params, self.network, self.num_classes, seed, num_images, self.compute, title)


def is_model(place: Path) -> bool:
    """Whether `open_model` would take a path for a model."""
    if place.is_dir():
        return (place / CONFIG).is_file() or _is_logged(place)
    return place.suffix == ".safetensors"


def open_model(
    place: Path | str, device: str | None = None, threads: int | None = None, which: WeightSet | None = None
) -> Model:
    """Load a model.

    Args:
        place: a folder of `maskdm export` or `maskdm import-checkpoint`, a checkpoint below the folder of its
            experiment, or the artifacts of a logged model.
        device: auto, cpu or cuda; None takes a GPU if there is one, unless the model's params say cpu.
        threads: number of CPU threads; None takes that of the model's params.
        which: the set of weights of an exported folder; None takes the one in model.safetensors. Other models are
            always loaded with averaged weights.

    Raises:
        UserError: the model is damaged, or its params cannot be found.
    """
    place = Path(place)
    if place.is_dir() and not _is_logged(place):
        return _open_exported(place, device, threads, which)
    if place.is_dir():
        file, params = place / LOGGED_WEIGHTS, _read_params(place / LOGGED_PARAMS)
        flip: float | None = params.training.flip
    else:
        file, params, flip = place, _params_of_checkpoint(place), _flip_of_checkpoint(place)
    compute, num_classes = _compute(params, device, threads), _num_classes(file)
    return Model(params, load_model(params, file, num_classes, compute), num_classes, compute, file, "ema", flip)


def _open_exported(folder: Path, device: str | None, threads: int | None, which: WeightSet | None) -> Model:
    network, params, config = load_network(folder, which)
    compute, (file, _) = _compute(params, device, threads), config.weights_file(folder, which)
    arm, flip = str(config.source.get("arm")), None
    if arm in params.arms and params.pretrain_of(arm).checkpoint is None:  # else part of its training is not known
        flip = params.training.flip
    network = network.to(compute.device)
    return Model(params, network, config.num_classes, compute, file, which or config.which, flip)


def _compute(params: Params, device: str | None, threads: int | None) -> Compute:
    asked = params.compute
    default = "cpu" if asked.device == "cpu" else "auto"
    return devices.resolve(asked.model_copy(update={"device": device or default, "threads": threads or asked.threads}))


def _is_logged(place: Path) -> bool:
    return (place / LOGGED_PARAMS).is_file() and (place / LOGGED_WEIGHTS).is_file()


def _read_params(path: Path) -> Params:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error})") from None
    return parse_params(content, source=str(path))


def _params_of_checkpoint(place: Path) -> Params:
    """The params of the experiment that a checkpoint is in; `dataset` is the one that the checkpoint was trained on."""
    folders = place.absolute().parents
    file = next((folder / PARAMS_FILE for folder in folders if (folder / PARAMS_FILE).is_file()), None)
    if file is None:
        raise UserError(
            f"{place}: no folder above it has a {PARAMS_FILE}, which says how images are drawn; give a checkpoint in "
            "the folder of its experiment, or a folder of maskdm export"
        )
    params = load_params(file)
    match place.absolute().relative_to(file.parent).parts:
        case (paths.RESULTS.name, "pretrain", arm, *_) if arm in params.arms:
            return params.for_pretraining(arm)
    return params


def _num_classes(weights: Path) -> int:
    """The number of classes that a network was built for."""
    architecture = load_tensors(weights)[1].get("architecture")
    num_classes = architecture.get("num_classes") if isinstance(architecture, dict) else None
    if not isinstance(num_classes, int):
        raise UserError(f"{weights} holds no weights of a network")
    return num_classes


def _flip_of_checkpoint(place: Path) -> float | None:
    """The flip probability in the stamp of its folder; None if part of its training is not known."""
    folder = place.absolute().parent
    stamp = first = read_stamp(folder)
    if stamp is not None and stamp.stage == "finetune":
        *_, arm, seed = folder.parts
        first = read_stamp(folder.parents[2] / "pretrain" / arm / seed)
        if first is not None and stamp.inputs.get(f"{paths.RESULTS}/pretrain/{arm}/{seed}") != first.content:
            return None  # it was pretrained again since then
    if stamp is None or first is None or "pretrain.checkpoint" in first.inputs:
        return None
    flip = stamp.values.get("training", {}).get("flip")
    return None if flip is None else float(flip)
