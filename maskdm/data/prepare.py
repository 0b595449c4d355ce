"""The first stage: images from anywhere become arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from maskdm.base.errors import UserError
from maskdm.config import DatasetConfig, Params
from maskdm.data.arrays import Entries, ImageArrays, write_manifest
from maskdm.data.collection import Collection, as_array
from maskdm.data.grids import save_grid
from maskdm.data.named.huggingface import PREFIX
from maskdm.data.opening import open_collection
from maskdm.data.selection import Selection, facts, select
from maskdm.data.shards import Made, Maker, Shard, split_into_shards

PREVIEW = "preview.png"
PREVIEW_IMAGES = 64
MAIN = Path()  # the place of `dataset`
HELD_OUT = Path("held_out")
PRETRAIN = Path("pretrain")
PROTOCOL = {"crop", "crop_box", "resize_filter", "channels", "image_size"}


@dataclass(frozen=True)
class _Source:
    """An open source, and what is to be made of it: the shards of each of its datasets, by what part of it they are."""

    place: Path
    collection: Collection
    dataset: DatasetConfig
    selection: Selection
    maker: Maker
    datasets: dict[str, list[Shard]]

    @property
    def shards(self) -> list[Shard]:
        return [shard for shards in self.datasets.values() for shard in shards]


def prepare(params: Params, folder: Path, check: Callable[[Selection], None] = lambda _: None) -> dict[str, Any]:
    """Turn the datasets of params.yaml into shards, labels, manifests and previews.

    In `folder` lies the training part of `dataset`, in `held_out` of it what is held out, in `pretrain/NAME` the
    training part of each of `datasets`; each is opened by `ImageArrays`.

    Args:
        params: the experiment.
        folder: an empty folder.
        check: gets the selection of `dataset` before any image is read; may raise.

    Returns:
        the manifest of the training part of `dataset`.

    Raises:
        UserError: a source is missing, unreadable, without images or with a bad one.
    """
    manifests = []
    for place, dataset in _datasets(params).items():
        with _named(place), _open(place, dataset, params.compute.threads) as source:
            if place == MAIN:
                check(source.selection)
            manifests.append(_write(source, folder))
    return manifests[0]


def check_apart(params: Params, output: Path) -> None:
    """Refuse a root that holds the results: it would take previews and samples for images.

    Raises:
        UserError: there is one.
    """
    for place, dataset in _datasets(params).items():
        root, takes_all = dataset.root, dataset.source == "image_folder" or dataset.source.startswith(PREFIX)
        if takes_all and root and output.resolve().is_relative_to(Path(root).resolve()):
            with _named(place):
                raise UserError(f"dataset.root: {root} holds {output} too: give your images a folder of their own")


def _datasets(params: Params) -> dict[Path, DatasetConfig]:
    """What is to be prepared, by its place below the output."""
    return {MAIN: params.dataset, **{PRETRAIN / name: dataset for name, dataset in params.datasets.items()}}


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Errors, which speak of `dataset`, are told to be about one of `datasets`."""
    try:
        yield
    except UserError as error:
        if place != MAIN:
            error.args = (f"datasets.{place.name}: {error}",)
        raise


@contextmanager
def _open(place: Path, dataset: DatasetConfig, threads: int) -> Iterator[_Source]:
    with open_collection(dataset) as collection:
        selection = select(collection, dataset)
        _tell_of_limit(place, dataset, selection)
        datasets = {"train": split_into_shards(place, selection.train, dataset.shard_images)}
        if dataset.held_out and place == MAIN:
            datasets["held_out"] = split_into_shards(HELD_OUT, selection.held_out, dataset.shard_images)
        maker = Maker(collection, selection.labels, dataset, threads)
        yield _Source(place, collection, dataset, selection, maker, datasets)


def _tell_of_limit(place: Path, dataset: DatasetConfig, selection: Selection) -> None:
    there = selection.counts["of_classes"]
    if dataset.limit is not None and dataset.limit > there:
        name = "dataset" if place == MAIN else f"datasets.{place.name}"
        tqdm.write(f"warning: {name}.limit {dataset.limit}: there are {there} images; all are used", file=sys.stderr)


def _write(source: _Source, folder: Path) -> dict[str, Any]:
    """Write the datasets of a source; the manifest of its training part."""
    made = {shard.file: one for shard, one in source.maker.make(source.shards, folder)}
    manifests = {}
    for part, shards in source.datasets.items():
        manifests[part] = _describe(source, part, shards, folder, made)
        arrays = ImageArrays.open(folder / shards[0].place)
        spread = np.linspace(0, len(arrays) - 1, min(PREVIEW_IMAGES, len(arrays)))  # files may be sorted by class
        save_grid(arrays.gather(spread.round().astype(np.int64)), folder / shards[0].place / PREVIEW)
    return manifests["train"]


def _describe(source: _Source, part: str, shards: list[Shard], folder: Path, made: dict[Path, Made]) -> dict[str, Any]:
    """Write the manifest of a dataset whose shards are there, without those of which no image is left."""
    entries, labels, skipped = [], [], []
    for shard in shards:
        one = made[shard.file]
        labels += one.labels
        skipped += one.skipped
        if one.count:
            entries.append({"file": shard.file.name, "count": one.count, "sha256": one.sha256})
        else:
            (folder / shard.file).unlink()
    if not entries:
        raise UserError(
            f"dataset.root: all {len(skipped)} images of {source.collection.origin} are bad; "
            f"the first is {skipped[0]['file']}: {skipped[0]['reason']}"
        )
    dataset = source.dataset
    class_names = source.selection.class_names
    return write_manifest(
        folder / shards[0].place,
        dataset.shape,
        Entries(entries, None if class_names is None else as_array(labels), class_names, skipped),
        {"kind": dataset.source, "root": source.collection.root, "part": part, **facts(source.selection, dataset)},
        {**dataset.model_dump(mode="json", include=PROTOCOL), "pillow": PIL.__version__},
    )
