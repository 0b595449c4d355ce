"""The command lines of `maskdm import-checkpoint` and `maskdm export`; this module does not import torch."""

from __future__ import annotations

import argparse

IMPORT_DESCRIPTION = """\
Convert a checkpoint of the code of MaskDM or U-ViT into a folder that maskdm can draw from, score and train on.

The imported network computes the same function. Width, depth, patch size, image size and classes follow from the
shapes of its tensors; the number of heads and the diffusion do not, so they are options. Nothing in the file is
executed; entries that are not weights (optimizer, step) are ignored and listed. Files of U-ViT with a final 3x3
convolution are refused: this network has none. Needs no params.yaml.
"""
IMPORT_EPILOG = """\
examples:
  maskdm import-checkpoint celeba64.pt --out models/celeba64
  maskdm import-checkpoint celebahq.pt --out models/celebahq --schedule cosine
  maskdm import-checkpoint small.pt --out models/small --num-heads 4 --which raw
files written: model.safetensors, model-raw.safetensors (the other set of weights), config.json, README.md
"""
EXPORT_DESCRIPTION = """\
Write a checkpoint of this experiment for use elsewhere: plain safetensors, config.json and a model card.

The card describes data, protocol, network, masking, counted compute, metrics with their extractor, and provenance, and
says which of these results/ does not have. Run it in the folder of the experiment's params.yaml.
"""
EXPORT_EPILOG = """\
examples:
  maskdm export results/finetune/patch-m50/seed-0                  the last milestone, averaged weights
  maskdm export results/finetune/patch-m50/seed-0/milestone-0.500.safetensors --out models/half
  maskdm export results/pretrain/patch-m50/seed-0 --which raw      the result of pretraining alone
"""
CHECKPOINT_HELP = "a file in results/finetune/ARM/seed-S or results/pretrain/ARM/seed-S, or the folder: its last file"
EXPORT_OUT_HELP = "the folder to write (default: exported/ARM-seed-S-MILESTONE); an earlier export there is replaced"
WHICH_HELP = "the weights for model.safetensors; the others are written beside it (default: ema, if there are any)"


def add_import_arguments(command: argparse.ArgumentParser) -> None:
    """Add the help and the options of `maskdm import-checkpoint`."""
    command.description, command.epilog = IMPORT_DESCRIPTION, IMPORT_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = command.add_argument, "(default: %(default)s)"
    add("file", metavar="FILE", help="a file that the code of MaskDM or U-ViT wrote with torch.save")
    add("--out", required=True, metavar="DIR", help="the folder to write; an earlier import there is replaced")
    add("--which", choices=["ema", "raw"], help=WHICH_HELP)
    heads = "number of attention heads (default: dim / 64, as in U-ViT)"
    add("--num-heads", type=_count, metavar="N", help=heads)
    add("--num-timesteps", type=_count, default=1000, metavar="T", help=f"time steps of the diffusion {default}")
    add("--schedule", choices=["linear", "cosine"], default="linear", help=f"noise schedule {default}")
    prediction = f"what the network was trained to predict {default}"
    add("--prediction", choices=["epsilon", "x_0", "v"], default="epsilon", help=prediction)


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    """Add the help and the options of `maskdm export`."""
    command.description, command.epilog = EXPORT_DESCRIPTION, EXPORT_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = command.add_argument, "(default: %(default)s)"
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add("--format", choices=["safetensors"], default="safetensors", help=default)
    add("--out", metavar="DIR", help=EXPORT_OUT_HELP)
    add("--which", choices=["ema", "raw"], default="ema", help=f"averaged or raw weights {default}")


def run_import(options: argparse.Namespace) -> None:
    """Run `maskdm import-checkpoint`.

    Raises:
        UserError: the file can't be imported, or the output exists and is something else.
    """
    from maskdm.models.importing import run

    run(options)


def run_export(options: argparse.Namespace) -> None:
    """Run `maskdm export`.

    Raises:
        UserError: there is no such checkpoint, it is out of date, or the output exists and is something else.
    """
    from maskdm.models.exporting import run

    run(options)


def _count(text: str) -> int:
    """Parse a whole number of 1 or more."""
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return int(text)
