"""Your own images: a folder tree, a .zip or a .tar of any sizes and formats, as one size of grey or RGB.

The same images give the same arrays whether they lie in a folder or in an archive. Archives are read in
place: nothing is extracted, so links and paths that point elsewhere have no effect.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images, LabelledImages
from maskdm.data.decoding import BadImageError, decode
from maskdm.data.sources import Source, open_source, reading
from maskdm.errors import UserError
from maskdm.printable import printable
from maskdm.progress import progress

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
BYTES_PER_PIXEL = 8  # four channels of 16 bits: no image file needs more …
METADATA_BYTES = 2**26  # … beside its metadata
WAITING_PER_THREAD = 8  # images read ahead of the decoders …
WAITING_BYTES = 2**28  # … but of no more bytes, or one

T = TypeVar("T")
R = TypeVar("R")

Decoded = tuple[str, Images | BadImageError]


@contextmanager
def open_images(dataset: DatasetConfig, threads: int, scratch: Path) -> Iterator[LabelledImages]:
    """The images under `dataset.root`, in the sorted order of their paths, with labels from class folders.

    With `limit`, the first so many files in that order, among all of the classes; bad ones count.

    Args:
        dataset: where the images are and what to make of them.
        threads: decoders.
        scratch: an existing folder for a temporary file, used for compressed archives that are not in order.

    Raises:
        UserError: root is missing, unreadable or holds no images; or, while they are read, an image is bad
            and `on_bad_image` is `error`, or all are bad.
    """
    assert dataset.root is not None, "the schema requires root for image_folder"
    skipped: list[dict[str, str]] = []
    with open_source(dataset.root) as source, _any_number_of_pixels():
        names = _image_names(source)
        class_names, labels = labels_from_folders(names)
        decoded = _decode_all(source, names[: dataset.limit], dataset, threads, scratch)
        with closing(_good_images(decoded, labels, source, skipped)) as images:
            yield LabelledImages(images, class_names and tuple(map(printable, class_names)), skipped)


def labels_from_folders(names: Sequence[str]) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Classes from the folders directly under the deepest folder that holds all images.

    There are classes when these folders are two or more and no image lies beside them.

    Args:
        names: the images' POSIX paths.

    Returns:
        the sorted class names, or None; the class of each path, or nothing.
    """
    folders = [name.split("/")[:-1] for name in names]
    first, last = min(folders), max(folders)  # what these two share, all share
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    if any(len(folder) == depth for folder in folders):
        return None, {}
    class_names = tuple(sorted({folder[depth] for folder in folders}))
    index = {name: number for number, name in enumerate(class_names)}
    return class_names, {name: index[folder[depth]] for name, folder in zip(names, folders, strict=True)}


def _image_names(source: Source) -> list[str]:
    """The sorted images of a source, by the suffixes of their names."""
    files = reading(source.root, source.files)
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    if not names:
        kinds = Counter(printable(PurePosixPath(name).suffix, 20) or "no suffix" for name in files)
        most = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        raise UserError(
            f"dataset.root: no images in {source.root}: looked for {' '.join(SUFFIXES)} in all its folders, "
            f"found {f'{len(files)} other files ({most})' if files else 'no files'}"
        )
    return names


@contextmanager
def _any_number_of_pixels() -> Iterator[None]:
    """`dataset.max_pixels` decides instead of Pillow's own limit, which would warn below it."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decode_all(
    source: Source, names: list[str], dataset: DatasetConfig, threads: int, scratch: Path
) -> Iterator[Decoded]:
    """Every file, decoded or bad, in the order of `names`.

    Raises:
        UserError: one is bad, and `on_bad_image` is `error`.
    """
    order = source.reading_order(names)
    contents = ((name, _read(source, name, dataset.max_pixels)) for name in order)
    decoded = _map_in_order(lambda item: _decoded(*item, dataset, source), contents, threads, _bytes_of)
    shown = progress(decoded, len(names), "Preparing images", "images")
    checked = shown if dataset.on_bad_image == "skip" else _refuse_bad(shown, source)
    yield from checked if order == names else _sort(checked, scratch)


def _read(source: Source, name: str, max_pixels: int) -> bytes | BadImageError:
    where, most = source.where(name), max_pixels * BYTES_PER_PIXEL + METADATA_BYTES
    try:
        size = reading(where, lambda: source.size(name))
        if size > most:  # an archive may promise a small file to unpack into memory without end
            return BadImageError(f"{size} bytes are more than dataset.max_pixels {max_pixels} can need")
        return reading(where, lambda: source.load(name))
    except BadImageError as error:
        return error


def _bytes_of(item: tuple[str, bytes | BadImageError]) -> int:
    return 0 if isinstance(item[1], BadImageError) else len(item[1])


def _decoded(name: str, content: bytes | BadImageError, dataset: DatasetConfig, source: Source) -> Decoded:
    if isinstance(content, BadImageError):
        return name, content
    try:
        return name, decode(content, dataset)
    except BadImageError as error:
        return name, error
    except MemoryError:
        raise UserError(
            f"too little memory to decode {source.where(name)}: lower compute.threads, or lower dataset.max_pixels "
            "and leave such images out with dataset.on_bad_image: skip"
        ) from None


def _map_in_order(
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


def _refuse_bad(decoded: Iterable[Decoded], source: Source) -> Iterator[Decoded]:
    for name, image in decoded:
        if isinstance(image, BadImageError):
            raise UserError(
                f"bad image {source.where(name)}: {image}. Repair or remove it, "
                "or leave such images out with dataset.on_bad_image: skip"
            )
        yield name, image


def _sort(decoded: Iterable[Decoded], scratch: Path) -> Iterator[Decoded]:
    """Decoded images by name, through an unnamed file: they need not fit into memory."""
    places: dict[str, int | BadImageError] = {}
    shape: tuple[int, ...] = ()
    with tempfile.TemporaryFile(dir=scratch) as file:
        for name, image in decoded:
            places[name] = image if isinstance(image, BadImageError) else file.tell()
            if not isinstance(image, BadImageError):
                shape = image.shape
                file.write(image.tobytes())
        for name in sorted(places):
            place = places[name]
            if isinstance(place, BadImageError):
                yield name, place
            else:
                file.seek(place)
                yield name, np.frombuffer(file.read(int(np.prod(shape))), dtype=np.uint8).reshape(shape)


def _good_images(
    decoded: Iterable[Decoded], labels: dict[str, int], source: Source, skipped: list[dict[str, str]]
) -> Generator[tuple[Images, int | None]]:
    """The images with their labels; the bad ones go into `skipped`, with a warning.

    Raises:
        UserError: all are bad.
    """
    good = 0
    for name, image in decoded:
        if isinstance(image, BadImageError):
            skipped.append({"file": printable(name), "reason": str(image)})
            tqdm.write(f"warning: skipped bad image {source.where(name)}: {image}", file=sys.stderr)
        else:
            good += 1
            yield image, labels.get(name)
    if not good:
        first = skipped[0]
        raise UserError(
            f"dataset.root: all {len(skipped)} images of {source.root} are bad; "
            f"the first is {first['file']}: {first['reason']}"
        )
