"""Decode images of any format and size into arrays of the dataset's size and channels, on several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maskdm.base.errors import UserError, printable
from maskdm.base.progress import progress
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images
from maskdm.data.collection import Collection, Numbers

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")  # Pillow's names for the formats we read
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
AHEAD_PER_THREAD = 4  # images read before they are decoded

T = TypeVar("T")
R = TypeVar("R")


class BadImageError(Exception):
    """A file is not an image, or a damaged one; the message is the reason."""


Loaded = tuple[int, bytes | Images | BadImageError]  # an image's number, and what was read
Decoded = tuple[int, Images | BadImageError]


def decode_all(collection: Collection, numbers: Numbers, dataset: DatasetConfig, threads: int) -> Generator[Decoded]:
    """Yield the number and the pixels, or the error, of each requested image, in the requested order.

    Args:
        collection: the source of the images.
        numbers: the images to decode, by their number in the source.
        dataset: crop, size, channels, and what to do with bad images.
        threads: number of decoding threads.

    Raises:
        UserError: an image cannot be read; or it is bad, and `on_bad_image` is `error`.
    """
    loaded = (_load(collection, int(number)) for number in numbers)
    with any_number_of_pixels():
        decoded = map_in_order(lambda image: _decode(image, collection, dataset), loaded, threads)
        for number, image in progress(decoded, len(numbers), "Preparing images", "images"):
            if isinstance(image, BadImageError) and dataset.on_bad_image == "error":
                raise UserError(
                    f"bad image {collection.where(number)}: {image}. Repair or remove it, "
                    "or leave such images out with dataset.on_bad_image: skip"
                )
            yield number, image


def decode(content: bytes, dataset: DatasetConfig) -> Images:
    """Decode an image file to (height, width, channels) uint8.

    The first frame is used, rotated as its EXIF orientation says; embedded colour profiles are ignored. Transparent
    images are composited over white: most are made for a white background, and dropping alpha would show the arbitrary
    colours of transparent pixels. 16-bit grey is scaled to 8 bits.

    Raises:
        BadImageError: it cannot be decoded, its values do not have 8 or 16 bits, or it has more than `max_pixels`
            pixels.
        MemoryError: there is too little memory for its pixels; each takes up to 16 bytes.
    """
    with _opened(content, dataset.max_pixels) as file:
        image: Image.Image = file
        _check_pixels(*image.size, dataset.max_pixels)  # from the header: nothing is decoded yet
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image = _to_8_bits(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return fit(image, dataset)


def is_grey(content: bytes, max_pixels: int) -> bool:
    """Whether an image file holds grey values, with or without transparency; only the header is read.

    Raises:
        BadImageError: the header is damaged, or it is a WebP header of more than `max_pixels` pixels.
    """
    with _opened(content, max_pixels) as file:
        return file.mode in ("1", "L", "LA") or file.mode.startswith("I")


def fit(image: Image.Image, dataset: DatasetConfig) -> Images:
    """Convert, crop and resize an opaque 8-bit image to (height, width, channels) uint8.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B; a grey image has three equal channels in RGB.
    """
    image = image.convert("L" if dataset.channels == 1 else "RGB")
    if dataset.crop != "none":
        left, top, width, height = _kept_box(image, dataset)
        image = image.crop((left, top, left + width, top + height))
    size = (dataset.width, dataset.height)
    if image.size != size:
        image = image.resize(size, FILTERS[dataset.resize_filter])
    return np.array(image, dtype=np.uint8).reshape(dataset.shape)


@contextmanager
def any_number_of_pixels() -> Iterator[None]:
    """Disable Pillow's own size limit in the block: `dataset.max_pixels` is checked instead."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map` on several threads that reads only a few items ahead (Pillow releases the GIL while it decodes)."""
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == threads * AHEAD_PER_THREAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _load(collection: Collection, number: int) -> Loaded:
    try:
        return number, collection.load(number)
    except BadImageError as error:
        return number, error
    except MemoryError:
        raise UserError(f"too little memory to read {collection.where(number)}: remove it") from None


def _decode(loaded: Loaded, collection: Collection, dataset: DatasetConfig) -> Decoded:
    number, content = loaded
    try:
        if isinstance(content, np.ndarray):
            return number, fit(Image.fromarray(content), dataset)
        return number, decode(content, dataset) if isinstance(content, bytes) else content
    except BadImageError as error:
        return number, error
    except MemoryError:
        raise UserError(
            f"too little memory to decode {collection.where(number)}: lower compute.threads, or lower "
            "dataset.max_pixels and leave such images out with dataset.on_bad_image: skip"
        ) from None


@contextmanager
def _opened(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image file; any error of its decoder in the block becomes a `BadImageError`."""
    if not content:
        raise BadImageError("the file is empty")
    if content[:4] == b"RIFF" and content[8:16] == b"WEBPVP8X":  # opening it allocates two canvases of this size
        width, height = (1 + int.from_bytes(content[start : start + 3], "little") for start in (24, 27))
        _check_pixels(width, height, max_pixels)
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            yield file
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image of a known format, or its header is damaged") from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise BadImageError(printable(str(error)) or type(error).__name__) from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"{width}×{height} pixels are more than dataset.max_pixels {max_pixels}")


def _kept_box(image: Image.Image, dataset: DatasetConfig) -> tuple[int, int, int, int]:
    """Left, top, width and height of `crop_box`, or of the largest centred box of the dataset's aspect ratio."""
    if dataset.crop_box is None:
        width = min(image.width, max(1, image.height * dataset.width // dataset.height))
        height = min(image.height, max(1, image.width * dataset.height // dataset.width))
        return (image.width - width) // 2, (image.height - height) // 2, width, height
    top, left, side = dataset.crop_box
    if left + side > image.width or top + side > image.height:
        raise BadImageError(
            f"{image.width}×{image.height} pixels do not hold dataset.crop_box (top {top}, left {left}, side {side})"
        )
    return left, top, side, side


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it to white."""
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no fixed range; expected 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(f"values from {values.min()} to {values.max()}; expected 8 or 16 bits")
    values += 128
    values //= 257  # rounded: 65535 = 255·257
    return Image.fromarray(values.astype(np.uint8))
