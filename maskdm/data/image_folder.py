"""Your own images: a folder tree, a .zip or a .tar of any sizes and formats.

The same images give the same arrays whether they are in a folder or in an archive. Archives are read in memory, never
unpacked to the names of their members, so links and paths that point elsewhere have no effect.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np

from maskdm.base.errors import UserError, printable
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Labels
from maskdm.data.collection import Collection, reading
from maskdm.data.decoding import BadImageError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # folders for parts of a dataset
ARCHIVES = ".zip, .tar, .tar.gz, .tar.xz or .tar.bz2"
DAMAGED_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)

Read = Callable[[str], bytes]  # reads a file by its POSIX path from the root


@contextmanager
def open_image_folder(dataset: DatasetConfig) -> Iterator[Collection]:
    """Open the images under `dataset.root`, sorted by path, with labels from class folders.

    Raises:
        UserError: root is missing, unreadable, damaged, or holds no images.
    """
    root = dataset.root
    assert root is not None, "the schema requires root for image_folder"
    try:
        with ExitStack() as stack:
            with reading(root):
                names, read = _open_files(root, stack)
            names, left_out = _sorted_images(root, names)

            def load(number: int) -> bytes:
                with reading(collection.where(number)):
                    return read(names[number])

            class_names, labels = labels_from_folders(names)
            _refuse_splits(root, class_names)
            shown = class_names and tuple(map(printable, class_names))
            are_paths = Path(root).is_dir()
            collection = Collection(root, len(names), load, names.__getitem__, root, shown, labels, are_paths, left_out)
            yield collection
    except DAMAGED_ARCHIVE as error:
        reason = printable(str(error))
        raise UserError(
            f"dataset.root: the archive {root} is damaged or incomplete ({reason}): copy or download it again"
        ) from error


def labels_from_folders(names: Sequence[str]) -> tuple[tuple[str, ...] | None, Labels | None]:
    """Take the folders directly below the deepest folder that contains all images as classes.

    There are classes if there are at least two such folders, and no image beside them.

    Args:
        names: the images' POSIX paths.

    Returns:
        the sorted class names and the label of each path; None, None without classes.
    """
    first, last = min(map(_folders, names)), max(map(_folders, names))  # all paths begin with what these two share
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    if any(name.count("/") == depth for name in names):
        return None, None
    class_names = tuple(sorted({_folders(name)[depth] for name in names}))
    index = {name: number for number, name in enumerate(class_names)}
    return class_names, np.array([index[_folders(name)[depth]] for name in names], dtype=np.int64)


def _refuse_splits(root: str, class_names: tuple[str, ...] | None) -> None:
    """Refuse class folders that are parts of a dataset: test images would be trained on, labelled "test".

    Raises:
        UserError: all class folders have such names.
    """
    if class_names and {name.lower() for name in class_names} <= SPLITS:
        train = next((name for name in class_names if name.lower().startswith("train")), class_names[0])
        raise UserError(
            f"dataset.root: the folders {', '.join(class_names)} of {root} look like the parts of a dataset, not like "
            f"classes: name one of them, e.g. root: {Path(root) / train}, or rename them if they are classes"
        )


def _folders(name: str) -> list[str]:
    return name.split("/")[:-1]


def _sorted_images(root: str, names: Sequence[str]) -> tuple[list[str], str]:
    """The files whose names have an image suffix, sorted, and a sentence on the others, empty if there are none."""
    images = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    others = [name for name in names if not name.lower().endswith(SUFFIXES)]
    kinds = Counter(printable(PurePosixPath(name).suffix.lower(), 20) or "no suffix" for name in others)
    most = ", ".join(
        f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:5]
    )
    if not images:
        raise UserError(
            f"dataset.root: no images in {root}: looked for {' '.join(SUFFIXES)} in all its folders, "
            f"found {f'{len(others)} other files ({most})' if others else 'no files'}"
        )
    plural = "file" if len(others) == 1 else "files"
    return images, f"{len(others)} {plural} left out: {most}" if others else ""


def _open_files(root: str, stack: ExitStack) -> tuple[list[str], Read]:
    """The names of all files in a folder or archive, whose content decides its type, and a function that reads one."""
    path = Path(root)
    if path.is_dir():
        return _below(path), lambda name: (path / name).read_bytes()
    if not path.exists():
        raise UserError(f"dataset.root: there is no {root} (looked for {path.absolute()})")
    if not path.is_file():  # opening a pipe would block
        raise UserError(f"dataset.root: {root} is neither a folder nor a file, but a pipe, socket or device")
    if tar := stack.enter_context(_open_tar(path)):  # before zip: a tar may end with a stored .zip, and looks like one
        return _members_of_tar(tar)
    if zipfile.is_zipfile(path):
        return _members_of_zip(stack.enter_context(zipfile.ZipFile(path)))
    raise UserError(f"dataset.root: {root} is neither a folder nor a {ARCHIVES}, or it is damaged")


def _below(root: Path) -> list[str]:
    """The files of a folder tree; links are followed: the user put them there."""
    found, waiting = [], [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    if not _is_loop(Path(entry)):
                        waiting.append(f"{prefix}{entry.name}/")
                elif entry.is_file() or not Path(entry).exists():  # a broken link: reading it is an error
                    found.append(prefix + entry.name)
    return found


def _is_loop(folder: Path) -> bool:
    """Whether a folder is a link to one of its own parents."""
    return folder.is_symlink() and any(folder.samefile(parent) for parent in folder.parents)


def _members_of_zip(archive: zipfile.ZipFile) -> tuple[list[str], Read]:
    """The regular members of a .zip; the last one if names are equal, as after unpacking."""
    members = {}
    for info in archive.infolist():
        is_special = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG)  # a link or device
        # some Windows tools write backslashes, against the specification
        name = _member_name(info.filename.replace("\\", "/"))
        if name and not info.is_dir() and not is_special:
            members[name] = info

    def read(name: str) -> bytes:
        try:
            with archive.open(members[name]) as file:
                return file.read(members[name].file_size)  # at most what the header says
        except (*DAMAGED_ARCHIVE, RuntimeError) as error:  # RuntimeError: encrypted, or unknown compression
            raise BadImageError(printable(str(error)) or type(error).__name__) from error

    return list(members), read


def _members_of_tar(archive: tarfile.TarFile) -> tuple[list[str], Read]:
    """The regular members of a .tar; the last one if names are equal, as after unpacking."""
    named = {_member_name(member.name): member for member in archive.getmembers() if member.isreg()}
    members = {name: member for name, member in named.items() if name}

    def read(name: str) -> bytes:
        file = archive.extractfile(members[name])
        assert file is not None, "regular members have content"
        return file.read()

    return list(members), read


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile | None]:
    """Open a tar for reading its members in any order; None if the file is not a tar.

    A compressed tar is first decompressed into an unnamed temporary file: going back in it would mean decompressing
    from the start.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(tarfile.open(path))
        except tarfile.ReadError:
            yield None
            return
        file = cast(BinaryIO, archive.fileobj)
        if not isinstance(file, BufferedReader):  # it decompresses
            plain = stack.enter_context(tempfile.TemporaryFile())
            file.seek(0)
            with reading(f"{path} into a temporary file in {tempfile.gettempdir()} (set TMPDIR for another folder)"):
                shutil.copyfileobj(file, plain)
            plain.seek(0)
            archive, file = stack.enter_context(tarfile.open(fileobj=plain, mode="r:")), plain
        archive.getmembers()  # tarfile takes a damaged or missing header for the end of the archive
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark after the last file that can be read")
        yield archive


def _member_name(path: str) -> str:
    """A member's path from the archive's root; empty if it is hidden or points out of the archive."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "" if any(part == ".." or _is_hidden(part) for part in parts) else "/".join(parts)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"
