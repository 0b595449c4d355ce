"""A set of images, from files, an array, a prepared dataset or a model."""

from __future__ import annotations

import hashlib
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.config import ComputeConfig, DatasetConfig
from maskdm.data.arrays import MANIFEST, ImageArrays, ShardWriter, StoredImages
from maskdm.data.collection import Collection
from maskdm.data.decoding import FORMATS, BadImageError, any_number_of_pixels, decode_all, is_grey
from maskdm.data.opening import open_collection
from maskdm.models.loading import is_model, open_model
from maskdm.scoring.classifier import Pixels
from maskdm.scoring.protocol import drawn_as, flip_text, images_of, shaping_of

SHARD_IMAGES = 8192
ORIENTATION, ROTATED = 0x0112, 5  # an EXIF tag; from this value on, width and height are exchanged


@dataclass(frozen=True)
class Reading:
    """How to turn files and models into images.

    Attributes:
        image_size: side of the square images in pixels; None: all files must have the same size.
        channels: 1 or 3; None: those of the other set, or for files 1 if all are grey and else 3.
        crop: of files, before they are resized.
        resize_filter: of files.
        num_samples: how many images to draw from a model.
        seed: of the images drawn.
        machine: device and threads.
    """

    image_size: int | None = None
    channels: int | None = None
    crop: str = "none"
    resize_filter: str = "lanczos"
    num_samples: int | None = None
    seed: int = 0
    machine: ComputeConfig = field(default_factory=partial(ComputeConfig, device="auto", precision="auto"))


@dataclass(frozen=True)
class ImageSet:
    """Images with their origin.

    Attributes:
        name: the path as the user gave it.
        pixels: uint8 (N, H, W, C).
        sha256: of the pixels.
        about: their origin, for the protocol of a set of real images.
        drawn: their origin, for the protocol of a set of generated images.
        labels: (N,) int64, or None.
        num_classes: 0 without labels.
        weights_sha256: of the model's file, if they were drawn from a model.
        flip: the probability of a left-right flip in that model's training; None if unknown.
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
        """Name, number, size, and what is known of the model, for the user."""
        height, width, channels = self.shape
        weights = "" if self.weights_sha256 is None else f", drawn from weights of sha256 {self.weights_sha256[:12]}"
        weights += "" if self.flip is None else f", trained {flip_text(self.flip)}"
        return f"{self.name}: {len(self):,} images, {height}×{width} {'grey' if channels == 1 else 'RGB'}{weights}"


def is_files(place: Path) -> bool:
    """Whether a path is a folder or an archive of image files."""
    if place.is_dir():
        return not ((place / MANIFEST).is_file() or is_model(place))
    return place.suffix not in (".npy", ".safetensors")


def open_pair(a: Path, b: Path, reading: Reading, scratch: Path) -> tuple[ImageSet, ImageSet]:
    """Open two sets of images of the same shape.

    Args:
        a: path of the first set.
        b: path of the second set.
        reading: if it gives no channels, files are read with those of the other set; two sets of files with one
            channel if all are grey, which is printed.
        scratch: an existing, empty folder, needed as long as the sets.

    Raises:
        UserError: a set can't be opened, or the shapes differ.
    """
    if reading.channels is None and all(place.exists() and is_files(place) for place in (a, b)):
        grey = [place for place in (a, b) if _are_grey(place)]
        note = "the images of A and B are grey: read with one channel (--channels 3 reads them as RGB)"
        if len(grey) == 1:
            note = f"the images of {grey[0]} are grey, not all of {b if grey == [a] else a} are: both are read as RGB"
            note += " (--channels 1 reads both as grey)"
        if grey:
            print(note, file=sys.stderr)
        reading = replace(reading, channels=1 if len(grey) == 2 else 3)
    opened: dict[Path, ImageSet] = {}
    for number, place in enumerate(sorted((a, b), key=is_files)):
        (folder := scratch / str(number)).mkdir()
        opened[place] = open_set(place, reading, folder)
        reading = replace(reading, channels=opened[place].shape[2])
    first, second = opened[a], opened[b]
    if first.shape != second.shape:
        raise UserError(
            f"A and B must be images of one size and kind, and {first.text}, but {second.text}: for folders and "
            "archives --image-size N and --channels 1 or 3 say what to make of them"
        )
    return first, second


def open_set(place: Path, reading: Reading, scratch: Path) -> ImageSet:
    """Open a set of images.

    Args:
        place: a folder or archive of image files, a .npy array, a prepared dataset or a model.
        reading: how to turn files and models into images.
        scratch: an existing, empty folder for decoded files, needed as long as the set.

    Raises:
        UserError: it does not exist, is damaged, or holds no images.
    """
    if not place.exists():
        raise UserError(f"there is no {place} (looked for {place.absolute()})")
    if place.suffix == ".npy":
        return _array(place)
    if is_model(place):
        return _drawn(place, reading)
    if is_files(place):
        _decode(place, reading, scratch)
    arrays = ImageArrays.open(scratch if is_files(place) else place)
    arrays.verify()
    pixels, about = StoredImages([arrays]), images_of(arrays.manifest)
    drawn = {"from": str(place), **shaping_of(about)}
    return ImageSet(str(place), pixels, pixels.sha256, about, drawn, arrays.labels, arrays.num_classes)


def _array(place: Path) -> ImageSet:
    try:
        images: np.ndarray = np.lib.format.open_memmap(place, mode="r")
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place} can't be read as a .npy array ({reason})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0:
        raise UserError(f"{place} holds {images.dtype} {images.shape}; expected images, uint8 (N, H, W, 1 or 3)")
    origin = {"from": str(place)}
    return ImageSet(str(place), images, file_sha256(place), origin, origin)


def _drawn(place: Path, reading: Reading) -> ImageSet:
    if reading.num_samples is None:
        raise UserError(f"{place} is a model: --num-samples N says how many images to draw from it")
    model = open_model(place, reading.machine.device, reading.machine.threads)
    images = model.draw(reading.num_samples, reading.seed)
    drawn = {**drawn_as(model.params.sampling), "weights": {"ema": "EMA", "raw": "raw"}[model.which]}
    weights, sha256 = file_sha256(model.file), hashlib.sha256(images.tobytes()).hexdigest()
    about = {"from": str(place), "seed": reading.seed, "weights_sha256": weights, **drawn}
    return ImageSet(str(place), images, sha256, about, drawn, weights_sha256=weights, flip=model.flip)


def _decode(place: Path, reading: Reading, scratch: Path) -> None:
    """Write files as a prepared dataset, because they need not fit into memory."""
    channels = reading.channels or (1 if _are_grey(place) else 3)
    dataset = _dataset(place, channels=channels, crop=reading.crop, resize_filter=reading.resize_filter)
    about = {"channels", "image_size", "crop", "resize_filter"}
    with any_number_of_pixels(), open_collection(dataset) as collection:
        size: int | list[int] | None = reading.image_size
        if size is None:
            collection, first = _of_one_size(collection)
            size, about = list(first or (1, 1)), {"channels", "image_size"}
        dataset = dataset.model_copy(update={"image_size": size})
        with closing(ShardWriter(scratch, dataset.shape, SHARD_IMAGES)) as writer:
            numbers = np.arange(len(collection))
            for number, image in decode_all(collection, numbers, dataset, reading.machine.threads):
                assert not isinstance(image, BadImageError), "dataset.on_bad_image is error"
                writer.add(image, None if collection.labels is None else int(collection.labels[number]))
            made = dataset.model_dump(mode="json", include=about)
            writer.finish(collection.class_names, {"from": str(place)}, made, [])


def _dataset(place: Path, **how: Any) -> DatasetConfig:
    return DatasetConfig(source="image_folder", root=str(place), image_size=1, **{"channels": 3, **how})


def _are_grey(place: Path) -> bool:
    """Whether all files are grey by their headers; the first one in colour ends the search."""
    dataset = _dataset(place)
    with any_number_of_pixels(), open_collection(dataset) as collection:
        for number in range(len(collection)):
            with suppress(BadImageError):  # reported when it is decoded
                if not is_grey(_file(collection, number), dataset.max_pixels):
                    return False
    return True


def _file(collection: Collection, number: int) -> bytes:
    content = collection.load(number)
    assert isinstance(content, bytes), "an image folder holds files"
    return content


def _of_one_size(collection: Collection) -> tuple[Collection, tuple[int, int] | None]:
    """The collection, refusing files of another size than its first, and that size; None if the first is damaged."""
    first = _upright_size(_file(collection, 0))

    def load(number: int) -> bytes:
        content = _file(collection, number)
        size = _upright_size(content)
        if size and first and size != first:
            (height, width), (first_height, first_width) = size, first
            raise UserError(
                f"{collection.where(number)} is {height}×{width} pixels, {collection.where(0)} is "
                f"{first_height}×{first_width}: say with --image-size N (and --crop, --resize-filter) which size to "
                "make of them"
            )
        return content

    return replace(collection, load=load), first


def _upright_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of an image, rotated by its EXIF orientation; None if damaged: reported when decoded."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            is_rotated = image.getexif().get(ORIENTATION, 1) >= ROTATED
    except Exception:  # damaged files make Pillow raise almost anything
        return None
    return (width, height) if is_rotated else (height, width)
