"""Turn the images of any source into arrays: the work of the first stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from maskdm.base.errors import UserError, printable
from maskdm.config import DatasetConfig, Params
from maskdm.data.arrays import ImageArrays, ShardWriter
from maskdm.data.collection import Collection
from maskdm.data.decoding import BadImageError, Decoded, decode_all
from maskdm.data.grids import save_grid
from maskdm.data.huggingface import PREFIX
from maskdm.data.opening import open_collection
from maskdm.data.selection import Selection, facts, select

PREVIEW = "preview.png"
PREVIEW_IMAGES = 64
MAIN = Path()  # the folder of `dataset`, below the output
HELD_OUT = Path("held_out")
PRETRAIN = Path("pretrain")
PROTOCOL = {"crop", "crop_box", "resize_filter", "channels", "image_size"}


def prepare(params: Params, folder: Path, check: Callable[[Selection], None] = lambda _: None) -> dict[str, Any]:
    """Turn the datasets of params.yaml into shards, labels, manifests and previews.

    `folder` gets the training part of `dataset`, `folder/held_out` the held-out part, and `folder/pretrain/NAME` the
    training part of each of `datasets`. `ImageArrays` opens each of them.

    Args:
        params: the experiment.
        folder: an empty folder.
        check: called with the selection of `dataset` before any image is read; it may raise.

    Returns:
        the manifest of the training part of `dataset`.

    Raises:
        UserError: a source is missing or unreadable, has no images, or has a bad one.
    """
    manifests = []
    for place, dataset in _datasets(params).items():
        with _named(place), open_collection(dataset) as collection:
            selection = select(collection, dataset)
            if collection.left_out:
                tqdm.write(f"warning: {collection.origin}: {collection.left_out}", file=sys.stderr)
            _warn_of_limit(place, dataset, selection)
            parts = {folder / place: ("train", selection.train)}
            if place == MAIN:
                check(selection)
                if dataset.held_out:
                    parts[folder / HELD_OUT] = ("held_out", selection.held_out)
            numbers = np.concatenate([images for _, images in parts.values()])
            with closing(decode_all(collection, numbers, dataset, params.compute.threads)) as decoded:
                for part_folder, (part, images) in parts.items():
                    some = islice(decoded, len(images))
                    manifests.append(_write(collection, dataset, selection, part, some, part_folder))
    return manifests[0]


def check_apart(params: Params, output: Path) -> None:
    """Refuse a `root` that contains the results: previews and samples would be read as images.

    Raises:
        UserError: a `root` contains `output`.
    """
    for place, dataset in _datasets(params).items():
        root, takes_all = dataset.root, dataset.source == "image_folder" or dataset.source.startswith(PREFIX)
        if takes_all and root and output.resolve().is_relative_to(Path(root).resolve()):
            with _named(place):
                raise UserError(f"dataset.root: {root} holds {output} too: give your images a folder of their own")


def _datasets(params: Params) -> dict[Path, DatasetConfig]:
    """All datasets, by their folder below the output."""
    return {MAIN: params.dataset, **{PRETRAIN / name: dataset for name, dataset in params.datasets.items()}}


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Add the name of the entry of `datasets` that is being prepared to errors in the block."""
    try:
        yield
    except UserError as error:
        if place != MAIN:
            error.args = (f"datasets.{place.name}: {error}",)
        raise


def _warn_of_limit(place: Path, dataset: DatasetConfig, selection: Selection) -> None:
    there = selection.counts["of_classes"]
    if dataset.limit is not None and dataset.limit > there:
        name = "dataset" if place == MAIN else f"datasets.{place.name}"
        tqdm.write(f"warning: {name}.limit {dataset.limit}: there are {there} images; all are used", file=sys.stderr)


def _write(
    collection: Collection,
    dataset: DatasetConfig,
    selection: Selection,
    part: str,
    decoded: Iterable[Decoded],
    folder: Path,
) -> dict[str, Any]:
    """Write one part of a dataset and its preview; returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    skipped: list[dict[str, str]] = []
    with closing(ShardWriter(folder, dataset.shape, dataset.shard_images)) as writer:
        for number, image in decoded:
            if isinstance(image, BadImageError):
                writer.skip()
                skipped.append({"file": printable(collection.name(number)), "reason": str(image)})
                tqdm.write(f"warning: skipped bad image {collection.where(number)}: {image}", file=sys.stderr)
            else:
                writer.add(image, None if selection.labels is None else int(selection.labels[number]))
        if not writer.num_images:
            raise UserError(
                f"dataset.root: all {len(skipped)} images of {collection.origin} are bad; "
                f"the first is {skipped[0]['file']}: {skipped[0]['reason']}"
            )
        source = {"kind": dataset.source, "root": collection.root, "part": part, **facts(selection, dataset)}
        if collection.left_out:
            source["left_out"] = collection.left_out
        protocol = {**dataset.model_dump(mode="json", include=PROTOCOL), "pillow": PIL.__version__}
        manifest = writer.finish(selection.class_names, source, protocol, skipped)
    arrays = ImageArrays.open(folder)
    spread = np.linspace(0, len(arrays) - 1, min(PREVIEW_IMAGES, len(arrays)))  # files may be sorted by class
    save_grid(arrays.gather(spread.round().astype(np.int64)), folder / PREVIEW)
    return manifest
