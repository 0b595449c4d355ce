"""The shards of a dataset: each holds a range of its images.

A shard is made of a range of the selected images, whatever else is made where and when: bytes depend on the images
and on params.yaml alone. An image that is left out makes its shard smaller and moves no other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskdm.base.checksums import file_sha256
from maskdm.base.printable import printable
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Labels, ShardFile, shard_name
from maskdm.data.bulk_decoding import Decoded, any_number_of_pixels, decode_all
from maskdm.data.collection import Collection, Numbers
from maskdm.data.decoding import BadImageError


@dataclass(frozen=True)
class Shard:
    """A range of a dataset's images.

    Attributes:
        place: the dataset's folder, below the folder of all.
        number: of the shard in its dataset.
        images: their numbers in the source.
    """

    place: Path
    number: int
    images: Numbers

    @property
    def file(self) -> Path:
        """Where the array lies, below the folder of all datasets."""
        return self.place / shard_name(self.number)


@dataclass(frozen=True)
class Made:
    """What a finished shard holds.

    Attributes:
        count: of its images.
        sha256: of the array file.
        labels: of its images; empty without classes.
        skipped: the bad images left out, as {"file", "reason"}.
    """

    count: int
    sha256: str
    labels: list[int]
    skipped: list[dict[str, str]]


@dataclass(frozen=True)
class Maker:
    """Makes shards of one source.

    Attributes:
        collection: the source, open.
        labels: of all images of the source, or None.
        dataset: what to make of them.
        threads: decoders.
    """

    collection: Collection
    labels: Labels | None
    dataset: DatasetConfig
    threads: int

    def make(self, shards: Sequence[Shard], folder: Path) -> Iterator[tuple[Shard, Made]]:
        """Make shards in `folder`, one after the other.

        Args:
            shards: to make.
            folder: of all datasets.

        Raises:
            UserError: an image is bad and `on_bad_image` is `error`, or can't be read; or the place can't be written.
        """
        (folder / shards[0].place).mkdir(parents=True, exist_ok=True)
        numbers = np.concatenate([shard.images for shard in shards])
        decoded = decode_all(self.collection, numbers, self.dataset, self.threads, folder)
        with any_number_of_pixels(), closing(decoded):
            for shard in shards:
                (folder / shard.place).mkdir(parents=True, exist_ok=True)
                yield shard, self._write(shard, folder / shard.file, islice(decoded, len(shard.images)))

    def _write(self, shard: Shard, path: Path, decoded: Iterator[Decoded]) -> Made:
        skipped: list[dict[str, str]] = []
        labels: list[int] = []
        with closing(ShardFile(path, self.dataset.shape)) as file:
            for number, image in decoded:
                if isinstance(image, BadImageError):
                    skipped.append({"file": printable(self.collection.name(number)), "reason": str(image)})
                    tqdm.write(f"warning: skipped bad image {self.collection.where(number)}: {image}", file=sys.stderr)
                    continue
                file.add(image)
                if self.labels is not None:
                    labels.append(int(self.labels[number]))
            file.finish()
            return Made(count=file.count, sha256=file_sha256(path), labels=labels, skipped=skipped)


def split_into_shards(place: Path, images: Numbers, shard_images: int) -> list[Shard]:
    """The shards of a dataset."""
    starts = range(0, len(images), shard_images)
    return [Shard(place, number, images[start : start + shard_images]) for number, start in enumerate(starts)]
