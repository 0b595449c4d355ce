"""The common interface of all sources: images by number, with names and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskdm.base.errors import UserError, printable
from maskdm.data.arrays import Images, Labels

Numbers = NDArray[np.int64]  # of images in their source


@dataclass(frozen=True)
class Collection:
    """The images of a source, in its order.

    Attributes:
        origin: where the images come from, for messages.
        num_images: N.
        load: returns an image's file, or its pixels (h, w) or (h, w, 3), by its number in [0, N). It is called from one
            thread at a time. It raises `BadImageError` if the image is damaged, and `UserError` if it cannot be read.
        name: returns the name by which manifest and messages call an image.
        root: the folder of the source's files; None if there are none.
        class_names: names of the classes in the order of the labels; None without classes.
        labels: (N,) int64 in [0, number of classes), or None.
        are_paths: whether names are paths below the folder `origin`.
        left_out: a sentence on the files that are not taken for images; empty if there are none.
    """

    origin: str
    num_images: int
    load: Callable[[int], bytes | Images]
    name: Callable[[int], str] = "image {}".format
    root: str | None = None
    class_names: tuple[str, ...] | None = None
    labels: Labels | None = None
    are_paths: bool = False
    left_out: str = ""

    def __len__(self) -> int:
        return self.num_images

    def where(self, number: int) -> str:
        """The name and place of an image, for messages."""
        name = self.name(number)
        return printable(str(Path(self.origin) / name)) if self.are_paths else f"{printable(name)} in {self.origin}"


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn an OSError in the block into a message that says what cannot be read, and why.

    Raises:
        UserError: something cannot be read.
    """
    try:
        yield
    except OSError as error:
        place = where if error.filename is None else printable(str(error.filename))
        raise UserError(f"cannot read {place}: {printable(error.strerror or str(error))}") from error
