"""MNIST and Fashion-MNIST from their four idx files, compressed or not.

Source: the format is described where MNIST was published: a magic number, the sizes (big-endian), then the bytes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from maskdm.base.errors import UserError
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images
from maskdm.data.collection import Collection, Pixels
from maskdm.data.named.files import DOWNLOADS, find_or_download, split_of
from maskdm.data.sources import reading

SPLITS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
SIDE = 28
MOST_IMAGES = 2**20
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}

Files = list[tuple[Path, Path]]  # images and labels of each part


@contextmanager
def open_mnist(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of a split: train, test, or all, which is one after the other.

    Raises:
        UserError: files are missing, damaged, or do not belong together.
    """
    parts = SPLITS[split_of(dataset)]
    names = " and ".join(f"{part}-{kind}.gz" for part in parts for kind in KINDS)
    own = Path(DOWNLOADS[dataset.source][1])
    files = find_or_download(dataset, lambda root: _find(root, own, parts), f"{names} (or without .gz)")
    images, labels = zip(*(_read_part(*pair) for pair in files), strict=True)
    root = str(files[0][0].parent)
    yield Pixels(
        f"{dataset.source} in {root}", root, np.concatenate(images), CLASSES[dataset.source], np.concatenate(labels)
    )


def _find(root: Path, own: Path, parts: tuple[str, ...]) -> Files | None:
    """The files of all parts in a folder: the root, or where torchvision puts this dataset's own below it."""
    for folder in (root, root / own, root / "raw"):
        found = [[_one(folder, f"{part}-{kind}") for kind in KINDS] for part in parts]
        if all(path is not None for pair in found for path in pair):
            return [(images, labels) for images, labels in found if images and labels]
    return None


def _one(folder: Path, name: str) -> Path | None:
    return next((path for suffix in ("", ".gz") if (path := folder / f"{name}{suffix}").is_file()), None)


def _read_part(images_file: Path, labels_file: Path) -> tuple[Images, np.ndarray]:
    images, labels = _read_idx(images_file, (SIDE, SIDE)), _read_idx(labels_file, ())
    if len(images) != len(labels):
        raise UserError(
            f"{labels_file} holds {len(labels)} labels, but {images_file} {len(images)} images: they do not belong "
            "together; get both anew"
        )
    if labels.max(initial=0) > 9:
        raise UserError(f"{labels_file} holds the label {labels.max()}; expected 0 to 9: get it anew")
    return images, labels.astype(np.int64)


def _read_idx(path: Path, sides: tuple[int, ...]) -> np.ndarray:
    """The bytes of an idx file, (N, *sides).

    Raises:
        UserError: it can't be read, or is no such file.
    """
    sizes = 1 + len(sides)
    header_bytes = 4 + 4 * sizes
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with reading(str(path), lambda: opened(path, "rb")) as file:
            header = file.read(header_bytes)
            magic, count, *found = struct.unpack(f">{1 + sizes}I", header)
            if magic != 0x0800 + sizes or tuple(found) != sides or count > MOST_IMAGES:
                raise _not_idx(path, sides, f"it begins with {header.hex()}")
            expected = count * int(np.prod(sides))
            content = file.read(expected + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise _not_idx(path, sides, str(error)) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) != expected:
        more = "more than" if len(content) > expected else f"{len(content)} of"
        raise _not_idx(path, sides, f"it holds {more} the {expected} bytes that its header declares")
    return np.frombuffer(content, dtype=np.uint8).reshape(count, *sides)


def _not_idx(path: Path, sides: tuple[int, ...], why: str) -> UserError:
    what = f"images of {SIDE}×{SIDE} pixels" if sides else "labels"
    return UserError(f"{path} is damaged, or no idx file of {what} ({why}): get it anew")
