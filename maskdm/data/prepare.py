"""The first stage: images from anywhere become arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maskdm import paths
from maskdm.config import DatasetConfig, Params
from maskdm.data.arrays import ImageArrays, LabelledImages, ShardWriter
from maskdm.data.digits import load_digits
from maskdm.data.grids import save_grid
from maskdm.data.image_folder import open_images
from maskdm.errors import UserError
from maskdm.publishing import publish_folder

PREVIEW = "preview.png"
PREVIEW_IMAGES = 64


def prepare(params: Params, output: Path = paths.DATA) -> dict[str, Any]:
    """Turn the dataset of params.yaml into shards, labels, a manifest and a preview, whole or not at all.

    Returns:
        the manifest.

    Raises:
        UserError: the source is missing, unreadable, without images or with a bad one, or `output` can't
            be written.
    """
    _check_apart(params.dataset.root, output)
    with publish_folder(output) as folder:
        with _open_source(params, folder) as source:
            manifest = _write(source, params.dataset, folder)
        arrays = ImageArrays.open(folder)
        save_grid(arrays.gather(np.arange(min(PREVIEW_IMAGES, len(arrays)))), folder / PREVIEW)
    return manifest


def _check_apart(root: str | None, output: Path) -> None:
    """A root that holds the results would take previews and samples for images."""
    if root and output.resolve().is_relative_to(Path(root).resolve()):
        raise UserError(f"dataset.root: {root} holds {output} too: give your images a folder of their own")


@contextmanager
def _open_source(params: Params, scratch: Path) -> Iterator[LabelledImages]:
    if params.dataset.source == "digits":
        yield load_digits(params.dataset)
    else:
        with open_images(params.dataset, params.compute.threads, scratch) as images:
            yield images


def _write(source: LabelledImages, dataset: DatasetConfig, folder: Path) -> dict[str, Any]:
    shape = (dataset.image_size, dataset.image_size, dataset.channels)
    with closing(ShardWriter(folder, shape, dataset.shard_images)) as writer:
        for image, label in source.images:
            writer.add(image, label)
        return writer.finish(
            source.class_names,
            source={"kind": dataset.source, "root": dataset.root, "limit": dataset.limit},
            protocol=dataset.model_dump(include={"crop", "crop_box", "resize_filter", "channels", "image_size"}),
            skipped=source.skipped,
        )
