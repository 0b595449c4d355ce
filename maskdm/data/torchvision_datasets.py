"""MNIST, Fashion-MNIST and SVHN, read by torchvision, which downloads and checks the original files."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.base.errors import UserError, printable
from maskdm.config import DatasetConfig, paths
from maskdm.data.collection import Collection

CONNECTION_SECONDS = 30.0  # timeout
DIGITS = tuple("0123456789")
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MNIST_KINDS = {"mnist": ("MNIST", DIGITS), "fashion_mnist": ("FashionMNIST", CLOTHES)}
MNIST_PARTS = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}  # by split


@contextmanager
def open_mnist(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open MNIST or Fashion-MNIST; the split `all` is train followed by test.

    Compressed files are checked and unpacked in place; missing files are downloaded.

    Raises:
        UserError: files are missing and cannot be downloaded, are damaged, or do not belong together.
    """
    (name, class_names), parts = MNIST_KINDS[dataset.source], MNIST_PARTS[dataset.split or "train"]
    files = [f"{part}-{kind}-ubyte" for part in parts for kind in ("images-idx3", "labels-idx1")]
    root = paths.root_of(dataset)
    places = (root, root / name / "raw", root / "raw")
    folder = next((place for place in places if any(place.glob(f"{files[0]}*"))), root / name / "raw")
    with _torchvision(dataset, folder, files) as datasets:
        original, tables = getattr(datasets, name), []
        for part in parts:  # torchvision's class, restricted to this folder and this part's files
            resources = [resource for resource in original.resources if resource[0].startswith(part)]
            kind = type(name, (original,), {"raw_folder": str(folder), "resources": resources})
            tables.append(kind(root, train=part == "train", download=True))
        images = np.concatenate([table.data.numpy() for table in tables])
        labels = np.concatenate([table.targets.numpy() for table in tables])
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            held = f"images {images.shape} and {len(labels)} labels up to {labels.max()}"
            raise ValueError(f"they hold {held}; expected images (N, 28, 28) and N labels up to 9")
    yield Collection(
        f"{dataset.source} in {folder}",
        len(images),
        images.__getitem__,
        root=str(folder),
        class_names=class_names,
        labels=labels,
    )


@contextmanager
def open_svhn(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open the cropped digits of Street View House Numbers: train, test or extra. The label 10 of a zero becomes 0.

    Raises:
        UserError: the file is missing or damaged, and cannot be downloaded.
    """
    root, split = paths.root_of(dataset), dataset.split or "train"
    with _torchvision(dataset, root, [f"{split}_32x32.mat"]) as datasets:
        table = datasets.SVHN(root, split, download=True)
    images = table.data.transpose(0, 2, 3, 1)
    yield Collection(
        f"svhn in {root}", len(images), images.__getitem__, root=str(root), class_names=DIGITS, labels=table.labels
    )


@contextmanager
def _torchvision(dataset: DatasetConfig, folder: Path, files: Sequence[str]) -> Iterator[Any]:
    """Yield torchvision's datasets; an error in the block becomes a `UserError` that names the files."""
    from maskdm.base.torchvision_compat import declare_missing_operators  # imports torch

    declare_missing_operators()
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_SECONDS)
    try:
        yield datasets
    except Exception as error:  # the network and damaged files raise many types
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        names, root = " and ".join(files), paths.root_of(dataset)
        if all((folder / file).is_file() for file in files):
            raise UserError(
                f"dataset.root: the files of {dataset.source} in {folder} are damaged, or can't be read ({reason}): "
                f"download {names} again"
            ) from error
        raise UserError(
            f"dataset.root: the files of {dataset.source} are not in {root}, or are incomplete (looked in "
            f"{root.absolute()}), and could not be downloaded ({reason}): put {names} into {root}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
