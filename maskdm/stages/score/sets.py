"""A set of images, wherever it comes from: files, an array, a prepared dataset or a model."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.config import ComputeConfig, DatasetConfig
from maskdm.data.arrays import MANIFEST, ImageArrays, Images, ShardWriter
from maskdm.data.bulk_decoding import any_number_of_pixels, decode_all
from maskdm.data.collection import Collection, Numbers
from maskdm.data.decoding import FORMATS, BadImageError, decode, is_grey
from maskdm.data.opening import open_collection
from maskdm.data.stored_images import StoredImages
from maskdm.scoring.classifier import Pixels
from maskdm.scoring.protocol import flip_text, images_of, shaping_of
from maskdm.stages.score.drawn import draw, is_model, weights_file

SHARD_IMAGES = 8192
MOST_BYTES = 2**30  # of the first file
ORIENTATION, TURNED = 0x0112, 5  # an EXIF tag, and its values from which on width and height are exchanged


@dataclass(frozen=True)
class Wanted:
    """What to make of files and models.

    Attributes:
        image_size: side of the square images in pixels; None: the files must all have one size.
        channels: 1 or 3; None: as the other set; of files alone 1 where all are grey, else 3.
        num_samples: that are drawn from a model.
        seed: of what is drawn.
        machine: device and threads.
    """

    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    crop: Literal["none", "center"] = "none"
    resize_filter: Literal["lanczos", "bicubic"] = "lanczos"
    num_samples: int | None = None
    seed: int = 0
    machine: ComputeConfig = field(default_factory=partial(ComputeConfig, device="auto", precision="auto"))


@dataclass(frozen=True)
class ImageSet:
    """Images, and what they are.

    Attributes:
        name: as it was given.
        pixels: uint8 (N, H, W, C).
        sha256: of them.
        about: how they came about, for the protocol.
        drawn: how they were drawn from a model; else where they are from, and how they were made of files.
        labels: (N,) int64, or None.
        num_classes: 0 without labels.
        weights_sha256: of the file of the model that they were drawn from.
        flip: the probability of a left-right flip in that model's training; None where it is not known.
    """

    name: str
    pixels: Pixels
    sha256: str
    about: dict[str, Any]
    drawn: dict[str, Any]
    labels: np.ndarray | None = None
    num_classes: int = 0
    weights_sha256: str | None = None
    flip: float | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    @property
    def text(self) -> str:
        """For people."""
        height, width, channels = self.shape
        weights = "" if self.weights_sha256 is None else f", drawn from weights of sha256 {self.weights_sha256[:12]}"
        weights += "" if self.flip is None else f", trained {flip_text(self.flip)}"
        return f"{self.name}: {len(self):,} images, {height}×{width} {'grey' if channels == 1 else 'RGB'}{weights}"


def is_files(place: Path) -> bool:
    """Whether a path is a folder or an archive of image files."""
    if place.is_dir():
        return not ((place / MANIFEST).is_file() or is_model(place))
    return place.suffix not in (".npy", ".safetensors")


def open_set(place: Path, wanted: Wanted, scratch: Path) -> ImageSet:
    """Open a set of images.

    Args:
        place: files, a .npy array, a prepared dataset or a model.
        wanted: what to make of it.
        scratch: an existing, empty folder, which must stay: decoded files lie there.

    Raises:
        UserError: it is not there, damaged, or no images.
    """
    if not place.exists():
        raise UserError(f"there is no {place} (looked for {place.absolute()})")
    if is_files(place):
        return _decoded(place, wanted, scratch)
    if place.suffix == ".npy":
        return _array(place)
    if is_model(place):
        return _drawn(place, wanted)
    return _prepared(place)


def _prepared(place: Path) -> ImageSet:
    arrays = ImageArrays.open(place)
    arrays.verify()
    return _stored(place, arrays, images_of(arrays.manifest))


def _stored(place: Path, arrays: ImageArrays, about: dict[str, Any]) -> ImageSet:
    pixels = StoredImages([arrays])
    drawn = {"from": str(place), **shaping_of(about)}
    return ImageSet(str(place), pixels, pixels.sha256, about, drawn, arrays.labels, arrays.num_classes)


def _array(place: Path) -> ImageSet:
    try:
        images: np.ndarray = np.lib.format.open_memmap(place, mode="r")
    except Exception as error:  # what NumPy raises for a header of nonsense may be almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place} can't be read as a .npy array ({reason})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0:
        raise UserError(f"{place} holds {images.dtype} {images.shape}; expected images, uint8 (N, H, W, 1 or 3)")
    origin = {"from": str(place)}
    return ImageSet(str(place), images, file_sha256(place), origin, origin)


def _drawn(place: Path, wanted: Wanted) -> ImageSet:
    if wanted.num_samples is None:
        raise UserError(f"{place} is a model: say with --num-samples how many images to draw from it")
    images, drawn, flip = draw(place, wanted.num_samples, wanted.seed, wanted.machine)
    weights = file_sha256(weights_file(place))
    about = {"from": str(place), "seed": wanted.seed, "weights_sha256": weights, **drawn}
    sha256 = hashlib.sha256(images.tobytes()).hexdigest()
    return ImageSet(str(place), images, sha256, about, drawn, weights_sha256=weights, flip=flip)


def _decoded(place: Path, wanted: Wanted, scratch: Path) -> ImageSet:
    """Files as a dataset of their own in `scratch`: they need not fit into memory."""
    dataset = _dataset(place, wanted)
    with any_number_of_pixels(), open_collection(dataset) as collection:
        if wanted.image_size is None:
            collection = _OfOneSize(collection, dataset)
            dataset = collection.dataset
        numbers = np.arange(len(collection))
        with closing(ShardWriter(scratch, dataset.shape, SHARD_IMAGES)) as writer:
            for number, image in decode_all(collection, numbers, dataset, wanted.machine.threads, scratch):
                assert not isinstance(image, BadImageError), "bad images are an error"
                writer.add(image, None if collection.labels is None else int(collection.labels[number]))
            writer.finish(collection.class_names, {"from": str(place)}, _shaping(dataset, wanted), [])
    arrays = ImageArrays.open(scratch)
    return _stored(place, arrays, images_of(arrays.manifest))


def _dataset(place: Path, wanted: Wanted) -> DatasetConfig:
    return DatasetConfig(
        source="image_folder",
        root=str(place),
        image_size=1 if wanted.image_size is None else wanted.image_size,
        channels=wanted.channels or (1 if _are_grey(place, wanted) else 3),
        crop="none" if wanted.image_size is None else wanted.crop,
        resize_filter=wanted.resize_filter,
    )


def _are_grey(place: Path, wanted: Wanted) -> bool:
    """Whether all files are grey, as their headers say; the first in colour ends the search."""
    dataset = _dataset(place, replace(wanted, channels=3))
    with any_number_of_pixels(), open_collection(dataset) as collection:
        numbers = np.arange(len(collection))
        order = collection.reading_order(numbers)
        return all(_is_grey(collection, int(number), dataset) for number in (numbers if order is None else order))


def _is_grey(collection: Collection, number: int, dataset: DatasetConfig) -> bool:
    try:
        return is_grey(_file(collection, number, MOST_BYTES), dataset.max_pixels)
    except BadImageError:
        return True  # decoding will tell


def _shaping(dataset: DatasetConfig, wanted: Wanted) -> dict[str, Any]:
    """What was made of the files; of equal sizes nothing but the channels."""
    keys = (
        {"channels", "image_size"} if wanted.image_size is None else {"channels", "image_size", "crop", "resize_filter"}
    )
    return dataset.model_dump(mode="json", include=keys)


class _OfOneSize(Collection):
    """The files of a collection, each refused that has another size than the first.

    Args:
        inner: the collection.
        dataset: what to make of its files; their size is found here.

    Attributes:
        dataset: the same with the size of the first file.

    Raises:
        UserError: the first can't be read.
    """

    def __init__(self, inner: Collection, dataset: DatasetConfig) -> None:
        super().__init__(inner.origin, inner.root, inner.class_names, inner.labels)
        self._inner = inner
        try:
            content = _file(inner, 0, MOST_BYTES)
            decode(content, dataset)  # what it refuses is refused before the header is looked at
            self._size = _upright_size(content)
        except BadImageError as error:
            raise UserError(f"bad image {inner.where(0)}: {error}") from None
        self.dataset = dataset.model_copy(update={"image_size": list(self._size)})

    def __len__(self) -> int:
        return len(self._inner)

    def name(self, number: int) -> str:
        """As the base class says."""
        return self._inner.name(number)

    def where(self, number: int) -> str:
        """As the base class says."""
        return self._inner.where(number)

    def load(self, number: int, most_bytes: int) -> Images:
        """An image's pixels.

        Raises:
            BadImageError: it can't be decoded.
            UserError: it is of another size.
        """
        content = _file(self._inner, number, most_bytes)
        pixels = decode(content, self.dataset)
        if (size := _upright_size(content)) != self._size:
            (height, width), (first_height, first_width) = size, self._size
            raise UserError(
                f"{self.where(number)} is {height}×{width} pixels, {self.where(0)} is {first_height}×{first_width}: "
                "say with --image-size N (and --crop, --resize-filter) which size to make of them"
            )
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels

    def reading_order(self, numbers: Numbers) -> Numbers | None:
        """As the base class says."""
        return self._inner.reading_order(numbers)


def _file(collection: Collection, number: int, most_bytes: int) -> bytes:
    content = collection.load(number, most_bytes)
    assert isinstance(content, bytes), "an image folder holds files"
    return content


def _upright_size(content: bytes) -> tuple[int, int]:
    """Height and width of an image that can be decoded, turned by its EXIF orientation."""
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        is_turned = image.getexif().get(ORIENTATION, 1) >= TURNED
    return (width, height) if is_turned else (height, width)


@contextmanager
def open_pair(a: Path, b: Path, wanted: Wanted, scratch: Path) -> Iterator[tuple[ImageSet, ImageSet]]:
    """Two sets of images of the same shape.

    Args:
        a: the one.
        b: the other.
        wanted: what to make of files and models; where it names no channels, files get those of the other set, and
            two sets of files one channel if all are grey.
        scratch: an existing, empty folder.

    Raises:
        UserError: one can't be opened, or their shapes differ.
    """
    found: dict[str, ImageSet] = {}
    channels = wanted.channels or _channels_of_files(a, b, wanted)
    for name, place in sorted({"a": a, "b": b}.items(), key=lambda item: is_files(item[1])):
        folder = scratch / name
        folder.mkdir()
        found[name] = open_set(place, _with_channels(wanted, channels), folder)
        channels = found[name].shape[2]
    one, other = found["a"], found["b"]
    if one.shape != other.shape:
        raise UserError(
            f"A and B must be images of one size and kind, and {one.text}, but {other.text}: for folders and archives "
            "--image-size N and --channels 1 or 3 say what to make of them"
        )
    yield one, other


def _channels_of_files(a: Path, b: Path, wanted: Wanted) -> int | None:
    """The channels to read two sets of files with, told to the user; None where one is something else."""
    if not all(place.exists() and is_files(place) for place in (a, b)):
        return None
    grey = [place for place in (a, b) if _are_grey(place, wanted)]
    if len(grey) == 2:
        said = "the images of A and B are grey: read with one channel (--channels 3 reads them as RGB)"
        print(said, file=sys.stderr)
    elif grey:
        other = b if grey == [a] else a
        said = f"the images of {grey[0]} are grey, not all of {other} are: both are read as RGB"
        print(f"{said} (--channels 1 reads both as grey)", file=sys.stderr)
    return 1 if len(grey) == 2 else 3


def _with_channels(wanted: Wanted, channels: int | None) -> Wanted:
    return wanted if channels is None else replace(wanted, channels=3 if channels == 3 else 1)
