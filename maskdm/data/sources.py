"""Where image files lie: a folder tree, a zip or a tar, listed and read by name, never extracted."""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.data.decoding import BadImageError

ARCHIVES = ".zip, .tar, .tar.gz, .tar.xz or .tar.bz2"
DAMAGED_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)
TAR_EXTENSIONS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME}
TAR_EXTENSIONS |= {tarfile.GNUTYPE_LONGLINK}
EXTENSION_BYTES = 2**20  # of a member's long name and the like; tarfile reads them at once
MOST_FILES = 2**22  # in an archive, whose list takes 1 kB of memory for each
MOST_PATHS = 100  # by which links lead to one folder: with links to links their number explodes
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others zipfile unpacks whole, a few bytes to many GB
NONSENSE = (ValueError, OverflowError, RecursionError)  # what tarfile raises for some headers

T = TypeVar("T")


class Source(ABC):
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

    def reading_order(self, names: Sequence[str]) -> NDArray[np.int64] | None:
        """The positions in `names` in which these files are best read; None for as they stand."""
        return None

    def where(self, name: str) -> str:
        """A file, for messages."""
        return f"{printable(name)} in {self.root}"


class _Folder(Source):
    """A folder tree; links to files and folders are followed, as the user has put them there."""

    def files(self) -> list[str]:
        found, paths = [], Counter[Path]()
        waiting = [(self.root, "", Path(self.root).resolve(), frozenset[Path]())]
        while waiting:
            folder, prefix, real, above = waiting.pop()
            if real in above:  # a link to a folder that it lies in
                continue
            paths[real] += 1
            if paths[real] > MOST_PATHS:
                raise UserError(f"dataset.root: links lead to {printable(str(real))} by more than {MOST_PATHS} paths")
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_hidden(entry.name):
                        continue
                    if entry.is_dir():
                        there = Path(entry.path).resolve() if entry.is_symlink() else real / entry.name
                        waiting.append((entry.path, f"{prefix}{entry.name}/", there, above | {real}))
                    elif entry.is_file() or not Path(entry.path).exists():  # a broken link: reading it will tell
                        found.append(prefix + entry.name)
        return found

    def size(self, name: str) -> int:
        return (Path(self.root) / name).stat().st_size

    def load(self, name: str) -> bytes:
        return (Path(self.root) / name).read_bytes()

    def where(self, name: str) -> str:
        return printable(str(Path(self.root) / name))


class _Archive(Source):
    """One file that holds the others."""


class _Zip(_Archive):
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
            if self._members[name].compress_type not in BOUNDED:
                raise BadImageError("neither deflated nor stored: the other compressions of a .zip have no bound")
            with self._archive.open(self._members[name]) as file:
                return file.read(self.size(name))  # read() alone would unpack more than the header says
        except (*DAMAGED_ARCHIVE, RuntimeError) as error:  # RuntimeError: encrypted, or of an unknown method
            raise BadImageError(printable(str(error)) or type(error).__name__) from error


class _TarHeader(tarfile.TarInfo):
    """A header whose sizes are possible ones: tarfile would read on for ever, or all that is there at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in TAR_EXTENSIONS and header.size > EXTENSION_BYTES):
            raise tarfile.ReadError(f"a header declares {header.size} bytes")
        return header


class _Tar(_Archive):
    """The regular members of a .tar; of equal names the last, as unpacking would have it.

    The headers are read first. A plain tar's members are then read in sorted order, each where it lies. In a
    compressed stream, going back would mean to decompress from the start, so they are read in the stream's
    order: such an archive is decompressed twice, and its images are sorted when they are decoded.
    """

    def __init__(self, root: str, archive: tarfile.TarFile) -> None:
        super().__init__(root)
        self._archive = archive
        self._compressed = not isinstance(archive.fileobj, BufferedReader)  # else a decompressor
        named = {_member_name(member.name): member for member in _tar_members(archive) if member.isreg()}
        self._check_end()
        self._members = {name: member for name, member in named.items() if name}

    def files(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int:
        return self._members[name].size

    def load(self, name: str) -> bytes:
        file = self._archive.extractfile(self._members[name])
        assert file is not None, "regular members have content"
        return file.read()

    def reading_order(self, names: Sequence[str]) -> NDArray[np.int64] | None:
        if not self._compressed:
            return None
        return np.argsort([self._members[name].offset_data for name in names], kind="stable")

    def _check_end(self) -> None:
        """To tarfile a damaged or missing header is the end: what follows would silently be left out."""
        file = self._archive.fileobj
        assert file is not None, "the archive is open"
        file.seek(self._archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark after the last file that can be read")


def _tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member, by headers that lie one behind the other.

    Raises:
        tarfile.ReadError: a header is damaged, or made so that reading would not end.
        UserError: there are more members than memory is meant for.
    """
    number, before = 0, -1
    try:
        for member in archive:
            number += 1
            if archive.offset <= before or member.size < 0:
                raise tarfile.ReadError("a header points back")
            if number > MOST_FILES:
                raise UserError(f"dataset.root: more than {MOST_FILES} files: unpack the archive, and give the folder")
            before = archive.offset
            archive.members = []  # type: ignore[attr-defined]  # else it keeps every header
            yield member
    except NONSENSE as error:
        raise tarfile.ReadError(f"a header can't be read: {printable(str(error))}") from error


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
def open_source(root: str) -> Iterator[Source]:
    """The folder or archive at `root`, relative to the folder of params.yaml."""
    path = Path(root)
    try:
        if reading(root, path.is_dir):
            yield _Folder(root)
        elif not reading(root, path.exists):
            raise UserError(f"dataset.root: there is no {root} (looked for {path.absolute()})")
        elif not path.is_file():  # a pipe would be waited for
            raise UserError(f"dataset.root: {root} is neither a folder nor a file, but a pipe, socket or device")
        else:
            with _open_archive(root) as archive:
                yield archive
    except DAMAGED_ARCHIVE as error:
        reason = printable(str(error))
        raise UserError(
            f"dataset.root: the archive {root} is damaged or incomplete ({reason}): copy or download it again"
        ) from error


@contextmanager
def _open_archive(root: str) -> Iterator[Source]:
    # content decides, not the name; tar first: a plain tar may end with a stored .zip, never begin as one
    with ExitStack() as stack:
        if tar := reading(root, lambda: _open_tar(root)):
            stack.enter_context(tar)
            yield reading(root, lambda: _Tar(root, tar))
        elif reading(root, lambda: zipfile.is_zipfile(root)):
            yield _Zip(root, stack.enter_context(reading(root, lambda: zipfile.ZipFile(root))))
        else:
            raise UserError(f"dataset.root: {root} is neither a folder nor a {ARCHIVES}, or it is damaged")


def _open_tar(root: str) -> tarfile.TarFile | None:
    try:
        return tarfile.open(root, tarinfo=_TarHeader)  # closed by the caller
    except (tarfile.ReadError, *NONSENSE):
        return None


def reading(where: str, read: Callable[[], T]) -> T:
    """Do `read`, telling what can't be read and why."""
    try:
        return read()
    except OSError as error:
        place = where if error.filename is None else printable(str(error.filename))
        raise UserError(f"cannot read {place}: {printable(error.strerror or str(error))}") from error
