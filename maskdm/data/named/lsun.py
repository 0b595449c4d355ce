"""LSUN's scenes and objects from their LMDB databases, as their authors distribute them: images by hash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.config import DatasetConfig, paths
from maskdm.config.schema import LSUN_OBJECTS
from maskdm.data.collection import Collection, check_size
from maskdm.data.decoding import BadImageError
from maskdm.data.sources import reading

if TYPE_CHECKING:
    import lmdb

DATA = "data.mdb"


class _Database(Collection):
    """The images of a database, in the order of their keys, without labels."""

    def __init__(self, path: Path, transaction: lmdb.Transaction) -> None:
        super().__init__(str(path), str(path.parent), None, None)
        self._transaction = transaction
        self._keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, number: int) -> str:
        return self._keys[number].decode("ascii", "replace")

    def where(self, number: int) -> str:
        return f"{printable(self.name(number))} in {self.origin}"

    def load(self, number: int, most_bytes: int) -> bytes:
        value = self._transaction.get(self._keys[number])
        if value is None:
            raise BadImageError("the database is damaged: its keys are not in order")
        check_size(len(value), most_bytes)
        return bytes(value)


@contextmanager
def open_lsun(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of `dataset.split`: a category, with or without _train or _val behind it.

    Raises:
        UserError: the package is missing, or the database is missing, cut off or damaged.
    """
    package = _package()
    path = _find(paths.root_of(dataset), dataset.split or "")
    with reading(str(path), lambda: path.open("rb")) as file:
        size = os.fstat(file.fileno()).st_size
    try:
        if size == 0:
            raise package.Error("it is empty")
        with package.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if needed > size:  # reading pages that are not there would end the process with SIGBUS
                raise package.Error(f"it is cut off: {size} bytes of {needed}")
            with environment.begin(buffers=True) as transaction:
                collection = _Database(path, transaction)
                if not len(collection):
                    raise UserError(f"dataset.root: {path} holds no images")
                yield collection
    except package.Error as error:
        reason = printable(str(error).removeprefix(f"{path}: "))
        raise UserError(f"dataset.root: {path} is damaged ({reason}): unpack or copy it again") from None


def _package() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise UserError("dataset.source lsun needs the package lmdb: pip install 'maskdm[datasets]'") from None
    return lmdb


def _folders(split: str) -> list[str]:
    """The authors' names of a category's database, the likeliest first: only scenes have parts."""
    category = split.removesuffix("_lmdb")
    if category in LSUN_OBJECTS:
        return [category]
    if category == "test" or category.endswith(("_train", "_val")):
        return [f"{category}_lmdb"]
    return [f"{category}_train_lmdb", f"{category}_lmdb"]


def _find(root: Path, split: str) -> Path:
    """The database of a category; its training part, if nothing else is said."""
    names = _folders(split)
    for name in (*names, split):
        if (root / name / DATA).is_file():
            return root / name / DATA
    there = sorted(path.parent.name for path in root.glob(f"*/{DATA}"))
    raise UserError(
        f"dataset.root: there is no {names[0]}/{DATA} in {root} (looked in {root.absolute()}"
        f"{'; found ' + printable(', '.join(there)) if there else ''}): download {names[0]}.zip with the authors' "
        f"script and unpack it in {root}"
    )
