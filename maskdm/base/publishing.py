"""Atomic writing: files and folders are built beside their place, synced, then renamed, so they appear complete."""

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

BUILDING = ".building"  # the suffix of incomplete files and folders
# Errors of the disk; any other OSError has nothing to do with the output.
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
    None,  # raised by NumPy if it could write only part of an array
}


@contextmanager
def explain_refusals(output: Path) -> Iterator[None]:
    """Turn errors of the disk in the block into an error that names the output.

    Raises:
        UserError: the output can't be written.
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
    """Yield an empty folder to fill; it replaces `output` if the block ends without an exception.

    If the block raises, the new folder is removed and an existing `output` stays as it was.

    Raises:
        UserError: the output can't be written.
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
    """Yield a path to write to; what is written replaces `file` if the block ends without an exception.

    Raises:
        UserError: the file can't be written.
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
    """Write a small file atomically.

    Raises:
        UserError: the file can't be written.
    """
    with replace_file(output) as building:
        building.write_text(text, encoding="utf-8")


def publish_json(output: Path, content: Any) -> None:
    """Write plain values as readable JSON, atomically; equal values give equal bytes.

    Raises:
        UserError: the file can't be written.
    """
    publish_text(output, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def publish_description(output: Path, content: dict[str, Any]) -> None:
    """Like `publish_json`, with a checksum that readers verify (`checksums.checked`).

    Raises:
        UserError: the file can't be written.
    """
    publish_json(output, with_checksum(content))


def move(source: Path, target: Path) -> None:
    """Move a file or folder to a path that does not exist; on another disk a complete copy is made first."""
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
        removed = source.with_name(f".{source.name}{BUILDING}")  # so that `source` is never incomplete
        remove(removed)
        source.rename(removed)
        remove(removed)
    sync(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file; copy it if that is not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk."""
    for inner in (*(path.rglob("*") if path.is_dir() else ()), path):
        if inner.is_file() or inner.is_dir():
            sync(inner)
