"""What `maskdm export-images` does: a set of images as PNG files."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from maskdm.base.errors import UserError
from maskdm.base.progress import progress
from maskdm.base.publishing import publish_folder
from maskdm.stages.score.command import wanted_of
from maskdm.stages.score.sets import ImageSet, open_set


def run(options: argparse.Namespace) -> None:
    """Write the files, all or none.

    Args:
        options: of `options.add_export_images`.

    Raises:
        UserError: the images can't be opened, the folder is there already, or it can't be written.
    """
    if options.out.exists():
        raise UserError(f"{options.out} is there already: name a folder that is not, with --out")
    with tempfile.TemporaryDirectory() as scratch:
        images = open_set(options.source, wanted_of(options), Path(scratch))
        with publish_folder(options.out.absolute()) as folder:
            write_pngs(images, folder)
    print(f"{images.text} → {options.out}")


def write_pngs(images: ImageSet, folder: Path) -> None:
    """Write 00000000.png and so on into an existing, empty folder."""
    for number in progress(range(len(images)), len(images), "Writing PNG files", "images"):
        (pixels,) = np.asarray(images.pixels[number : number + 1])
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.save(folder / f"{number:08d}.png", format="PNG")
