"""Images drawn from a model: a checkpoint of the pipeline, a logged model, or an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.base.errors import UserError
from maskdm.base.tensors import load_tensors
from maskdm.config import (
    MAX_BYTES,
    PARAMS_FILE,
    ComputeConfig,
    Params,
    exported_config,
    load_params,
    parse_params,
    paths,
)
from maskdm.config.stamps import read_stamp
from maskdm.models import exported
from maskdm.models.drawing import draw_images, load_model
from maskdm.scoring.protocol import drawn_as
from maskdm.training import devices
from maskdm.training.devices import Compute

LOGGED_WEIGHTS, LOGGED_PARAMS = "weights.safetensors", "params.json"  # in `artifacts` of a model that MLflow logged


def is_model(place: Path) -> bool:
    """Whether a path is one of the models that `draw` knows."""
    if place.is_dir():
        return (place / exported_config.CONFIG).is_file() or _is_logged(place)
    return place.suffix == ".safetensors"


def draw(
    place: Path, num_images: int, seed: int, machine: ComputeConfig
) -> tuple[np.ndarray, dict[str, Any], float | None]:
    """Draw images as the model's params say.

    Args:
        place: a checkpoint below its experiment's folder, a logged model's artifacts, or a folder of `maskdm export`.
        num_images: how many.
        seed: image i depends on (seed, i), as in the stage `sample`.
        machine: device and threads; the precision is that of the params.

    Returns:
        uint8 (num_images, H, W, C), how they were drawn, and the probability of a left-right flip in the model's
        training, None where that is not known.

    Raises:
        UserError: the model is damaged, or its params are not to be found.
    """
    if place.is_dir() and not _is_logged(place):
        found, config = exported.load_exported(place), exported_config.read_config(place)
        params, num_classes, weights = found.params, found.num_classes, config.which
        flip = _flip_of_export(params, config.source)
        compute = _compute(params, machine)
        model = found.model.to(compute.device)
    else:
        file = weights_file(place)
        params, num_classes, weights = _params_of(place), _num_classes(file), "ema"
        flip = params.training.flip if place.is_dir() else _flip_of_checkpoint(place)
        compute = _compute(params, machine)
        model = load_model(params, file, num_classes, compute)
    images = draw_images(params, model, num_classes, seed, num_images, compute, f"draw from {place}")
    return images, {**drawn_as(params.sampling), "weights": weights.upper() if weights == "ema" else weights}, flip


def weights_file(place: Path) -> Path:
    """The file of the weights that `draw` draws from."""
    if not place.is_dir():
        return place
    return place / (LOGGED_WEIGHTS if _is_logged(place) else exported_config.WEIGHTS)


def _compute(params: Params, machine: ComputeConfig) -> Compute:
    asked = {"device": machine.device, "threads": machine.threads}
    return devices.resolve(params.compute.model_copy(update=asked))


def _is_logged(place: Path) -> bool:
    return (place / LOGGED_PARAMS).is_file() and (place / LOGGED_WEIGHTS).is_file()


def _params_of(place: Path) -> Params:
    """The params beside a logged model's weights, or those of the experiment that a checkpoint lies in.

    Those of a pretrained checkpoint have the dataset that its arm was pretrained on.
    """
    if place.is_dir():
        return _read_params(place / LOGGED_PARAMS)
    params, stage, arm = _experiment_of(place)
    return params.for_pretraining(arm) if stage == "pretrain" else params


def _experiment_of(place: Path) -> tuple[Params, str, str]:
    """The experiment that a checkpoint lies in, its stage and its arm; these are empty for a file of no arm."""
    folders = place.absolute().parents
    file = next((folder / PARAMS_FILE for folder in folders if (folder / PARAMS_FILE).is_file()), None)
    if file is None:
        raise UserError(
            f"{place}: there is no {PARAMS_FILE} in any folder above it, which says how images are drawn; give a "
            "checkpoint where its experiment lies, or a folder of maskdm export"
        )
    params = load_params(file)
    match place.absolute().relative_to(file.parent).parts:
        case (paths.RESULTS.name, ("pretrain" | "finetune") as stage, arm, *_) if arm in params.arms:
            return params, stage, arm
    return params, "", ""


def _flip_of_export(params: Params, source: Mapping[str, Any]) -> float | None:
    """None for an import, and for an arm that began from weights of elsewhere: how those were trained is not known."""
    arm = str(source.get("arm"))
    return params.training.flip if arm in params.arms and params.pretrain_of(arm).checkpoint is None else None


def _flip_of_checkpoint(place: Path) -> float | None:
    """From the stamp of its folder; None where there is none, or where it may have begun from weights of elsewhere."""
    folder = place.absolute().parent
    stamp = first = read_stamp(folder)
    if stamp is not None and stamp.stage == "finetune":
        *_, arm, seed = folder.parts
        first = read_stamp(folder.parents[2] / "pretrain" / arm / seed)
        if first is not None and stamp.inputs.get(f"{paths.RESULTS}/pretrain/{arm}/{seed}") != first.content:
            return None  # pretrained again since
    if stamp is None or first is None or "pretrain.checkpoint" in first.inputs:
        return None
    flip = stamp.values.get("training", {}).get("flip")
    return None if flip is None else float(flip)


def _read_params(path: Path) -> Params:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error})") from None
    return parse_params(content, source=str(path))


def _num_classes(weights: Path) -> int:
    """Of the data that weights were trained on, as far as they depend on it."""
    architecture = load_tensors(weights)[1].get("architecture")
    num_classes = architecture.get("num_classes") if isinstance(architecture, dict) else None
    if not isinstance(num_classes, int):
        raise UserError(f"{weights} holds no weights of a network")
    return num_classes
