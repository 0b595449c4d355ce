"""A set of images, wherever it comes from: files, an array, a prepared dataset or a model."""

from __future__ import annotations

import hashlib
import sys
from contextlib import closing, suppress
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
from maskdm.data.arrays import MANIFEST, ImageArrays, ShardWriter, StoredImages
from maskdm.data.collection import Collection
from maskdm.data.decoding import FORMATS, BadImageError, any_number_of_pixels, decode_all, is_grey
from maskdm.data.opening import open_collection
from maskdm.models.loading import is_model, open_model
from maskdm.scoring.classifier import Pixels
from maskdm.scoring.protocol import drawn_as, flip_text, images_of, shaping_of

SHARD_IMAGES = 8192
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


def open_pair(a: Path, b: Path, wanted: Wanted, scratch: Path) -> tuple[ImageSet, ImageSet]:
    """Two sets of images of the same shape.

    Args:
        a: the one.
        b: the other.
        wanted: what to make of files and models; where it names no channels, files get those of the other set, and
            two sets of files one channel if all are grey, which is told.
        scratch: an existing, empty folder, which must stay.

    Raises:
        UserError: one can't be opened, or their shapes differ.
    """
    if wanted.channels is None and all(place.exists() and is_files(place) for place in (a, b)):
        grey = [place for place in (a, b) if _are_grey(place)]
        if len(grey) == 2:
            said = "the images of A and B are grey: read with one channel (--channels 3 reads them as RGB)"
            print(said, file=sys.stderr)
        elif grey:
            other = b if grey == [a] else a
            said = f"the images of {grey[0]} are grey, not all of {other} are: both are read as RGB"
            print(f"{said} (--channels 1 reads both as grey)", file=sys.stderr)
        wanted = replace(wanted, channels=1 if len(grey) == 2 else 3)
    found: dict[str, ImageSet] = {}
    for name, place in sorted({"a": a, "b": b}.items(), key=lambda item: is_files(item[1])):
        (folder := scratch / name).mkdir()
        found[name] = open_set(place, wanted, folder)
        wanted = replace(wanted, channels=3 if found[name].shape[2] == 3 else 1)
    one, other_set = found["a"], found["b"]
    if one.shape != other_set.shape:
        raise UserError(
            f"A and B must be images of one size and kind, and {one.text}, but {other_set.text}: for folders and "
            "archives --image-size N and --channels 1 or 3 say what to make of them"
        )
    return one, other_set


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
    if place.suffix == ".npy":
        return _array(place)
    if is_model(place):
        return _drawn(place, wanted)
    if is_files(place):
        _decode(place, wanted, scratch)
    arrays = ImageArrays.open(scratch if is_files(place) else place)
    arrays.verify()
    pixels, about = StoredImages([arrays]), images_of(arrays.manifest)
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
    model = open_model(place, wanted.machine.device, wanted.machine.threads)
    images = model.draw(wanted.num_samples, wanted.seed)
    drawn = {**drawn_as(model.params.sampling), "weights": {"ema": "EMA", "raw": "raw"}[model.which]}
    weights, sha256 = file_sha256(model.file), hashlib.sha256(images.tobytes()).hexdigest()
    about = {"from": str(place), "seed": wanted.seed, "weights_sha256": weights, **drawn}
    return ImageSet(str(place), images, sha256, about, drawn, weights_sha256=weights, flip=model.flip)


def _decode(place: Path, wanted: Wanted, scratch: Path) -> None:
    """Write files as a dataset of their own: they need not fit into memory."""
    channels: Literal[1, 3] = wanted.channels or (1 if _are_grey(place) else 3)
    dataset = _dataset(place, channels, crop=wanted.crop, resize_filter=wanted.resize_filter)
    about = {"channels", "image_size", "crop", "resize_filter"}
    with any_number_of_pixels(), open_collection(dataset) as collection:
        size: int | list[int] | None = wanted.image_size
        if size is None:
            collection, first = _of_one_size(collection)
            size, about = list(first or (1, 1)), {"channels", "image_size"}
        dataset = dataset.model_copy(update={"image_size": size})
        with closing(ShardWriter(scratch, dataset.shape, SHARD_IMAGES)) as writer:
            numbers = np.arange(len(collection))
            for number, image in decode_all(collection, numbers, dataset, wanted.machine.threads):
                assert not isinstance(image, BadImageError), "bad images are an error"
                writer.add(image, None if collection.labels is None else int(collection.labels[number]))
            made = dataset.model_dump(mode="json", include=about)
            writer.finish(collection.class_names, {"from": str(place)}, made, [])


def _dataset(place: Path, channels: Literal[1, 3] = 3, **how: Any) -> DatasetConfig:
    return DatasetConfig(source="image_folder", root=str(place), image_size=1, channels=channels, **how)


def _are_grey(place: Path) -> bool:
    """Whether all files are grey, as their headers say; the first in colour ends the search."""
    dataset = _dataset(place)
    with any_number_of_pixels(), open_collection(dataset) as collection:
        for number in range(len(collection)):
            with suppress(BadImageError):  # decoding will tell
                if not is_grey(_file(collection, number), dataset.max_pixels):
                    return False
    return True


def _file(collection: Collection, number: int) -> bytes:
    content = collection.load(number)
    assert isinstance(content, bytes), "an image folder holds files"
    return content


def _of_one_size(collection: Collection) -> tuple[Collection, tuple[int, int] | None]:
    """A collection that refuses files of another size than its first; that size, None if the first is damaged."""
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
    """Height and width of an image turned by its EXIF orientation; None of a damaged one: decoding will tell."""
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            is_turned = image.getexif().get(ORIENTATION, 1) >= TURNED
    except Exception:  # damaged files make Pillow raise almost anything
        return None
    return (width, height) if is_turned else (height, width)
