"""The digits that come with scikit-learn: 1,797 grey 8×8 images in ten classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from maskdm.base.errors import UserError
from maskdm.config import DatasetConfig
from maskdm.data.collection import Collection

TABLE = Path("datasets") / "data" / "digits.csv.gz"  # a row has 64 pixels, then the digit
MAX_VALUE = 16  # a value counts the dark pixels of a 4×4 block


@contextmanager
def open_digits(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open the digits with their labels; values 0..16 become round(v·255/16).

    The file is read directly: importing scikit-learn takes seconds.

    Raises:
        UserError: scikit-learn is not installed, or lacks the file.
    """
    sklearn = importlib.util.find_spec("sklearn")
    folders = sklearn.submodule_search_locations if sklearn is not None else None
    table = Path(folders[0]) / TABLE if folders else TABLE
    if not table.is_file():
        raise UserError(f"dataset.source: digits needs scikit-learn with its file {TABLE}: pip install scikit-learn")
    values = np.loadtxt(table, delimiter=",")
    pixels = np.rint(values[:, :-1] * 255 / MAX_VALUE).astype(np.uint8).reshape(-1, 8, 8)
    labels = values[:, -1].astype(np.int64)
    yield Collection("digits", len(pixels), pixels.__getitem__, class_names=tuple("0123456789"), labels=labels)
