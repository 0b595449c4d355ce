"""LSUN's scenes and objects from their LMDB databases, as their authors distribute them: images by hash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskdm.checksums import values_sha256
from maskdm.config import LSUN_OBJECTS, DatasetConfig
from maskdm.data.collection import Collection, Numbers, check_size
from maskdm.data.decoding import BadImageError
from maskdm.data.named.files import root_of
from maskdm.data.named.lmdb import DamagedDatabaseError, LmdbFile, open_lmdb
from maskdm.data.sources import file_stamp, reading
from maskdm.errors import UserError
from maskdm.printable import printable

DATA = "data.mdb"


class _Database(Collection):
    """The images of a database, in the order of their keys, without labels."""

    def __init__(self, path: Path, database: LmdbFile) -> None:
        super().__init__(str(path), str(path.parent), None, None)
        self._path, self._database = path, database

    def __len__(self) -> int:
        return len(self._database)

    def name(self, number: int) -> str:
        return self._database.key(number).decode("ascii", "replace")

    def where(self, number: int) -> str:
        return f"{printable(self.name(number))} in {self.origin}"

    def load(self, number: int, most_bytes: int) -> bytes:
        try:
            check_size(self._database.size(number), most_bytes)
            return reading(self.origin, lambda: self._database.value(number))
        except DamagedDatabaseError as error:
            raise BadImageError(f"the database is damaged: {error}") from None

    def stamp(self, numbers: Numbers) -> str:
        return values_sha256([file_stamp(self._path), numbers.tolist()])


@contextmanager
def open_lsun(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of `dataset.split`: a category, with or without _train or _val behind it.

    Raises:
        UserError: its database is missing, cut off or damaged.
    """
    path = _find(root_of(dataset), dataset.split or "")
    try:
        with open_lmdb(path) as database:
            if not len(database):
                raise UserError(f"dataset.root: {path} holds no images")
            yield _Database(path, database)
    except DamagedDatabaseError as error:
        raise UserError(f"dataset.root: {path} is damaged ({error}): unpack or copy it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


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
