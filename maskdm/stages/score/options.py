"""The command lines of `maskdm score` and `maskdm export-images`; imports nothing of weight."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from maskdm.config import EvaluationConfig, Extractor

SCORE_DESCRIPTION = """\
FID, KID, precision and recall of the images A against the images B, by the code that scores the pipeline's samples.

A and B, each one of:
  a folder, .zip or .tar of images    all of one size, or --image-size says which to make of them
  a .npy array                        uint8 (N, H, W, C), as results/samples/ARM/seed-0/milestone-1.000.npy
  a prepared dataset                  results/data of an experiment, or results/data/held_out
  a model                             a checkpoint in results/, or a folder of maskdm export: --num-samples are drawn
FID is of A against B: precision is the share of A that looks like B, recall the share of B that A covers.
"""
SCORE_EPILOG = """\
examples:
  maskdm score results/samples/scratch/seed-0/milestone-1.000.npy results/data
  maskdm score samples/ celeba.zip --features inception-v3-compat --image-size 64 --crop center
  maskdm score results/finetune/scratch/seed-0/milestone-1.000.safetensors results/data --num-samples 1000
"""
EXPORT_DESCRIPTION = """\
Write images as numbered PNG files, which lose nothing: for torch-fidelity's `fidelity`, clean-fid or the eye.

SOURCE is a .npy array of samples, a prepared dataset such as results/data, a folder or archive of images, or a model.
"""
DEFAULTS = EvaluationConfig()
COUNTS = {
    "batch_size": (1, "images at a time"),
    "kid_subsets": (1, "of KID"),
    "kid_subset_size": (2, "images in each; at most as many as A and B have"),
    "prc_neighborhood": (1, "of precision and recall"),
    "classifier_epochs": (1, "of a classifier trained on B, which needs labels"),
}


def add_score(command: argparse.ArgumentParser) -> None:
    """The options of `maskdm score`."""
    command.description, command.epilog = SCORE_DESCRIPTION, SCORE_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add, names = command.add_argument, get_args(Extractor)
    add("a", metavar="A", type=Path, help="images that are scored")
    add("b", metavar="B", type=Path, help="images that they are compared with: the real ones")
    features = f"what sees the images: {', '.join(names)} (default: %(default)s)"
    add("--features", default="inception-v3-compat", choices=names, metavar="NAME", help=features)
    add("--weights", type=Path, help="its weights, a local file; of classifier one in results/features")
    for name, (least, what) in COUNTS.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(DEFAULTS, name)
        add(flag, type=_count(least), default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write scores and protocol there, too")
    _add_images(command)


def add_export_images(command: argparse.ArgumentParser) -> None:
    """The options of `maskdm export-images`."""
    command.description = EXPORT_DESCRIPTION
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("source", metavar="SOURCE", type=Path, help="the images")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder that is not there yet")
    _add_images(command)


def _add_images(command: argparse.ArgumentParser) -> None:
    """How files become images, and how images are drawn from models."""
    add = command.add_argument_group("folders and archives of images").add_argument
    add("--image-size", type=_count(1), metavar="N", help="resize to N×N (default: all have one size)")
    channels = "1 grey, 3 RGB (default: as the other set; of files 1 if all are grey)"
    add("--channels", type=int, choices=(1, 3), help=channels)
    add("--crop", choices=("none", "center"), default="none", help="before resizing (default: none)")
    add("--resize-filter", choices=("lanczos", "bicubic"), default="lanczos", help="antialiased")
    add = command.add_argument_group("models").add_argument
    add("--num-samples", type=_count(1), metavar="N", help="so many images are drawn")
    add("--seed", type=_count(0), default=0, metavar="S", help="of the images (default: 0)")
    add = command.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--threads", type=_count(1), default=os.cpu_count() or 1, metavar="N", help="of a CPU (default: its cores)")


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, got {text}")
        return value

    return parse
