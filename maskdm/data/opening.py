"""The source of a dataset, by its name in params.yaml.

A new source is a small file beside this one: a context manager that takes a `DatasetConfig` and gives a `Collection`,
or raises a `UserError` that says what is missing and what to do. It imports the package that it needs inside of it.
`digits` is one in memory, `lsun` one that reads image by image. Name it in `OPENERS` here and in `SOURCES` of
`maskdm.config.schema` (or in `SPLITS` there, if it has parts). Test it in tests/data/test_datasets.py with
small files in its original format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from maskdm.config import DatasetConfig
from maskdm.data.collection import Collection
from maskdm.data.digits import open_digits
from maskdm.data.huggingface import open_huggingface
from maskdm.data.image_folder import open_image_folder
from maskdm.data.lsun import open_lsun
from maskdm.data.swissroll import open_swissroll
from maskdm.data.torchvision_datasets import open_mnist, open_svhn

Opener = Callable[[DatasetConfig], AbstractContextManager[Collection]]
OPENERS: dict[str, Opener] = {
    "digits": open_digits,
    "swissroll": open_swissroll,
    "mnist": open_mnist,
    "fashion_mnist": open_mnist,
    "svhn": open_svhn,
    "lsun": open_lsun,
    "image_folder": open_image_folder,
    "huggingface": open_huggingface,
}


@contextmanager
def open_collection(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of a dataset's source.

    Raises:
        UserError: they are not there, can't be read or downloaded, or are damaged.
    """
    with OPENERS[dataset.source.partition(":")[0]](dataset) as collection:
        yield collection
