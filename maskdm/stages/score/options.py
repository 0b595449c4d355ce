"""The options of `maskdm score` and `maskdm export-images`; imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from maskdm.config import EvaluationConfig, Extractor

SCORE_DESCRIPTION = """\
FID, KID, precision and recall of the images A against the images B, computed as the pipeline scores its samples.

A and B can each be:
  a folder, .zip or .tar of images    all of one size, or resized with --image-size
  a .npy array                        uint8 (N, H, W, C), as results/samples/ARM/seed-0/milestone-1.000.npy
  a prepared dataset                  results/data of an experiment, or results/data/held_out
  a model                             a checkpoint in results/ or a folder of maskdm export; --num-samples are drawn
Precision is the share of A that looks like B, recall the share of B that A covers.
"""
SCORE_EPILOG = """\
examples:
  maskdm score results/samples/scratch/seed-0/milestone-1.000.npy results/data
  maskdm score samples/ celeba.zip --features inception-v3-compat --image-size 64 --crop center
  maskdm score results/finetune/scratch/seed-0/milestone-1.000.safetensors results/data --num-samples 1000
"""
EXPORT_DESCRIPTION = """\
Write images as numbered PNG files, without loss: for torch-fidelity's `fidelity`, for clean-fid, or to look at.

SOURCE is a .npy array of samples, a prepared dataset such as results/data, a folder or archive of images, or a model.
"""
DEFAULTS = EvaluationConfig()
COUNTS = {  # option → smallest value, help
    "batch_size": (1, "images that enter the extractor at once"),
    "kid_subsets": (1, "subsets of KID"),
    "kid_subset_size": (2, "images in each subset; at most as many as A and B have"),
    "prc_neighborhood": (1, "neighbours of precision and recall"),
    "classifier_epochs": (1, "epochs of a classifier trained on B, which needs labels"),
}


def add_score(command: argparse.ArgumentParser) -> None:
    """Add the options of `maskdm score`."""
    command.description, command.epilog = SCORE_DESCRIPTION, SCORE_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add, names = command.add_argument, get_args(Extractor)
    add("a", metavar="A", type=Path, help="the images to score")
    add("b", metavar="B", type=Path, help="the images to compare them with: the real ones")
    features = f"the feature extractor: {', '.join(names)} (default: %(default)s)"
    add("--features", default="inception-v3-compat", choices=names, metavar="NAME", help=features)
    add("--weights", type=Path, help="a local file with its weights; for classifier the one in results/features")
    for name, (smallest, what) in COUNTS.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(DEFAULTS, name)
        add(flag, type=_at_least(smallest), default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write scores and protocol to this file")
    _add_reading(command)


def add_export_images(command: argparse.ArgumentParser) -> None:
    """Add the options of `maskdm export-images`."""
    command.description = EXPORT_DESCRIPTION
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("source", metavar="SOURCE", type=Path, help="the images")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet")
    _add_reading(command)


def _add_reading(command: argparse.ArgumentParser) -> None:
    """Add the options about files, models and the machine."""
    add = command.add_argument_group("folders and archives of images").add_argument
    add("--image-size", type=_at_least(1), metavar="N", help="resize to N×N (default: all must have one size)")
    channels = "1 grey, 3 RGB (default: as the other set; 1 for files that are all grey)"
    add("--channels", type=int, choices=(1, 3), help=channels)
    add("--crop", choices=("none", "center"), default="none", help="before resizing (default: none)")
    add("--resize-filter", choices=("lanczos", "bicubic"), default="lanczos", help="antialiased (default: lanczos)")
    add = command.add_argument_group("models").add_argument
    add("--num-samples", type=_at_least(1), metavar="N", help="how many images to draw")
    add("--seed", type=_at_least(0), default=0, metavar="S", help="seed of the images (default: 0)")
    add = command.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    threads = "CPU threads (default: the number of cores)"
    add("--threads", type=_at_least(1), default=os.cpu_count() or 1, metavar="N", help=threads)


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number of {smallest} or more, got {text}")
        return int(text)

    return parse
