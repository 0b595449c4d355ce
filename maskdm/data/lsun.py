"""LSUN's scenes and objects, read from the LMDB databases that their authors distribute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskdm.base.errors import UserError, printable
from maskdm.config import DatasetConfig, paths
from maskdm.config.schema import LSUN_OBJECTS
from maskdm.data.collection import Collection, reading
from maskdm.data.decoding import BadImageError

DATA = "data.mdb"


@contextmanager
def open_lsun(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open the images of `dataset.split`: a category, optionally with _train or _val appended.

    Raises:
        UserError: the package is missing, or the database is missing, cut off or damaged.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError("dataset.source lsun needs the package lmdb: pip install 'maskdm[datasets]'") from None
    path = _find(paths.root_of(dataset), dataset.split or "")
    with reading(str(path)), path.open("rb"):
        size = path.stat().st_size
    try:
        if size == 0:
            raise lmdb.Error("it is empty")
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if needed > size:  # reading missing pages would kill the process with SIGBUS
                raise lmdb.Error(f"it is cut off: {size} bytes of {needed}")
            with environment.begin(buffers=True) as transaction:
                yield _images(path, transaction)
    except lmdb.Error as error:
        reason = printable(str(error).removeprefix(f"{path}: "))
        raise UserError(f"dataset.root: {path} is damaged ({reason}): unpack or copy it again") from None


def _images(path: Path, transaction: Any) -> Collection:
    """The images of a database, in the order of their keys (hashes), without labels."""
    keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]

    def load(number: int) -> bytes:
        value = transaction.get(keys[number])
        if value is None:
            raise BadImageError("the database is damaged: its keys are not in order")
        return bytes(value)

    def name(number: int) -> str:
        return keys[number].decode("ascii", "replace")

    return Collection(str(path), len(keys), load, name, root=str(path.parent))


def _find(root: Path, split: str) -> Path:
    """The database of a category; the training part of a scene unless `split` names another."""
    category = split.removesuffix("_lmdb")
    if category in LSUN_OBJECTS:
        names = [category]
    elif category == "test" or category.endswith(("_train", "_val")):
        names = [f"{category}_lmdb"]
    else:
        names = [f"{category}_train_lmdb", f"{category}_lmdb"]
    for name in (*names, split):
        if (root / name / DATA).is_file():
            return root / name / DATA
    there = printable(", ".join(sorted(path.parent.name for path in root.glob(f"*/{DATA}"))))
    raise UserError(
        f"dataset.root: there is no {names[0]}/{DATA} in {root} (looked in {root.absolute()}"
        f"{there and '; found ' + there}): download {names[0]}.zip with the authors' script and unpack it in {root}"
    )
