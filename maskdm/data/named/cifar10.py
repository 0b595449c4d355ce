"""CIFAR-10 from its Python batches, which are pickles: none of what they ask for is called."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images, Labels
from maskdm.data.collection import Collection, Pixels
from maskdm.data.decoding import BadImageError
from maskdm.data.named.files import by_base_name, find_or_download, split_of
from maskdm.data.sources import Source, open_source, reading
from maskdm.errors import UserError
from maskdm.printable import printable

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
SPLITS = {"train": TRAIN, "test": ("test_batch",), "all": (*TRAIN, "test_batch")}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
SHAPE = (3, 32, 32)  # of an image in a row of a batch
MOST_BYTES = 2**26  # of a batch: twice as many as it has

# What a batch needs of pickle, and how often: with so few containers nothing can be nested deeply, and a small memo.
MANY = 2**18
OPCODES = {
    **dict.fromkeys(("PROTO", "STOP", "EMPTY_DICT", "FRAME"), 4),
    **dict.fromkeys(("GLOBAL", "REDUCE", "BUILD", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST"), 8),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE"), 16),
    **dict.fromkeys(("MARK", "APPENDS", "APPEND", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT"), MANY),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING"), MANY),
}
MEMO_OPCODES = ("BINPUT", "LONG_BINPUT")


class _NotABatchError(Exception):
    """The message is the reason."""


@contextmanager
def open_cifar10(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of a split: train, test, or all, in the order of the batches.

    Raises:
        UserError: files are missing, damaged, or are not what they should be.
    """
    names = SPLITS[split_of(dataset)]
    root = str(find_or_download(dataset, _find, f"{ARCHIVE}, or the folder {FOLDER} that is in it,"))
    with open_source(root) as source:
        parts = _read(source, names)
    images = np.concatenate([parts[name][0] for name in names])
    labels = np.concatenate([parts[name][1] for name in names])
    yield Pixels(f"cifar10 in {root}", root, images, CLASSES, labels)


def _find(root: Path) -> Path | None:
    if root.is_file():
        return root
    if (root / TRAIN[0]).is_file() or (root / "test_batch").is_file():
        return root
    return next((path for name in (FOLDER, ARCHIVE) if (path := root / name).exists()), None)


def _read(source: Source, names: tuple[str, ...]) -> dict[str, tuple[Images, Labels]]:
    """Images and labels of the batches, by name, read as they lie."""
    files = by_base_name(source, reading(source.root, source.files), names)
    if missing := [name for name in names if name not in files]:
        raise UserError(f"dataset.root: {source.root} has no {', '.join(missing)}: get CIFAR-10's {ARCHIVE} anew")
    order = source.reading_order([files[name] for name in names])
    ordered = names if order is None else [names[position] for position in order]
    return {name: _read_batch(source, files[name]) for name in ordered}


def _read_batch(source: Source, path: str) -> tuple[Images, Labels]:
    where = source.where(path)
    try:
        if (size := reading(where, lambda: source.size(path))) > MOST_BYTES:
            raise _NotABatchError(f"{size} bytes are more than a batch has")
        return _images_and_labels(_unpickled(reading(where, lambda: source.load(path))))
    except (_NotABatchError, BadImageError) as error:
        raise UserError(f"{where} is no batch of CIFAR-10, or is damaged ({error}): get it anew") from None


def _images_and_labels(batch: Any) -> tuple[Images, Labels]:
    """(N, 32, 32, 3) and (N,) of a batch."""
    data, labels = (batch.get(key) if isinstance(batch, dict) else None for key in (b"data", b"labels"))
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise _NotABatchError("it holds no data and labels")
    rows = data.values(int(np.prod(SHAPE)))
    if len(labels) != len(rows):
        raise _NotABatchError(f"it holds {len(labels)} labels for {len(rows)} images")
    if not all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels):
        raise _NotABatchError(f"expected labels from 0 to {len(CLASSES) - 1}")
    return rows.reshape(-1, *SHAPE).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


class _Array:
    """Stands for the NumPy array of a pickle: keeps what one would be made of."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def values(self, columns: int) -> Images:
        """(N, columns) uint8.

        Raises:
            _NotABatchError: it is no such array.
        """
        try:
            _, (rows, found), dtype, is_fortran, content = self._state
            is_right = found == columns and dtype.name == b"u1" and not is_fortran
            if is_right and isinstance(content, bytes) and len(content) == rows * columns:
                return np.frombuffer(content, dtype=np.uint8).reshape(rows, columns)
        except (TypeError, ValueError, AttributeError):
            pass
        raise _NotABatchError(f"its data is no array of uint8 with {columns} columns")


class _Dtype:
    """Stands for a NumPy dtype."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """Makes stand-ins of the two kinds of objects that a batch has."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        known: dict[tuple[str, str], Callable[..., Any]] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array}
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            known[core, "_reconstruct"] = _Array
        if (module, name) not in known:
            raise _NotABatchError(f"it asks for {printable(f'{module}.{name}', 80)}, which no batch needs")
        return known[module, name]


def _unpickled(content: bytes) -> Any:
    """A batch, with stand-ins for its array.

    Raises:
        _NotABatchError: it is damaged, or holds what no batch does.
    """
    try:
        _check_opcodes(content)
        return _Reader(io.BytesIO(content), encoding="bytes").load()
    except _NotABatchError:
        raise
    except Exception as error:  # a damaged pickle may raise almost anything
        raise _NotABatchError(printable(str(error)) or type(error).__name__) from error


def _check_opcodes(content: bytes) -> None:
    """Refuse a pickle that does more than a batch's does, before any of it is done."""
    seen = Counter[str]()
    for opcode, argument, _ in pickletools.genops(content):
        seen[opcode.name] += 1
        if seen[opcode.name] > OPCODES.get(opcode.name, 0):
            raise _NotABatchError(f"a pickle with {seen[opcode.name]} × {opcode.name}, more than any batch has")
        if opcode.name in MEMO_OPCODES and isinstance(argument, int) and argument > MANY:
            raise _NotABatchError(f"a memo of {argument} objects, more than any batch has")
