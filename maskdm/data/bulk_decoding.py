"""Many images decoded by threads, in order, in bounded memory."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from maskdm.base.errors import UserError
from maskdm.base.progress import progress
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images
from maskdm.data.collection import Collection, Numbers
from maskdm.data.decoding import BadImageError, decode, fit

BYTES_PER_PIXEL = 8  # four channels of 16 bits: no image file needs more …
METADATA_BYTES = 2**26  # … beside its metadata
WAITING_PER_THREAD = 8  # images read ahead of the decoders …
WAITING_BYTES = 2**28  # … but of no more bytes, or one

T = TypeVar("T")
R = TypeVar("R")

Loaded = tuple[int, bytes | Images | BadImageError]
Decoded = tuple[int, Images | BadImageError]


def decode_all(
    collection: Collection, numbers: Numbers, dataset: DatasetConfig, threads: int, scratch: Path
) -> Generator[Decoded]:
    """The images of these numbers, in their order, each decoded or bad.

    Args:
        collection: which knows them.
        numbers: of the images.
        dataset: what to make of them.
        threads: decoders.
        scratch: an existing folder for a temporary file, used where images are read in another order.

    Raises:
        UserError: one can't be read; or one is bad, and `on_bad_image` is `error`.
    """
    order = collection.reading_order(numbers)
    most_bytes = dataset.max_pixels * BYTES_PER_PIXEL + METADATA_BYTES
    read = numbers if order is None else numbers[order]
    loaded = ((int(number), _load(collection, int(number), most_bytes)) for number in read)
    decoded = map_in_order(lambda item: _decoded(item, collection, dataset), loaded, threads, _bytes_of)
    shown = progress(decoded, len(numbers), "Preparing images", "images")
    checked = shown if dataset.on_bad_image == "skip" else _refuse_bad(shown, collection)
    yield from checked if order is None else _put_in_order(checked, order, dataset.shape, scratch)


@contextmanager
def any_number_of_pixels() -> Iterator[None]:
    """`dataset.max_pixels` decides instead of Pillow's own limit, which would warn below it."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], threads: int, bytes_of: Callable[[T], int] = lambda _: 0
) -> Iterator[R]:
    """`map` on threads (Pillow decodes without the GIL), holding a bounded number and size of items at a time."""
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[tuple[Future[R], int]] = deque()
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                held += (size := bytes_of(item))
                waiting.append((pool.submit(function, item), size))
                while len(waiting) == threads * WAITING_PER_THREAD or (waiting and held > WAITING_BYTES):
                    done, size = waiting.popleft()
                    yield done.result()
                    held -= size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)


def _load(collection: Collection, number: int, most_bytes: int) -> bytes | Images | BadImageError:
    try:
        return collection.load(number, most_bytes)
    except BadImageError as error:
        return error


def _bytes_of(item: Loaded) -> int:
    return 0 if isinstance(item[1], BadImageError) else len(item[1])


def _decoded(item: Loaded, collection: Collection, dataset: DatasetConfig) -> Decoded:
    number, content = item
    if isinstance(content, BadImageError):
        return number, content
    try:
        if isinstance(content, bytes):
            return number, decode(content, dataset)
        return number, fit(Image.fromarray(content), dataset)
    except BadImageError as error:
        return number, error
    except MemoryError:
        raise UserError(
            f"too little memory to decode {collection.where(number)}: lower compute.threads, or lower "
            "dataset.max_pixels and leave such images out with dataset.on_bad_image: skip"
        ) from None


def _refuse_bad(decoded: Iterable[Decoded], collection: Collection) -> Iterator[Decoded]:
    for number, image in decoded:
        if isinstance(image, BadImageError):
            raise UserError(
                f"bad image {collection.where(number)}: {image}. Repair or remove it, "
                "or leave such images out with dataset.on_bad_image: skip"
            )
        yield number, image


def _put_in_order(
    decoded: Iterable[Decoded], order: Numbers, shape: tuple[int, int, int], scratch: Path
) -> Iterator[Decoded]:
    """Decoded images in the order of their positions, through an unnamed file: they need not fit into memory."""
    bad: dict[int, BadImageError] = {}
    numbers = np.empty(len(order), dtype=np.int64)
    size = int(np.prod(shape))
    with tempfile.TemporaryFile(dir=scratch) as file:
        for position, (number, image) in zip(order.tolist(), decoded, strict=True):
            numbers[position] = number
            if isinstance(image, BadImageError):
                bad[position] = image
            else:
                file.seek(position * size)
                file.write(image.tobytes())
        for position, number in enumerate(numbers.tolist()):
            if position in bad:
                yield number, bad[position]
            else:
                file.seek(position * size)
                yield number, np.frombuffer(file.read(size), dtype=np.uint8).reshape(shape)
