"""What every source of images gives: its images by number, and which class each is of."""

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
        origin: what it is, for messages.
        num_images: N.
        load: an image's file, or its pixels (h, w) or (h, w, 3), by its number in [0, N). One thread asks, for one
            after another. It raises `BadImageError` for an image that is damaged, `UserError` for one that can't be
            read.
        name: of an image, as the manifest has it.
        root: where its files lie; None where there are none.
        class_names: in the order of the labels; None without classes.
        labels: (N,) int64 in [0, number of classes), or None.
        are_paths: whether names are paths below a folder, which is the origin.
    """

    origin: str
    num_images: int
    load: Callable[[int], bytes | Images]
    name: Callable[[int], str] = "image {}".format
    root: str | None = None
    class_names: tuple[str, ...] | None = None
    labels: Labels | None = None
    are_paths: bool = False

    def __len__(self) -> int:
        return self.num_images

    def where(self, number: int) -> str:
        """An image, for messages."""
        name = self.name(number)
        return printable(str(Path(self.origin) / name)) if self.are_paths else f"{printable(name)} in {self.origin}"


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Say what can't be read in the block, and why.

    Raises:
        UserError: it can't be read.
    """
    try:
        yield
    except OSError as error:
        place = where if error.filename is None else printable(str(error.filename))
        raise UserError(f"cannot read {place}: {printable(error.strerror or str(error))}") from error
