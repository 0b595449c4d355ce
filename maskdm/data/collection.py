"""The images of a dataset's source, by number: where each is read, and which class it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from maskdm.data.arrays import Images, Labels
from maskdm.data.decoding import BadImageError
from maskdm.data.sources import Source, reading

Numbers = NDArray[np.int64]  # of images in their source


class Collection(ABC):
    """The images of a source, in its order.

    Attributes:
        origin: what it is, for messages.
        root: where its files lie; None where there are none.
        class_names: in the order of the labels; None without classes.
        labels: (N,) int64 in [0, number of classes), or None.
    """

    def __init__(self, origin: str, root: str | None, class_names: tuple[str, ...] | None, labels: Labels | None):
        assert (class_names is None) == (labels is None), "classes and labels come together"
        self.origin, self.root, self.class_names, self.labels = origin, root, class_names, labels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, number: int) -> str:
        """An image, as the manifest names it."""

    @abstractmethod
    def load(self, number: int, most_bytes: int) -> bytes | Images:
        """An image's file, or its pixels (h, w) or (h, w, 3).

        Args:
            number: of the image.
            most_bytes: that a file may have.

        Raises:
            BadImageError: the file is larger, or damaged.
            UserError: it can't be read.
        """

    def where(self, number: int) -> str:
        """An image, for messages."""
        return f"{self.name(number)} of {self.origin}"

    def reading_order(self, numbers: Numbers) -> Numbers | None:
        """The positions in `numbers` in which images are best read; None for as they stand."""
        return None


class Pixels(Collection):
    """Images in memory.

    Args:
        origin: what they are.
        root: where they came from.
        images: (N, h, w) or (N, h, w, 3) uint8.
        class_names: or None.
        labels: or None.
    """

    def __init__(
        self, origin: str, root: str | None, images: Images, class_names: tuple[str, ...] | None, labels: Labels | None
    ) -> None:
        super().__init__(origin, root, class_names, labels)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, number: int) -> str:
        """Its number: it has no other name."""
        return f"image {number}"

    def load(self, number: int, most_bytes: int) -> Images:
        """An image's pixels (h, w) or (h, w, 3)."""
        image: Images = self._images[number]
        return image


class ImageFiles(Collection):
    """Files of a folder or an archive.

    Args:
        origin: what they are.
        source: where they lie; open as long as they are read.
        names: of the files in it.
        class_names: or None.
        labels: or None.
    """

    def __init__(
        self,
        origin: str,
        source: Source,
        names: Sequence[str],
        class_names: tuple[str, ...] | None = None,
        labels: Labels | None = None,
    ) -> None:
        super().__init__(origin, source.root, class_names, labels)
        self._source, self._names = source, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, number: int) -> str:
        """A file's path in the source."""
        return self._names[number]

    def where(self, number: int) -> str:
        """A file, for messages."""
        return self._source.where(self._names[number])

    def load(self, number: int, most_bytes: int) -> bytes:
        """A file's content.

        Raises:
            BadImageError: it is larger than that, or damaged.
            UserError: it can't be read.
        """
        name, where = self._names[number], self.where(number)
        check_size(reading(where, lambda: self._source.size(name)), most_bytes)
        return reading(where, lambda: self._source.load(name))

    def reading_order(self, numbers: Numbers) -> Numbers | None:
        """The positions in the order in which the source is best read; None for as they stand."""
        return self._source.reading_order([self._names[number] for number in numbers])


def check_size(size: int, most_bytes: int) -> None:
    """Refuse a file that no image needs: an archive may promise a small one to unpack into memory without end.

    Raises:
        BadImageError: it has more bytes.
    """
    if size > most_bytes:
        raise BadImageError(f"{size} bytes are more than the {most_bytes} that dataset.max_pixels can need")


def as_array(labels: Iterable[int]) -> Labels:
    """Labels as they are kept."""
    return np.fromiter(labels, dtype=np.int64)
