"""Open a dataset's source by its name in params.yaml.

To add a source, write a module here with a context manager that takes a `DatasetConfig` and yields a `Collection`, or
raises a `UserError` that says what is missing and what to do. Import the packages it needs inside the function.
`digits` holds its images in memory, `lsun` reads them one by one. Add it to `OPENERS` here and to `SOURCES` of
`maskdm.config.schema` (or to `SPLITS` there, if it has splits). Test it in tests/data/test_datasets.py on small files
in its original format.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

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


def open_collection(dataset: DatasetConfig) -> AbstractContextManager[Collection]:
    """Open the images of a dataset's source.

    Raises:
        UserError: they are missing, damaged, or cannot be read or downloaded.
    """
    return OPENERS[dataset.source.partition(":")[0]](dataset)
