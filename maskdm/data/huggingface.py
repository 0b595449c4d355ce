"""Image datasets from Hugging Face's hub, or a copy of one in `dataset.root`, read by the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from maskdm.base.errors import UserError, printable
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Labels
from maskdm.data.collection import Collection, reading
from maskdm.data.decoding import BadImageError

PREFIX = "huggingface:"
SAVED = ("state.json", "dataset_dict.json")  # `save_to_disk` writes one of these


@contextmanager
def open_huggingface(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open the images of `dataset.split` (train by default), with labels if a column holds classes.

    Raises:
        UserError: the package, the dataset or the split is missing, or the dataset has no images.
    """
    try:
        import datasets as package
    except ImportError:
        raise UserError(
            "dataset.source huggingface:NAME needs the package datasets: pip install 'maskdm[datasets]'"
        ) from None
    package.disable_progress_bars()
    table = _load(package, dataset)
    columns = [name for name, feature in table.features.items() if isinstance(feature, package.Image)]
    if not columns:
        raise UserError(
            f"dataset.source: {dataset.source} has no column of images; it has {', '.join(map(str, table.features))}"
        )
    table = table.cast_column(columns[0], package.Image(decode=False))

    def load(number: int) -> bytes:
        cell = table[number][columns[0]] or {}
        content, path = cell.get("bytes"), cell.get("path")
        if content is not None:
            return bytes(content)
        if path is None:
            raise BadImageError("the row has no image")
        with reading(str(path)):
            return Path(path).read_bytes()

    class_names, labels = _labels(package, table)
    yield Collection(dataset.source, len(table), load, "row {}".format, dataset.root, class_names, labels)


def _load(package: ModuleType, dataset: DatasetConfig) -> Any:
    """Load the rows of the split."""
    name, _, config = dataset.source.removeprefix(PREFIX).partition(":")
    root, split = dataset.root, dataset.split or "train"
    if root is not None and not Path(root).exists():
        raise UserError(f"dataset.root: there is no {root} (looked for {Path(root).absolute()})")
    try:
        if root is None or not any((Path(root) / file).is_file() for file in SAVED):
            return package.load_dataset(root or name, config or None, split=split)
        saved = package.load_from_disk(root)
    except Exception as error:  # the network, the hub and damaged files raise many types
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        advice = "Without a network, copy the dataset's files into a folder, and name it in dataset.root"
        if root is not None:
            advice = f"{root} should hold what save_to_disk has written, or the dataset's parquet or image files"
        raise UserError(
            f"dataset.source: {dataset.source}, split {split}, can't be loaded: {reason}. {advice}"
        ) from error
    return _part_of_saved(package, saved, dataset, config)


def _part_of_saved(package: ModuleType, saved: Any, dataset: DatasetConfig, config: str) -> Any:
    """The rows of the split in a folder that `save_to_disk` wrote, which holds one split, or several by name.

    Raises:
        UserError: the folder holds another split or configuration.
    """
    table, split = saved, dataset.split or "train"
    if isinstance(saved, package.DatasetDict):
        if split not in saved:
            there = printable(", ".join(map(str, saved)))
            raise UserError(f"dataset.split: {dataset.root} has no split {printable(split)!r}; it has {there}")
        table = saved[split]
    elif dataset.split not in (None, str(saved.split)):
        raise UserError(
            f"dataset.split: {dataset.root} was saved as one split, which is {printable(str(saved.split))}: expected "
            f"{printable(split)!r}; remove dataset.split to use it as it is, or save that split"
        )
    if config not in ("", table.config_name):
        raise UserError(
            f"dataset.source: {dataset.root} was saved from the configuration {printable(str(table.config_name))}: "
            f"expected {config!r}; remove :{config} to use it as it is, or save that configuration"
        )
    return table


def _labels(package: ModuleType, table: Any) -> tuple[tuple[str, ...] | None, Labels | None]:
    """Class names and labels from the column `label`, or the only class column; None if a row has no class."""
    columns = [name for name, feature in table.features.items() if isinstance(feature, package.ClassLabel)]
    column = "label" if "label" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        return None, None
    values = table.data.column(column).to_pylist() if table._indices is None else list(table[column])
    if any(value is None or value < 0 for value in values):
        return None, None
    return tuple(map(printable, table.features[column].names)), np.array(values, dtype=np.int64)
