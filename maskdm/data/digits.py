"""scikit-learn's embedded digits: 1,797 grey 8×8 images, ten classes, nothing to download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from maskdm.base.errors import UserError
from maskdm.data.arrays import LabelledImages

TABLE = Path("datasets") / "data" / "digits.csv.gz"  # in scikit-learn: 64 pixels, then the digit
MAX_VALUE = 16  # the digits count the dark pixels of 4×4 blocks


def load_digits() -> LabelledImages:
    """The digits (8, 8, 1) with their labels; values 0..16 become round(v·255/16).

    scikit-learn is not imported: that takes seconds, and no other command needs it.

    Raises:
        UserError: scikit-learn has no such file.
    """
    sklearn = importlib.util.find_spec("sklearn")
    folders = sklearn.submodule_search_locations if sklearn is not None else None
    table = Path(folders[0]) / TABLE if folders else TABLE
    if not table.is_file():
        raise UserError(f"dataset.source: digits needs scikit-learn with its file {TABLE}: pip install scikit-learn")
    values = np.loadtxt(table, delimiter=",")
    pixels = np.rint(values[:, :-1] * 255 / MAX_VALUE).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = values[:, -1].astype(int)
    names = tuple(str(name) for name in range(labels.max() + 1))
    return LabelledImages(zip(pixels, labels.tolist(), strict=True), names)
