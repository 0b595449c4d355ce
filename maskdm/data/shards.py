"""The shards of a dataset as independent pieces of work: any of them may be made ahead, in any process.

A shard is made of a range of the selected images, whatever else is made where and when: bytes depend on the images
and on params.yaml alone. An image that is left out makes its shard smaller and moves no other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from maskdm.checksums import checked, file_sha256, values_sha256, with_checksum
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Labels, ShardFile, shard_name
from maskdm.data.bulk_decoding import Decoded, any_number_of_pixels, decode_all
from maskdm.data.collection import Collection, Numbers
from maskdm.data.decoding import BadImageError
from maskdm.printable import printable
from maskdm.publishing import replace_file

SHAPING = {"crop", "crop_box", "resize_filter", "channels", "image_size", "on_bad_image", "max_pixels"}


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


class Made(BaseModel):
    """What a finished shard holds.

    Attributes:
        stamp: of all that it was made from; empty where it is not kept.
        count: of its images.
        sha256: of the array file.
        labels: of its images; empty without classes.
        skipped: the bad images left out, as {"file", "reason"}.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stamp: str
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
        version: of the code: a kept shard of another is not taken.
    """

    collection: Collection
    labels: Labels | None
    dataset: DatasetConfig
    threads: int
    version: int

    def make(self, shards: Sequence[Shard], folder: Path, *, is_kept: bool) -> Iterator[tuple[Shard, Made]]:
        """Make shards in `folder`, one after the other, each whole before the next is begun.

        Args:
            shards: to make.
            folder: of all datasets.
            is_kept: whether each is written down, for `find` of another process.

        Raises:
            UserError: an image is bad and `on_bad_image` is `error`, or can't be read; or the place can't be written.
        """
        if not shards:
            return
        (folder / shards[0].place).mkdir(parents=True, exist_ok=True)
        numbers = np.concatenate([shard.images for shard in shards])
        decoded = decode_all(self.collection, numbers, self.dataset, self.threads, folder)
        with any_number_of_pixels(), closing(decoded):
            for shard in shards:
                (folder / shard.place).mkdir(parents=True, exist_ok=True)
                write = self._write_kept if is_kept else self._write
                yield shard, write(shard, folder / shard.file, islice(decoded, len(shard.images)))

    def find(self, shard: Shard, folder: Path) -> Made | None:
        """What another process has made of the same images in the same way; None where it is not there or not whole."""
        path = folder / shard.file
        try:
            made = Made.model_validate(checked(json.loads(_note(path).read_bytes())))
            is_this = made.stamp == self._stamp(shard) and (made.count == 0 or file_sha256(path) == made.sha256)
        except (OSError, ValueError, ValidationError, RecursionError):
            return None
        return made if is_this else None

    def _write_kept(self, shard: Shard, path: Path, decoded: Iterator[Decoded]) -> Made:
        _note(path).unlink(missing_ok=True)
        stamp = self._stamp(shard)  # before it is read: what changes meanwhile makes it stale
        with replace_file(path) as building:
            made = self._write(shard, building, decoded).model_copy(update={"stamp": stamp})
        with replace_file(_note(path)) as building:
            building.write_text(json.dumps(with_checksum(made.model_dump())), encoding="utf-8")
        return made

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
            return Made(stamp="", count=file.count, sha256=file_sha256(path), labels=labels, skipped=skipped)

    def _stamp(self, shard: Shard) -> str:
        """Of all that a shard's bytes depend on."""
        labels = None if self.labels is None else self.labels[shard.images].tolist()
        how = self.dataset.model_dump(mode="json", include=SHAPING)
        return values_sha256([self.version, how, PIL.__version__, labels, self.collection.stamp(shard.images)])


def split_into_shards(place: Path, images: Numbers, shard_images: int) -> list[Shard]:
    """The shards of a dataset."""
    starts = range(0, len(images), shard_images)
    return [Shard(place, number, images[start : start + shard_images]) for number, start in enumerate(starts)]


def _note(path: Path) -> Path:
    """What is written down of a kept shard."""
    return path.with_suffix(".json")
