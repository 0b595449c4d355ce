"""File locks. The kernel frees a lock when its holder dies, so a killed process never blocks the next one."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from maskdm.base.publishing import explain_refusals

NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def one_writer(lock: Path, what: str) -> Iterator[None]:
    """Let one process at a time run the block; others wait, and print which process they wait for.

    If the file system does not support locks, the block runs after a warning.

    Args:
        lock: the lock file; it contains who holds the lock.
        what: the name of the work, for messages.

    Raises:
        UserError: the file can't be written.
    """
    with explain_refusals(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+", encoding="utf-8")
    with file:
        _acquire(file, what)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "since": now}
        with explain_refusals(lock):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(holder).encode())
        yield


def holder_of(lock: Path) -> dict[str, Any] | None:
    """The holder of a lock, {"pid", "host", "what", "since"}; empty if it is not known, None if the lock is free."""
    try:
        with lock.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(lock)
    except OSError:
        return None
    return None


def _read(lock: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(lock.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _acquire(file: TextIO, what: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read(Path(file.name))
        where = "" if holder.get("host") in (None, socket.gethostname()) else f" on {holder['host']}"
        _say(f"{what}: waiting for process {holder.get('pid', '?')}{where}, which works on it")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        advice = f"make sure that only one process at a time runs {what}"
        _say(f"warning: {file.name} can't be locked ({error.strerror}): {advice}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
