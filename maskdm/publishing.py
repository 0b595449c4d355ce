"""Outputs appear whole or not at all: built beside, synced, moved into place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.errors import UserError

# What the disk may refuse; any other OSError in the block is not about the output.
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
}


@contextmanager
def one_writer(lock: Path, what: str) -> Iterator[None]:
    """Let one process at a time run the block; another waits and says for whom.

    The kernel frees the lock when its holder dies, so a killed process never blocks the next.

    Args:
        lock: a file of its own; holds the pid of the process at work.
        what: for the message.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{what}: waiting for process {file.read().strip()}, which is at work on it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def publish_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well, it becomes `output`.

    A reader sees the old folder, none, or the new one, never a part of it. When the block raises, what was built
    is removed and an existing `output` stays as it was.

    Raises:
        UserError: the place can't be written.
    """
    with _building(output) as building:
        building.mkdir()
        yield building
        for file in sorted(building.rglob("*")):
            if file.is_file():
                _sync(file)
        _replace(output, building)


def publish_text(output: Path, text: str) -> None:
    """Write a small file whole.

    Raises:
        UserError: the place can't be written.
    """
    with _building(output) as building:
        building.write_text(text, encoding="utf-8")
        _sync(building)
        building.replace(output)


def publish_json(output: Path, content: Any) -> None:
    """Write plain values as readable JSON, whole; equal values give equal bytes.

    Raises:
        UserError: the place can't be written.
    """
    publish_text(output, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def cannot_write(output: Path, error: OSError) -> UserError:
    """What to tell a user who may not, or can't, write there."""
    return UserError(
        f"cannot write {output}: {error.strerror or error} (free space, or permissions of {output.parent}?)"
    )


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """A free path to build `output` at; removed afterwards if it is still there."""
    building = paths.building(output)
    try:
        _remove(building)
        building.parent.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        yield building
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise cannot_write(output, error) from error
    finally:
        _remove(building)
        _remove_empty(building.parent)


def _replace(output: Path, building: Path) -> None:
    """Put the built folder in the place of the old output, which comes back if that fails."""
    if not output.is_dir() or output.is_symlink():
        if output.is_symlink():  # a cache's link: only the link goes
            output.unlink()
        building.rename(output)
        return
    old = building.with_name(output.name + ".old")
    _remove(old)
    output.rename(old)
    try:
        building.rename(output)
    except OSError:
        old.rename(output)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _remove_empty(folder: Path) -> None:
    """Remove the folders made to build in, as far as nobody else builds there."""
    while paths.BUILDING in (folder, *folder.parents):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
