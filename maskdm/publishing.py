"""Outputs appear whole or not at all: built beside, synced, moved into place."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from maskdm import paths
from maskdm.checksums import with_checksum
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
    None,  # numpy's, of an array that could be written in part only
}


@dataclass
class Turn:
    """The right to work on something, until the block of `one_writer` ends.

    Attributes:
        waited_for: the pid of the process that had it before, where one was at work; else None.
        found_done: what that process left with `done`; None where it failed or died.
    """

    _file: TextIO
    _holder: dict[str, Any]
    waited_for: int | None = None
    found_done: str | None = None

    def done(self, what: str) -> None:
        """Tell who waits that the work `what` (a fingerprint) is finished."""
        self._write({**self._holder, "done": what})

    def _write(self, holder: dict[str, Any]) -> None:
        try:
            os.ftruncate(self._file.fileno(), 0)
            line = (json.dumps(holder) + "\n").encode()
            if os.write(self._file.fileno(), line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(Path(self._file.name), error) from error


@contextmanager
def one_writer(lock: Path, what: str) -> Iterator[Turn]:
    """Let one process at a time run the block; another waits and says for whom.

    The kernel frees the lock when its holder dies, so a killed process never blocks the next.

    Args:
        lock: a file of its own; holds who is at work, and what was done.
        what: for the message.

    Raises:
        UserError: the place can't be written.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "started": started, "done": None}
    with _open_lock(lock) as file:
        turn = Turn(file, holder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _wait(file, what)
            turn.waited_for = other.get("pid")
            if other.get("done") is None:  # else the line is of an earlier time
                turn.found_done = _read_holder(file).get("done")
        turn._write(holder)
        yield turn


def _open_lock(lock: Path) -> TextIO:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(lock, error) from error


def _wait(file: TextIO, what: str) -> dict[str, Any]:
    """Wait for the lock; who had it."""
    other = _read_holder(file)
    where = f" on {other['host']}" if other.get("host") not in (None, socket.gethostname()) else ""
    since = f" since {other['started']}" if "started" in other else ""
    print(
        f"{what}: waiting for process {other.get('pid', '?')}{where}, which is at work on it{since}",
        file=sys.stderr,
        flush=True,
    )
    fcntl.flock(file, fcntl.LOCK_EX)
    return other


def _read_holder(file: TextIO) -> dict[str, Any]:
    """Who holds or held the lock; empty where its line is just being written."""
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError):
        return {}


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
        for path in sorted(building.rglob("*")):
            if path.is_file() or path.is_dir():
                _sync(path)
        _replace(output, building)
        _sync(output.parent)


def publish_text(output: Path, text: str) -> None:
    """Write a small file whole.

    Raises:
        UserError: the place can't be written.
    """
    with _building(output) as building:
        building.write_text(text, encoding="utf-8")
        _sync(building)
        building.replace(output)
        _sync(output.parent)


@contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Yield a free path beside a file of our own; when the block ends well, what is there takes the file's place.

    For work folders; outputs of stages are published.

    Raises:
        UserError: the place can't be written.
    """
    building = file.with_name(f"{file.name}.{os.getpid()}.building")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield building
        _sync(building)
        building.replace(file)
        _sync(file.parent)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise cannot_write(file, error) from error
    finally:
        with suppress(OSError):
            building.unlink()


def publish_copy(output: Path, kept: Path) -> None:
    """Publish a copy of a file or folder, whole.

    Raises:
        UserError: the place can't be written.
    """
    if kept.is_dir():
        with publish_folder(output) as folder:
            shutil.copytree(kept, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        return
    with _building(output) as building:
        shutil.copyfile(kept, building)
        _sync(building)
        building.replace(output)
        _sync(output.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where its filesystem can't, or it is another one, copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        _sync(target)


def publish_json(output: Path, content: Any) -> None:
    """Write plain values as readable JSON, whole; equal values give equal bytes.

    Raises:
        UserError: the place can't be written.
    """
    publish_text(output, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def publish_description(output: Path, content: dict[str, Any]) -> None:
    """`publish_json`, with a checksum that whoever reads it checks (`checksums.checked`).

    Raises:
        UserError: the place can't be written.
    """
    publish_json(output, with_checksum(content))


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
        building.parent.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        if building.parent.stat().st_dev != output.parent.stat().st_dev:  # a part of results/ on another disk
            building = output.with_name(f".{output.name}.building")
        _remove(building)
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
    old = building.with_suffix(".old")
    if not output.is_dir() or output.is_symlink():
        if output.is_symlink():  # a cache's link: only the link goes
            output.unlink()
        building.rename(output)
        _remove(old)  # by a process that was killed between its two renames
        return
    _remove(old)
    try:
        output.rename(old)
        building.rename(output)
    except BaseException:  # a signal too
        if not output.exists():
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


def _sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
