"""The process that brings the spools of a project to MLflow: one per project, started by its stages when need be.

`python -m maskdm.tracking.sender PROJECT LOCK` with the file descriptor of the lock that `start_sender` has taken.
It ends when there has been nothing to do for a while, or when MLflow could not be reached for longer.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from maskdm.tracking.background import ERROR, LOCK, start_sender
from maskdm.tracking.delivery import Delivery
from maskdm.tracking.spool import SpoolReader, spools, tracking_folder
from maskdm.tracking.store import Store, open_store, shown, sqlite_file

IDLE_SECONDS = 20.0  # the next stage of a workflow starts within it, and finds mlflow imported
LOOK_EVERY_SECONDS = 0.5
GIVE_UP_SECONDS = 60.0
MAX_PAUSE_SECONDS = 10.0
NICENESS = 5  # training goes first


def main() -> None:
    """Send until there is nothing to send; let go of the lock, and look once more."""
    root, lock = Path(sys.argv[1]), int(sys.argv[2])
    os.nice(NICENESS)
    with suppress(OSError):  # for people to read; a full disk is no reason not to send
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    all_sent = Sender(root, lock).run()
    os.close(lock)
    # A stage that wrote its spool a moment ago found the lock still held and left it to us.
    if all_sent and spools(root):
        start_sender(root)


class Sender:
    """Sends the spools of a project, oldest first: a stage's rerun supersedes the run of the earlier one.

    Args:
        root: the project's root.
        lock: the descriptor of the sender's lock, where it is held.
    """

    def __init__(self, root: Path, lock: int | None = None) -> None:
        self._root, self._lock = root, lock
        self._stores: dict[str, Store] = {}
        self._databases: dict[Path, int | None] = {}
        self._failing_since: float | None = None
        self._num_failures = 0

    def run(self) -> bool:
        """Send until there was nothing to do for IDLE_SECONDS.

        Returns:
            False if MLflow could not be reached for GIVE_UP_SECONDS.
        """
        last_busy = time.monotonic()
        while time.monotonic() - last_busy < IDLE_SECONDS and not self._is_outdated():
            if self.send():
                last_busy = time.monotonic()
            if self._failing_since is not None and time.monotonic() - self._failing_since > GIVE_UP_SECONDS:
                return False
            time.sleep(min(LOOK_EVERY_SECONDS * 2**self._num_failures, MAX_PAUSE_SECONDS))
        return True

    def send(self) -> bool:
        """Send what there is to send now.

        Returns:
            whether there were spools; those of stages at work stay, and those that could not be sent.
        """
        waiting = spools(self._root)
        failures: dict[str, str] = {}  # by store: what is behind a failure waits, so that the order stays
        for folder in waiting:
            try:
                self._send(SpoolReader(folder), failures)
            except FileNotFoundError:  # somebody has cleaned up
                continue
            except OSError as error:
                failures[folder.name] = f"{folder} can't be read or written ({error})"
        self._note(failures)
        return bool(waiting)

    def _send(self, spool: SpoolReader, failures: dict[str, str]) -> None:
        if spool.uri in failures:
            return
        if spool.uri is None:
            if spool.is_live:  # its first event waits for space on the disk
                return
            print(f"{spool.folder.name}: removed, it can't be read", file=sys.stderr, flush=True)
            spool.remove()
            return
        try:
            if Delivery(self._store(spool.uri), spool).send():
                spool.remove()
        except Exception as error:  # whatever mlflow raises, the spool stays
            failures[spool.uri] = f"MLflow at {shown(spool.uri)} could not be reached or written ({_why(error)})"

    def _store(self, uri: str) -> Store:
        if uri not in self._stores:
            self._stores[uri] = open_store(uri, self._root)
            if (file := sqlite_file(uri)) is not None:
                self._databases[file] = _inode(file)
        return self._stores[uri]

    def _is_outdated(self) -> bool:
        """Whether the user has cleaned up under us.

        To a deleted or exchanged database mlflow would go on writing, in vain; and where the lock's file is another
        one, there may be another sender.
        """
        databases = any(_inode(file) != inode for file, inode in self._databases.items())
        lock = tracking_folder(self._root) / LOCK
        return databases or (self._lock is not None and _inode(lock) != os.fstat(self._lock).st_ino)

    def _note(self, failures: dict[str, str]) -> None:
        """Leave the failure for stages to tell; a single one may be a busy database."""
        note = tracking_folder(self._root) / ERROR
        if not failures:
            self._failing_since, self._num_failures = None, 0
            with suppress(OSError):
                note.unlink(missing_ok=True)
            return
        self._failing_since, self._num_failures = self._failing_since or time.monotonic(), self._num_failures + 1
        if self._num_failures > 1:
            with suppress(OSError):  # a full disk: what waits stays, and `unsent_note` knows an empty note
                note.write_text("; ".join(failures.values()), encoding="utf-8")
        if self._num_failures == 2:
            print(*failures.values(), sep="\n", file=sys.stderr, flush=True)


def _inode(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None


def _why(error: Exception) -> str:
    """The first line of what the system or SQLite said; of what mlflow says, where neither did."""
    origin: BaseException = error
    for earlier in _chain(error):
        if isinstance(earlier, OSError | sqlite3.Error):
            origin = earlier
    lines = str(origin).strip().splitlines()
    return shown(f"{type(origin).__name__}: {lines[0][:200] if lines else 'no message'}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main()
