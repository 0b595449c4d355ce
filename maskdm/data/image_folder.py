"""Your own images: a folder tree, a .zip or a .tar of any sizes and formats, as one size of grey or RGB.

The same images give the same arrays whether they lie in a folder or in an archive. Archives are read in
place: nothing is extracted, so links and paths that point elsewhere have no effect.
"""

from __future__ import annotations

import lzma
import os
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from maskdm.config import DatasetConfig
from maskdm.data.arrays import Images, LabelledImages
from maskdm.errors import UserError
from maskdm.progress import progress

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")  # Pillow's names for them
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}
ARCHIVES = ".zip, .tar, .tar.gz, .tar.xz or .tar.bz2"
DAMAGED_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
BYTES_PER_PIXEL = 8  # four channels of 16 bits: no image file needs more …
METADATA_BYTES = 2**26  # … beside its metadata
WAITING_PER_THREAD = 8  # images read ahead of the decoders

T = TypeVar("T")
R = TypeVar("R")


class BadImageError(Exception):
    """A file that should be an image but is none, or a damaged one; the message is the reason."""


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
    with _open_source(dataset.root) as source, _any_number_of_pixels():
        names = _image_names(source)
        class_names, labels = labels_from_folders(names)
        decoded = _decode_all(source, names[: dataset.limit], dataset, threads, scratch)
        with closing(_good_images(decoded, labels, source, skipped)) as images:
            yield LabelledImages(images, class_names, skipped)


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


def decode(content: bytes, dataset: DatasetConfig) -> Images:
    """An image file as (image_size, image_size, channels) uint8.

    The first frame is taken, turned upright by its EXIF orientation; an embedded colour profile is ignored.
    Transparent images are laid over white: it is what they are mostly drawn for and shown on, while dropping
    alpha would uncover whatever colour the transparent pixels happen to hold. 16-bit grey is scaled to 8.

    Raises:
        BadImageError: it can't be decoded, has no 8- or 16-bit values, or more than `max_pixels` pixels.
    """
    if not content:
        raise BadImageError("the file is empty")
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            image: Image.Image = file
            _check_pixels(image, dataset.max_pixels)  # from the header: nothing is decoded yet
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return fit(_over_white(_to_8_bits(image)), dataset)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image of a known format, or its header is damaged") from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise BadImageError(str(error) or type(error).__name__) from error


def fit(image: Image.Image, dataset: DatasetConfig) -> Images:
    """An opaque 8-bit image as (image_size, image_size, channels) uint8: converted, cropped, resized.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B; RGB of a grey image repeats it.
    """
    image = image.convert("L" if dataset.channels == 1 else "RGB")
    if dataset.crop == "center":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    target = (dataset.image_size, dataset.image_size)
    if image.size != target:
        image = image.resize(target, FILTERS[dataset.resize_filter])
    return np.array(image, dtype=np.uint8).reshape(*target, dataset.channels)


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        size = f"{image.width}×{image.height}"
        raise BadImageError(f"{size} pixels are more than dataset.max_pixels {max_pixels}")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as 8; Pillow's own conversion would clip it to white."""
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no fixed range; expected 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(f"values from {values.min()} to {values.max()}; expected 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # rounded: 65535 = 255·257


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


class _Source(ABC):
    """Files by name: POSIX paths from the root, whatever the root is."""

    def __init__(self, root: str) -> None:
        self.root = root

    @abstractmethod
    def files(self) -> list[str]:
        """Every regular file that is not hidden."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file, known without reading it."""

    @abstractmethod
    def load(self, name: str) -> bytes:
        """The content of a file."""

    def reading_order(self, names: list[str]) -> list[str]:
        """The order in which sorted files are best read."""
        return names

    def where(self, name: str) -> str:
        """A file, for messages."""
        return f"{name} in {self.root}"


class _Folder(_Source):
    """A folder tree; links to files and folders are followed, as the user has put them there."""

    def files(self) -> list[str]:
        return list(self._walk(self.root, "", frozenset()))

    def size(self, name: str) -> int:
        return (Path(self.root) / name).stat().st_size

    def load(self, name: str) -> bytes:
        return (Path(self.root) / name).read_bytes()

    def where(self, name: str) -> str:
        return str(Path(self.root) / name)

    def _walk(self, folder: str, prefix: str, above: frozenset[Path]) -> Iterator[str]:
        real = Path(folder).resolve()
        if real in above:  # a link to a folder that it lies in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    yield from self._walk(entry.path, f"{prefix}{entry.name}/", above | {real})
                elif entry.is_file() or not Path(entry.path).exists():  # a broken link: reading it will tell
                    yield prefix + entry.name


class _Zip(_Source):
    """The regular members of a .zip; of equal names the last, as unpacking would have it."""

    def __init__(self, root: str, archive: zipfile.ZipFile) -> None:
        super().__init__(root)
        self._archive = archive
        files = [info for info in archive.infolist() if not info.is_dir() and not _is_special(info)]
        # Windows tools have written backslashes, against the format's specification
        named = {_member_name(info.filename.replace("\\", "/")): info for info in files}
        self._members = {name: info for name, info in named.items() if name}

    def files(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].file_size

    def load(self, name: str) -> bytes:
        try:
            with self._archive.open(self._members[name]) as file:
                return file.read(self.size(name))  # read() alone would unpack more than the header says
        except (*DAMAGED_ARCHIVE, RuntimeError) as error:  # RuntimeError: encrypted, or of an unknown method
            raise BadImageError(str(error)) from error


class _Tar(_Source):
    """The regular members of a .tar; of equal names the last, as unpacking would have it.

    The headers are read first. A plain tar's members are then read in sorted order, each where it lies. In a
    compressed stream, going back would mean to decompress from the start, so they are read in the stream's
    order: such an archive is decompressed twice, and its images are sorted when they are decoded.
    """

    def __init__(self, root: str, archive: tarfile.TarFile) -> None:
        super().__init__(root)
        self._archive = archive
        self._compressed = not isinstance(archive.fileobj, BufferedReader)  # else a decompressor
        members = archive.getmembers()
        self._check_end()
        named = {_member_name(member.name): member for member in members if member.isreg()}
        self._members = {name: member for name, member in named.items() if name}

    def files(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].size

    def load(self, name: str) -> bytes:
        file = self._archive.extractfile(self._members[name])
        assert file is not None, "regular members have content"
        return file.read()

    def reading_order(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: self._members[name].offset_data) if self._compressed else names

    def _check_end(self) -> None:
        """To tarfile a damaged or missing header is the end: what follows would silently be left out."""
        file = self._archive.fileobj
        assert file is not None, "the archive is open"
        file.seek(self._archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark after the last file that can be read")


def _member_name(path: str) -> str:
    """A member's path from the archive's root; empty for one that is hidden or points out of it."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "" if any(part == ".." or _is_hidden(part) for part in parts) else "/".join(parts)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _is_special(info: zipfile.ZipInfo) -> bool:
    """A link or device, as Unix tools put it into a .zip."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    return kind not in (0, stat.S_IFREG)


@contextmanager
def _open_source(root: str) -> Iterator[_Source]:
    """The folder or archive at `root`, relative to the folder of params.yaml."""
    path = Path(root)
    try:
        if _reading(root, path.is_dir):
            yield _Folder(root)
        elif not _reading(root, path.exists):
            raise UserError(f"dataset.root: there is no {root} (looked for {path.absolute()})")
        else:
            with _open_archive(root) as archive:
                yield archive
    except DAMAGED_ARCHIVE as error:
        raise UserError(
            f"dataset.root: the archive {root} is damaged or incomplete ({error}): copy or download it again"
        ) from error


@contextmanager
def _open_archive(root: str) -> Iterator[_Source]:
    # content decides, not the name; tar first: a plain tar may end with a stored .zip, never begin as one
    with ExitStack() as stack:
        if tar := _reading(root, lambda: _open_tar(root)):
            stack.enter_context(tar)
            yield _reading(root, lambda: _Tar(root, tar))
        elif _reading(root, lambda: zipfile.is_zipfile(root)):
            yield _Zip(root, stack.enter_context(_reading(root, lambda: zipfile.ZipFile(root))))
        else:
            raise UserError(f"dataset.root: {root} is neither a folder nor a {ARCHIVES}, or it is damaged")


def _open_tar(root: str) -> tarfile.TarFile | None:
    try:
        return tarfile.open(root)  # closed by the caller
    except tarfile.ReadError:
        return None


def _reading(where: str, read: Callable[[], T]) -> T:
    """Do `read`, telling what can't be read and why."""
    try:
        return read()
    except OSError as error:
        raise UserError(f"cannot read {error.filename or where}: {error.strerror or error}") from error


def _image_names(source: _Source) -> list[str]:
    """The sorted images of a source, by the suffixes of their names."""
    files = _reading(source.root, source.files)
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    if not names:
        kinds = Counter(PurePosixPath(name).suffix or "no suffix" for name in files)
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
    source: _Source, names: list[str], dataset: DatasetConfig, threads: int, scratch: Path
) -> Iterator[Decoded]:
    """Every file, decoded or bad, in the order of `names`.

    Raises:
        UserError: one is bad, and `on_bad_image` is `error`.
    """
    order = source.reading_order(names)
    contents = ((name, _read(source, name, dataset.max_pixels)) for name in order)
    decoded = _map_in_order(lambda item: _decoded(*item, dataset), contents, threads)
    shown = progress(decoded, len(names), "Preparing images", "images")
    checked = shown if dataset.on_bad_image == "skip" else _refuse_bad(shown, source)
    yield from checked if order == names else _sort(checked, scratch)


def _read(source: _Source, name: str, max_pixels: int) -> bytes | BadImageError:
    where, most = source.where(name), max_pixels * BYTES_PER_PIXEL + METADATA_BYTES
    try:
        size = _reading(where, lambda: source.size(name))
        if size > most:  # an archive may promise a small file to unpack into memory without end
            return BadImageError(f"{size} bytes are more than dataset.max_pixels {max_pixels} can need")
        return _reading(where, lambda: source.load(name))
    except BadImageError as error:
        return error


def _decoded(name: str, content: bytes | BadImageError, dataset: DatasetConfig) -> Decoded:
    if isinstance(content, BadImageError):
        return name, content
    try:
        return name, decode(content, dataset)
    except BadImageError as error:
        return name, error


def _map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map` on threads (Pillow decodes without the GIL), holding a bounded number of items at a time."""
    if threads == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == threads * WAITING_PER_THREAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _refuse_bad(decoded: Iterable[Decoded], source: _Source) -> Iterator[Decoded]:
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
    decoded: Iterable[Decoded], labels: dict[str, int], source: _Source, skipped: list[dict[str, str]]
) -> Generator[tuple[Images, int | None]]:
    """The images with their labels; the bad ones go into `skipped`, with a warning.

    Raises:
        UserError: all are bad.
    """
    good = 0
    for name, image in decoded:
        if isinstance(image, BadImageError):
            skipped.append({"file": name, "reason": str(image)})
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
