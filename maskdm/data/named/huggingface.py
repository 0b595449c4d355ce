"""Any image dataset of Hugging Face's hub, or a copy of one in `dataset.root`, through the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Labels
from maskdm.data.collection import Collection, check_size
from maskdm.data.decoding import BadImageError
from maskdm.data.sources import reading

PREFIX = "huggingface:"
SAVED = ("state.json", "dataset_dict.json")  # of what `save_to_disk` has written


class _Rows(Collection):
    """The images of a column."""

    def __init__(self, table: Any, column: str, origin: str, root: str | None, classes: Any, labels: Labels | None):
        super().__init__(origin, root, classes, labels)
        self._table, self._column = table, column

    def __len__(self) -> int:
        return len(self._table)

    def name(self, number: int) -> str:
        return f"row {number}"

    def load(self, number: int, most_bytes: int) -> bytes:
        cell = self._table[number][self._column] or {}
        content, path = cell.get("bytes"), cell.get("path")
        if content is not None:
            check_size(len(content), most_bytes)
            return bytes(content)
        if path is None:
            raise BadImageError("the row has no image")
        file = Path(path)
        check_size(reading(str(path), file.stat).st_size, most_bytes)
        return reading(str(path), file.read_bytes)


@contextmanager
def open_huggingface(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of a split, train if none is named, in their order, with labels where a column has classes.

    Raises:
        UserError: the package, the dataset or the split is missing, or it has no images.
    """
    package = _package()
    table = _load(package, dataset)
    columns = [name for name, feature in table.features.items() if isinstance(feature, package.Image)]
    if not columns:
        raise UserError(
            f"dataset.source: {dataset.source} has no column of images; it has {', '.join(map(str, table.features))}"
        )
    table = table.cast_column(columns[0], package.Image(decode=False))
    classes, labels = _labels(package, table)
    yield _Rows(table, columns[0], dataset.source, dataset.root, classes, labels)


def _package() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "dataset.source huggingface:NAME needs the package datasets: pip install 'maskdm[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets


def _load(package: ModuleType, dataset: DatasetConfig) -> Any:
    """The rows of the split."""
    (name, config), split = _name_and_config(dataset), dataset.split or "train"
    if dataset.root is not None and not Path(dataset.root).exists():
        raise UserError(f"dataset.root: there is no {dataset.root} (looked for {Path(dataset.root).absolute()})")
    try:
        if dataset.root is not None and any((Path(dataset.root) / file).is_file() for file in SAVED):
            saved = package.load_from_disk(dataset.root)
        else:
            return package.load_dataset(dataset.root or name, config, split=split)
    except Exception as error:  # of the network, of the hub, of the files
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        raise UserError(
            f"dataset.source: {dataset.source}, split {split}, can't be loaded: {reason}. {_advice(dataset)}"
        ) from error
    return _part_of_saved(package, saved, dataset)


def _name_and_config(dataset: DatasetConfig) -> tuple[str, str | None]:
    """Of NAME or NAME:CONFIG."""
    name, _, config = dataset.source.removeprefix(PREFIX).partition(":")
    return name, config or None


def _part_of_saved(package: ModuleType, saved: Any, dataset: DatasetConfig) -> Any:
    """The rows of the split in what `save_to_disk` has written: a dataset of one split, or several by name.

    Raises:
        UserError: it is of another split or configuration.
    """
    table = saved
    if isinstance(saved, package.DatasetDict):
        split = dataset.split or "train"
        if split not in saved:
            there = printable(", ".join(map(str, saved)))
            raise UserError(f"dataset.split: {dataset.root} has no split {printable(split)!r}; it has {there}")
        table = saved[split]
    elif dataset.split not in (None, str(saved.split)):
        raise UserError(
            f"dataset.split: {dataset.root} was saved as one split, which is {printable(str(saved.split))}: expected "
            f"{printable(dataset.split)!r}; remove dataset.split to use it as it is, or save that split"
        )
    config = _name_and_config(dataset)[1]
    if config not in (None, table.config_name):
        raise UserError(
            f"dataset.source: {dataset.root} was saved from the configuration {printable(str(table.config_name))}: "
            f"expected {config!r}; remove :{config} to use it as it is, or save that configuration"
        )
    return table


def _advice(dataset: DatasetConfig) -> str:
    if dataset.root is not None:
        return f"{dataset.root} should hold what save_to_disk has written, or the dataset's parquet or image files"
    return "Without a network, copy the dataset's files into a folder, and name it in dataset.root"


def _labels(package: ModuleType, table: Any) -> tuple[tuple[str, ...] | None, Labels | None]:
    """The classes of the column `label`, or of the only one that has classes; none if a row is of no class."""
    columns = [name for name, feature in table.features.items() if isinstance(feature, package.ClassLabel)]
    column = "label" if "label" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        return None, None
    values = table.data.column(column).to_pylist() if table._indices is None else list(table[column])
    if any(value is None or value < 0 for value in values):
        return None, None
    return tuple(map(printable, table.features[column].names)), np.array(values, dtype=np.int64)
