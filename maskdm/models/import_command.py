"""`maskdm import-checkpoint`: other code's weights as a folder that ours can draw from, score and start from."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, get_args

import torch

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import ParamsError, UserError
from maskdm.base.printable import printable
from maskdm.config import DiffusionConfig, Params, parse_params
from maskdm.config.formats import WeightSet
from maskdm.method.diffusion import make_betas
from maskdm.models.exported import check_replaceable, publish_exported
from maskdm.models.layouts import Checkpoint, read_checkpoint
from maskdm.models.model_card import imported_card
from maskdm.scoring.extractors import load_plain

HEAD_DIM = 64  # of U-ViT's published networks
BETAS_MAY_DIFFER = 1e-3  # codes cut the last variances of a cosine schedule at 0.999 or at 0.9999
SCHEDULES: tuple[str, ...] = get_args(DiffusionConfig.model_fields["schedule"].annotation)
CODES = {"maskdm": "MaskDM's code", "u-vit": "U-ViT's code"}


def run(options: argparse.Namespace) -> None:
    """Import a file of other code's.

    Args:
        options: of the command line.

    Raises:
        ParamsError: an option does not fit the network.
        UserError: the file can't be served, or the place is taken.
    """
    file, out = Path(options.file), Path(options.out)
    check_replaceable(out)
    checkpoint = _read(file)
    which = _main_set(checkpoint, options.which, file)
    num_heads = _num_heads(checkpoint, options.num_heads)
    params = _params(checkpoint, num_heads, file, options)
    _check_betas(checkpoint, params, file)
    source = {"file": printable(file.name), "sha256": file_sha256(file), "layout": checkpoint.layout}
    card = imported_card(out.name, params, checkpoint, source, which)
    publish_exported(out, params, checkpoint.shape.num_classes, _sets(checkpoint), which, source, card)
    print("\n".join(_told(checkpoint, params, file, out, which, is_assumed=options.num_heads is None)))


def _read(file: Path) -> Checkpoint:
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        content = load_plain(file)
    except ValueError as error:
        raise UserError(
            f"{file} is not a plain PyTorch checkpoint: {error}; expected one that "
            f"{' or '.join(CODES.values())} wrote with torch.save: give that one, or download it again"
        ) from None
    try:
        # twice: raw and averaged weights may be the same tensors in the file
        checkpoint = read_checkpoint(content, most_bytes=2 * file.stat().st_size)
        _ = checkpoint.image_size
    except ValueError as error:
        raise UserError(f"{file} can't be imported: {error}") from None
    return checkpoint


def _main_set(checkpoint: Checkpoint, asked: WeightSet | None, file: Path) -> WeightSet:
    """The set for model.safetensors: the averaged one if there is one."""
    if asked is not None and asked not in checkpoint.sets:
        raise UserError(f"{file} has no {asked} weights, only {', '.join(checkpoint.sets)}")
    return asked or ("ema" if "ema" in checkpoint.sets else "raw")


def _sets(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    return {str(which): state for which, state in checkpoint.sets.items()}


def _num_heads(checkpoint: Checkpoint, asked: int | None) -> int:
    """The number of attention heads, which no shape tells.

    Raises:
        ParamsError: it does not divide the width, or is not given where U-ViT's rule gives none.
    """
    dim = checkpoint.shape.dim
    if asked is None and dim % HEAD_DIM:
        raise ParamsError(
            f"the shapes don't tell the number of attention heads, and dim {dim} is no multiple of {HEAD_DIM}, which a "
            "head of U-ViT has: give --num-heads"
        )
    num_heads = asked or dim // HEAD_DIM
    if dim % num_heads:
        raise ParamsError(f"--num-heads {num_heads} does not divide dim {dim}")
    return num_heads


def _params(checkpoint: Checkpoint, num_heads: int, file: Path, options: argparse.Namespace) -> Params:
    """A whole experiment around the network: the authors' training values; its dataset is to be filled in."""
    shape = checkpoint.shape
    stage = {"lr": 2e-4, "batch_size": 128}
    return parse_params(
        {
            "name": re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem)[:60] or "imported",
            "seeds": [0],
            "dataset": _dataset(checkpoint),
            "datasets": {},
            "model": {
                "patch_size": checkpoint.patch_size,
                "dim": shape.dim,
                "depth": shape.depth,
                "num_heads": num_heads,
                "mlp_ratio": shape.mlp_ratio,
                "qkv_bias": shape.qkv_bias,
                "mlp_time_embed": shape.mlp_time_embed,
                "class_conditional": shape.num_classes > 0,
            },
            "diffusion": {
                "num_timesteps": options.num_timesteps,
                "schedule": options.schedule,
                "prediction": options.prediction,
            },
            "budget": {"unmasked_steps": 200_000},
            "training": {},
            "pretrain": stage,
            "finetune": stage,
            "sampling": {"num_steps": min(50, options.num_timesteps)},
            "evaluation": {"features": "inception-v3-compat"},
            "compute": {"device": "auto", "precision": "auto"},
            "tuning": {"seed": 1000, "budget_fraction": 0.5, "trials": {}},
            "arms": {"scratch": {"strategy": "none"}},
        },
        source="",
    )


def _dataset(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "source": "image_folder",
        "root": "images",
        "image_size": checkpoint.image_size,
        "channels": checkpoint.channels,
    }


def _check_betas(checkpoint: Checkpoint, params: Params, file: Path) -> None:
    """The diffusion of the options must be the one that the file has, if it has one."""
    betas, config = checkpoint.betas, params.diffusion
    if betas is None:
        return
    if len(betas) != config.num_timesteps:
        raise ParamsError(
            f"{file} was trained with {len(betas)} timesteps (its `betas`), not {config.num_timesteps}: "
            f"give --num-timesteps {len(betas)}"
        )
    fitting = [schedule for schedule in SCHEDULES if _is_of(betas, schedule)]
    if not fitting:
        raise ParamsError(f"the `betas` of {file} are of no schedule that maskdm has: it can't be imported")
    if config.schedule not in fitting:
        raise ParamsError(
            f"the `betas` of {file} are not those of the schedule {config.schedule}: give --schedule {fitting[0]}"
        )


def _is_of(betas: torch.Tensor, schedule: str) -> bool:
    """Whether variances β_t (T,) are those of a schedule."""
    return torch.allclose(betas.double(), make_betas(schedule, len(betas)), rtol=0.0, atol=BETAS_MAY_DIFFER)


def _told(
    checkpoint: Checkpoint, params: Params, file: Path, out: Path, which: WeightSet, is_assumed: bool
) -> list[str]:
    """What was read, assumed, ignored and written, for people."""
    model, process, dataset = params.model, params.diffusion, params.dataset
    heads = f"{model.num_heads} heads" + (f" (assumed: dim / {HEAD_DIM}; else give --num-heads)" if is_assumed else "")
    classes = f"{checkpoint.shape.num_classes} classes" if model.class_conditional else "no classes"
    return [
        f"{file}: the layout of {CODES[checkpoint.layout]}, weights: {' and '.join(checkpoint.sets)}",
        f"network: dim {model.dim}, {model.depth} blocks, {heads}, patch {model.patch_size}, "
        f"images {dataset.height}×{dataset.width}×{dataset.channels}, {classes}",
        f"taken from the command line: {process.num_timesteps} timesteps, schedule {process.schedule}, "
        f"prediction {process.prediction}",
        f"ignored: {', '.join(checkpoint.ignored) or 'nothing'}",
        f"written: {out} (model.safetensors: {which}; README.md says how to draw images)",
    ]
