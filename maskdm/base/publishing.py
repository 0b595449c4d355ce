"""Files and folders appear whole or not at all: built beside their place, synced, moved there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskdm.base.checksums import with_checksum
from maskdm.base.errors import UserError

BUILDING = ".building"  # the suffix of what is not whole yet
# What the disk may refuse; any other OSError is not about the output.
REFUSALS = {
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    None,  # NumPy's, of an array that could be written in part only
}


@contextmanager
def explain_refusals(output: Path) -> Iterator[None]:
    """Say which output the disk refuses to write in the block.

    Raises:
        UserError: it refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        reason = f"{error.strerror or error} (free space, or permissions of {output.parent}?)"
        raise UserError(f"cannot write {output}: {reason}") from error


@contextmanager
def publish_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well, it becomes `output`.

    When the block raises, what was built is removed and an existing `output` stays as it was.

    Raises:
        UserError: the place can't be written.
    """
    building = output.with_name(f".{output.name}{BUILDING}")
    with explain_refusals(output):
        remove(building)
        building.mkdir(parents=True)
        try:
            yield building
            sync_tree(building)
            old = building.with_suffix(".old")
            remove(old)
            if output.is_dir() and not output.is_symlink():
                output.rename(old)
            else:
                remove(output)
            try:
                building.rename(output)
            except BaseException:  # a signal too
                if not output.exists() and old.is_dir():
                    old.rename(output)
                raise
            sync(output.parent)
            remove(old)
        finally:
            remove(building)


@contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Yield a free path beside a file; when the block ends well, what is there takes the file's place.

    Raises:
        UserError: the place can't be written.
    """
    building = file.with_name(f".{file.name}.{os.getpid()}{BUILDING}")
    with explain_refusals(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield building
            sync(building)
            building.replace(file)
            sync(file.parent)
        finally:
            with suppress(OSError):
                building.unlink()


def publish_text(output: Path, text: str) -> None:
    """Write a small file whole.

    Raises:
        UserError: the place can't be written.
    """
    with replace_file(output) as building:
        building.write_text(text, encoding="utf-8")


def publish_json(output: Path, content: Any) -> None:
    """Write plain values as readable JSON, whole; equal values give equal bytes.

    Raises:
        UserError: the place can't be written.
    """
    publish_text(output, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def publish_description(output: Path, content: dict[str, Any]) -> None:
    """`publish_json`, with a checksum, which readers compare (`checksums.checked`).

    Raises:
        UserError: the place can't be written.
    """
    publish_json(output, with_checksum(content))


def move(source: Path, target: Path) -> None:
    """Move a file or folder to a free place; to another disk it is copied there whole first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        building = target.with_name(f".{target.name}{BUILDING}")
        remove(building)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, building)
        sync_tree(building)
        building.rename(target)
        gone = source.with_name(f".{source.name}{BUILDING}")  # at no moment is half of it in its place
        remove(gone)
        source.rename(gone)
        remove(gone)
    sync(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where its filesystem can't, or it is another one, copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` a file, or a folder and all that is in it."""
    for inner in (*(path.rglob("*") if path.is_dir() else ()), path):
        if inner.is_file() or inner.is_dir():
            sync(inner)
