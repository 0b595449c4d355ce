"""The sender from outside: starting it, waiting for it, and what to say when it could not send."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from maskdm.base.errors import UserError
from maskdm.config import paths
from maskdm.tracking.spool import Spool, SpoolReader, spools, tracking_folder

LOCK = "sender.lock"  # held by the sender while it lives; holds its pid
LOG = "sender.log"
ERROR = "last_error.txt"
LOOK_EVERY_SECONDS = 0.1
MAX_STARTS = 3  # of senders in one `flush`: one that dies at once would die again
SYNC_SECONDS = 600.0


def start_sender(root: Path) -> bool:
    """Start a sender unless the project has one.

    The lock is taken here and handed over with its file descriptor: of processes that start together one starts a
    sender, and no probe of the lock can turn a starting sender away.

    Returns:
        whether one was started.

    Raises:
        OSError: the place can't be written, or no process be started.
    """
    folder = tracking_folder(root)
    with (folder / LOCK).open("ab") as lock, (folder / LOG).open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        command = [sys.executable, "-m", "maskdm.tracking.sender", str(root), str(lock.fileno())]
        process = subprocess.Popen(
            command,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and the end of the stage are not for the sender
            pass_fds=[lock.fileno()],
        )
    process.returncode = 0  # nobody waits for it: without this, Popen warns that it is still running
    return True


def wake_sender(root: Path, spool: Spool) -> None:
    """Start a sender for a stage's spool; the stage can do without: what it wrote is sent later.

    Args:
        root: the project's root.
        spool: one that could not be written has had its warning.
    """
    try:
        if spool.is_kept:
            start_sender(root)
    except OSError as error:
        print(
            f"warning: tracking: nothing can be sent to MLflow just now, as no process could be started ({error}): "
            f"what was logged is kept in {os.path.relpath(tracking_folder(root))} and sent by the next stage or by "
            "`maskdm sync`",
            file=sys.stderr,
            flush=True,
        )


def flush(timeout_seconds: float = 60.0) -> bool:
    """Wait until MLflow has all that stages have logged so far, with a sender at work.

    Args:
        timeout_seconds: how long to wait; the sender goes on after it.

    Returns:
        whether MLflow has it all; False as soon as the sender can't reach it. `unsent_note` says why.
    """
    root = paths.project_root()
    deadline, failed_before, starts = time.monotonic() + timeout_seconds, _error_time(root), 0
    while _unsent(root):
        if time.monotonic() > deadline or _error_time(root) not in (failed_before, None):
            return False
        try:
            starts += start_sender(root)
        except OSError:
            return False
        if starts > MAX_STARTS:
            return False
        time.sleep(LOOK_EVERY_SECONDS)
    return True


def sync(timeout_seconds: float = SYNC_SECONDS) -> None:
    """Send to MLflow what is still kept on disk.

    Args:
        timeout_seconds: how long to wait for it.

    Raises:
        UserError: not everything could be sent.
    """
    try:
        is_sent = flush(timeout_seconds)
    except OSError as error:
        raise UserError(f"what is kept for MLflow can't be read: {error}") from error
    if not is_sent:
        raise UserError(unsent_note())
    print("everything is in MLflow")


def unsent_note() -> str:
    """What is not in MLflow, why, and what becomes of it."""
    root = paths.project_root()
    folder = tracking_folder(root)
    count = _num_runs(root)
    kept = f"{count} {'run is' if count == 1 else 'runs are'} kept in {os.path.relpath(folder)} and sent by"
    why = _last_error(folder)
    if why is None:
        return f"MLflow has not got everything yet (see {LOG}): {kept} the sender, or by `maskdm sync`"
    return f"{why}; {kept} the next stage or by `maskdm sync`"


def _last_error(folder: Path) -> str | None:
    """What stops the sender, as far as it is known."""
    if not os.access(folder, os.W_OK):
        return f"{os.path.relpath(folder)} can't be written: it needs rights, or a disk that is not read-only"
    try:
        said = (folder / ERROR).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return said or f"the sender failed, and could not even note why: is the disk of {os.path.relpath(folder)} full?"


def warn_if_unsent(root: Path) -> None:
    """Tell the user of a stage that the last sender failed."""
    with suppress(OSError):  # the stage's own spool will not do better, and says so
        if (tracking_folder(root) / ERROR).exists():
            print(f"warning: tracking: {unsent_note()}", file=sys.stderr, flush=True)


def _unsent(root: Path) -> list[Path]:
    return [folder for folder in spools(root) if _is_unsent(folder)]


def _is_unsent(folder: Path) -> bool:
    try:
        return not SpoolReader(folder).is_sent
    except FileNotFoundError:  # the sender has just removed it
        return False
    except OSError:  # another user's
        return True


def _num_runs(root: Path) -> int:
    """Publishing an arm has a spool of its own beside its stage's: count processes."""
    return len({folder.name.split("-")[1] for folder in spools(root)})


def _error_time(root: Path) -> int | None:
    try:
        return (tracking_folder(root) / ERROR).stat().st_mtime_ns
    except OSError:
        return None
