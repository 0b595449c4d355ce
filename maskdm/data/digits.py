"""scikit-learn's embedded digits: 1,797 grey 8×8 images, ten classes, nothing to download."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images, LabelledImages
from maskdm.data.decoding import fit

MAX_VALUE = 16  # the digits count the dark pixels of 4×4 blocks


def load_digits(dataset: DatasetConfig) -> LabelledImages:
    """The digits in the dataset's size and channels, with their labels.

    Values 0..16 become round(v·255/16); another size than 8 is resized with the dataset's antialiased filter.
    """
    from sklearn import datasets  # takes a second, and no other command needs it

    bunch = datasets.load_digits()
    pixels = np.rint(bunch.images * 255 / MAX_VALUE).astype(np.uint8)[: dataset.limit]
    names = tuple(str(name) for name in bunch.target_names)
    return LabelledImages(_images(pixels, bunch.target, dataset), names)


def _images(pixels: Images, labels: np.ndarray, dataset: DatasetConfig) -> Iterator[tuple[Images, int]]:
    for digit, label in zip(pixels, labels, strict=False):
        yield fit(Image.fromarray(digit), dataset), int(label)
