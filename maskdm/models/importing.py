"""`maskdm import-checkpoint`: weights of other code as a folder to draw from, to score, and to start training from."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, get_args

import torch

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import ParamsError, UserError, printable
from maskdm.config import DiffusionConfig, Params, parse_params
from maskdm.config.paths import WeightSet
from maskdm.method.backbones import build_model
from maskdm.method.diffusion import make_betas
from maskdm.models.card import model_card
from maskdm.models.exported import check_replaceable, publish_exported
from maskdm.models.layouts import Sizes, read_checkpoint
from maskdm.scoring.extractors import load_plain

HEAD_DIM = 64  # width of an attention head in U-ViT's published networks
MAX_BETA_DIFFERENCE = 1e-3  # the last variances of a cosine schedule are clipped at 0.999 or at 0.9999
SCHEDULES: tuple[str, ...] = get_args(DiffusionConfig.model_fields["schedule"].annotation)
CODES = {"maskdm": "MaskDM's code", "u-vit": "U-ViT's code"}
TRAINING = {"lr": 2e-4, "batch_size": 128}  # as the authors trained


def run(options: argparse.Namespace) -> None:
    """Import a checkpoint of other code.

    Args:
        options: the parsed command line.

    Raises:
        ParamsError: an option does not fit the network.
        UserError: the file can't be imported, or the output exists and is something else.
    """
    file, out = Path(options.file), Path(options.out)
    check_replaceable(out)
    content = _read(file)
    try:
        checkpoint = read_checkpoint(content)
        network, *others = checkpoint.networks.values()
        sizes = network.sizes()
        if any(other.sizes() != sizes for other in others):
            raise ValueError("its raw and its averaged weights are of different networks")
        params, num_classes = _params(sizes, file, options), sizes.num_classes
        _check_betas(checkpoint.betas, params, file)
        with torch.device("meta"):
            model = build_model(params, num_classes)
        sets = {str(kind): network.converted(model) for kind, network in checkpoint.networks.items()}
    except ValueError as error:
        raise UserError(f"{file} can't be imported: {error}") from None
    which: WeightSet = options.which or ("ema" if "ema" in sets else "raw")
    if which not in sets:
        raise UserError(f"{file} has no {which} weights, only {', '.join(sets)}")
    source = {"file": printable(file.name), "sha256": file_sha256(file), "layout": checkpoint.layout}
    facts = {"source": source, "sets": list(sets), "ignored": checkpoint.ignored}
    card = model_card(out.name, params, num_classes, which, **facts)
    publish_exported(out, params, num_classes, sets, which, source, card)
    process = params.diffusion
    heads = "" if options.num_heads else f" (assumed: dim / {HEAD_DIM}; if that is wrong, give --num-heads)"
    print(
        f"{file}: the layout of {CODES[checkpoint.layout]}, weights: {' and '.join(sets)}\n"
        f"network: dim {model.dim}, {params.model.depth} blocks, {params.model.num_heads} heads{heads}, "
        f"patch {params.model.patch_size}, images {'×'.join(map(str, params.dataset.shape))}, "
        f"{num_classes or 'no'} classes\n"
        f"taken from the command line: {process.num_timesteps} timesteps, schedule {process.schedule}, "
        f"prediction {process.prediction}\n"
        f"ignored: {', '.join(checkpoint.ignored) or 'nothing'}\n"
        f"written: {out} (model.safetensors: {which}; README.md says how to draw images)"
    )


def _read(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        return load_plain(file)
    except ValueError as error:
        raise UserError(
            f"{file} is not a plain PyTorch checkpoint: {error}; expected one that "
            f"{' or '.join(CODES.values())} wrote with torch.save: give such a file, or download it again"
        ) from None


def _params(sizes: Sizes, file: Path, options: argparse.Namespace) -> Params:
    """A whole experiment around the network: it has the authors' training values and a placeholder as dataset.

    Raises:
        ParamsError: an option does not fit the network, or the number of heads must be given.
    """
    dim = sizes.model["dim"]
    if options.num_heads is None and dim % HEAD_DIM:
        raise ParamsError(
            f"the shapes do not tell the number of attention heads, and dim {dim} is not a multiple of {HEAD_DIM}, "
            "the width of a head in U-ViT: give --num-heads"
        )
    images = {"image_size": sizes.image_size, "channels": sizes.channels}
    return parse_params(
        {
            "name": re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem)[:60] or "imported",
            "seeds": [0],
            "dataset": {"source": "image_folder", "root": "images", **images},
            "datasets": {},
            "model": {**sizes.model, "num_heads": options.num_heads or dim // HEAD_DIM},
            "diffusion": {
                "num_timesteps": options.num_timesteps,
                "schedule": options.schedule,
                "prediction": options.prediction,
            },
            "budget": {"unmasked_steps": 200_000},
            "training": {},
            "pretrain": TRAINING,
            "finetune": TRAINING,
            "sampling": {"num_steps": min(50, options.num_timesteps)},
            "evaluation": {"features": "inception-v3-compat"},
            "compute": {"device": "auto", "precision": "auto"},
            "tuning": {"seed": 1000, "budget_fraction": 0.5, "trials": {}},
            "arms": {"scratch": {"strategy": "none"}},
        },
        source="",
    )


def _check_betas(betas: torch.Tensor | None, params: Params, file: Path) -> None:
    """Check whether the diffusion given by the options has the variances β_t, (T,), of the file, if it has any."""
    config = params.diffusion
    if betas is None:
        return
    if len(betas) != config.num_timesteps:
        raise ParamsError(
            f"{file} was trained with {len(betas)} timesteps (its `betas`), not {config.num_timesteps}: "
            f"give --num-timesteps {len(betas)}"
        )
    tables = {schedule: make_betas(schedule, len(betas)) for schedule in SCHEDULES}
    fitting = [
        schedule
        for schedule, table in tables.items()
        if torch.allclose(betas.double(), table, rtol=0.0, atol=MAX_BETA_DIFFERENCE)
    ]
    if not fitting:
        raise ParamsError(f"the `betas` of {file} are of no schedule that maskdm has: it can't be imported")
    if config.schedule not in fitting:
        raise ParamsError(
            f"the `betas` of {file} are not those of the schedule {config.schedule}: give --schedule {fitting[0]}"
        )
