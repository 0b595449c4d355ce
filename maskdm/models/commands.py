"""The command lines of `maskdm import-checkpoint` and `maskdm export`; imports no torch itself."""

from __future__ import annotations

import argparse

IMPORT_DESCRIPTION = """\
Read a checkpoint of MaskDM's own code, or of U-ViT's, into a folder that maskdm can draw from and score.

The network computes the same function. Width, depth, patch and image size, and classes are read off the shapes of
its tensors; the number of heads and the diffusion are not in them, so they are options. Nothing in the file is
executed; entries that are not weights (optimizer, step) are ignored and named. U-ViT's files whose final 3x3
convolution does anything are refused: this network has none. Needs no params.yaml.
"""
IMPORT_EPILOG = """\
examples:
  maskdm import-checkpoint celeba64.pt --out models/celeba64
  maskdm import-checkpoint celebahq.pt --out models/celebahq --schedule cosine
  maskdm import-checkpoint small.pt --out models/small --num-heads 4 --which raw
what is written: model.safetensors, model-raw.safetensors (the other set), config.json, README.md
"""
EXPORT_DESCRIPTION = """\
Write a checkpoint of this experiment for use elsewhere: plain safetensors, config.json and a model card.

The card tells data, protocol, network, masking, counted compute, metrics with their extractor, and where it all comes
from, as far as results/ has it; what is not there it says. Run it where the params.yaml of the experiment is.
"""
EXPORT_EPILOG = """\
examples:
  maskdm export results/finetune/patch-m50/seed-0                  the last milestone, averaged weights
  maskdm export results/finetune/patch-m50/seed-0/milestone-0.500.safetensors --out models/half
  maskdm export results/pretrain/patch-m50/seed-0 --which raw      what pretraining alone has made
"""
CHECKPOINT_HELP = "a file of results/finetune/ARM/seed-S or results/pretrain/ARM/seed-S, or such a folder: its last one"
EXPORT_OUT_HELP = "the folder to write (default: exported/ARM-seed-S-MILESTONE); an export is replaced"
WHICH_HELP = "the weights for model.safetensors; the others are kept beside it (default: ema, if the file has them)"


def add_import_arguments(command: argparse.ArgumentParser) -> None:
    """The help and the options of `maskdm import-checkpoint`."""
    command.description, command.epilog = IMPORT_DESCRIPTION, IMPORT_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = command.add_argument, "(default: %(default)s)"
    add("file", metavar="FILE", help="what torch.save wrote: MaskDM's, or U-ViT's")
    add("--out", required=True, metavar="DIR", help="the folder to write; an imported one is replaced")
    add("--which", choices=["ema", "raw"], help=WHICH_HELP)
    heads = "of attention; shapes don't tell (default: dim / 64, as U-ViT has it)"
    add("--num-heads", type=_count, metavar="N", help=heads)
    add("--num-timesteps", type=_count, default=1000, metavar="T", help=f"of the diffusion {default}")
    add("--schedule", choices=["linear", "cosine"], default="linear", help=f"of the noise {default}")
    prediction = f"what the network was trained to predict {default}"
    add("--prediction", choices=["epsilon", "x_0", "v"], default="epsilon", help=prediction)


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    """The help and the options of `maskdm export`."""
    command.description, command.epilog = EXPORT_DESCRIPTION, EXPORT_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    add, default = command.add_argument, "(default: %(default)s)"
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add("--format", choices=["safetensors"], default="safetensors", help=default)
    add("--out", metavar="DIR", help=EXPORT_OUT_HELP)
    add("--which", choices=["ema", "raw"], default="ema", help=f"averaged or raw weights {default}")


def run_import(options: argparse.Namespace) -> None:
    """`maskdm import-checkpoint`.

    Raises:
        UserError: the file can't be served, or the place is taken.
    """
    from maskdm.models.importing import run

    run(options)


def run_export(options: argparse.Namespace) -> None:
    """`maskdm export`.

    Raises:
        UserError: there is no such checkpoint here, it is of other params, or the place is taken.
    """
    from maskdm.models.exporting import run

    run(options)


def _count(text: str) -> int:
    """An option's value of 1 or more."""
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return int(text)
