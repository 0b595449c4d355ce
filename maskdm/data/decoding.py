"""One image file, of whatever format, as an array of the dataset's size and channels."""

from __future__ import annotations

import re
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maskdm.base.printable import printable
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")  # Pillow's names for the suffixes we read
EXIF_BYTES = 2**22  # an image's metadata: 64 kB in most formats, and a decoder makes thirty times as much of it
JPEG_EXIF = re.compile(rb"\xff\xe1..Exif\0\0", re.DOTALL)
JPEG_EXIF_SEGMENTS = EXIF_BYTES // 2**16
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


class BadImageError(Exception):
    """A file that should be an image but is none, or a damaged one; the message is the reason."""


def decode(content: bytes, dataset: DatasetConfig) -> Images:
    """An image file as (height, width, channels) uint8.

    The first frame is taken, turned upright by its EXIF orientation; an embedded colour profile is ignored.
    Transparent images are laid over white: it is what they are mostly drawn for and shown on, while dropping
    alpha would uncover whatever colour the transparent pixels happen to hold. 16-bit grey is scaled to 8.

    Raises:
        BadImageError: it can't be decoded, has no 8- or 16-bit values, or more than `max_pixels` pixels.
        MemoryError: there is too little memory for its pixels: up to 16 bytes of each.
    """
    _check_content(content, dataset.max_pixels)
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            image: Image.Image = file
            _check_pixels(*image.size, dataset.max_pixels)  # from the header: nothing is decoded yet
            image.load()
            _check_exif(len(image.info.get("exif", b"")))
            ImageOps.exif_transpose(image, in_place=True)
            return fit(_over_white(_to_8_bits(image)), dataset)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image of a known format, or its header is damaged") from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise BadImageError(printable(str(error)) or type(error).__name__) from error


def is_grey(content: bytes, max_pixels: int) -> bool:
    """Whether an image file holds grey values, with or without transparency, as its header says; nothing is decoded.

    Raises:
        BadImageError: its header is damaged, or is one of WebP and says more than `max_pixels` pixels.
    """
    _check_content(content, max_pixels)
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            return file.mode in ("1", "L", "LA") or file.mode.startswith("I")
    except MemoryError:
        raise
    except Exception as error:  # as in `decode`
        raise BadImageError(printable(str(error)) or type(error).__name__) from error


def fit(image: Image.Image, dataset: DatasetConfig) -> Images:
    """An opaque 8-bit image as (height, width, channels) uint8: converted, cropped, resized.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B; RGB of a grey image repeats it.
    """
    image = image.convert("L" if dataset.channels == 1 else "RGB")
    if dataset.crop != "none":
        left, top, width, height = _kept_box(image, dataset)
        image = image.crop((left, top, left + width, top + height))
    size = (dataset.width, dataset.height)
    if image.size != size:
        image = image.resize(size, FILTERS[dataset.resize_filter])
    return np.array(image, dtype=np.uint8).reshape(dataset.shape)


def _kept_box(image: Image.Image, dataset: DatasetConfig) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is kept: the box, or the largest centred one of the dataset's aspect."""
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


def _check_content(content: bytes, max_pixels: int) -> None:
    """Refuse what a decoder makes much of before it tells the image's size."""
    if not content:
        raise BadImageError("the file is empty")
    if content[:2] == b"\xff\xd8" and (segments := len(JPEG_EXIF.findall(content))) > JPEG_EXIF_SEGMENTS:
        raise BadImageError(f"{segments} segments of EXIF metadata; expected at most {JPEG_EXIF_SEGMENTS}")
    if content[:4] == b"RIFF" and content[8:16] == b"WEBPVP8X":  # its decoder begins with two canvases
        width, height = (1 + int.from_bytes(content[start : start + 3], "little") for start in (24, 27))
        _check_pixels(width, height, max_pixels)


def _check_exif(size: int) -> None:
    if size > EXIF_BYTES:
        raise BadImageError(f"{size} bytes of EXIF metadata; expected at most {EXIF_BYTES}")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"{width}×{height} pixels are more than dataset.max_pixels {max_pixels}")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as 8; Pillow's own conversion would clip it to white."""
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


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white
