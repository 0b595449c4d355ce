"""The source of a dataset, by its name in params.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from maskdm.config import DatasetConfig
from maskdm.data.arrays import LabelledImages
from maskdm.data.collection import Collection, Pixels, as_array
from maskdm.data.digits import load_digits
from maskdm.data.image_folder import open_image_folder
from maskdm.data.named.celeba import open_celeba
from maskdm.data.named.huggingface import PREFIX, open_huggingface
from maskdm.data.named.lsun import open_lsun
from maskdm.data.named.mnist import open_mnist
from maskdm.data.swissroll import load_swissroll

Opener = Callable[[DatasetConfig], AbstractContextManager[Collection]]
OPENERS: dict[str, Opener] = {
    "image_folder": open_image_folder,
    "mnist": open_mnist,
    "fashion_mnist": open_mnist,
    "celeba": open_celeba,
    "lsun": open_lsun,
}


@contextmanager
def open_collection(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of a dataset's source.

    Raises:
        UserError: they are not there, can't be read or downloaded, or are damaged.
    """
    if dataset.source == "digits":
        yield _embedded("digits", load_digits())
    elif dataset.source == "swissroll":
        yield _embedded("swissroll", load_swissroll(dataset))
    else:
        opener = open_huggingface if dataset.source.startswith(PREFIX) else OPENERS[dataset.source]
        with opener(dataset) as collection:
            yield collection


def _embedded(name: str, given: LabelledImages) -> Collection:
    images, labels = zip(*given.images, strict=True)
    pixels = np.stack(images)
    if pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    return Pixels(name, None, pixels, given.class_names, None if given.class_names is None else as_array(labels))
