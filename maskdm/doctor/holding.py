"""Who holds a stage's lock, and what is his to write."""

from __future__ import annotations

import datetime
import fcntl
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm import paths

LOCKS = paths.WORK / "locks"


@dataclass(frozen=True)
class Holder:
    """Who is at work on a stage, as the lock's file says.

    Attributes:
        lock: the file.
        what: the stage and its arm, seed or trial.
        pid: of the process at work; None where the file does not say.
        host: the machine of that process.
        started: when it started.
    """

    lock: Path
    what: str
    pid: int | None
    host: str | None
    started: datetime.datetime | None

    @property
    def is_elsewhere(self) -> bool:
        """Whether that process is on another machine."""
        return self.host not in (None, socket.gethostname())


def holders() -> list[Holder]:
    """The locks that are held; a file that nobody holds means nothing."""
    return [_holder(lock) for lock in sorted(LOCKS.glob("*.lock")) if is_held(lock)]


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock; asked so shortly that a stage which starts in this moment just waits for it."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def at_work() -> set[str]:
    """What is being worked on: `pretrain patch-m50 seed 0`."""
    return {holder.what for holder in holders()}


def outputs(what: str) -> list[Path]:
    """What a stage publishes; everything, where it is none that is known.

    Args:
        what: the stage and its arm and seed or trial.
    """
    whole = {
        "prepare": paths.DATA,
        "features": paths.FEATURES,
        "scale": paths.SCALE,
        "choose": paths.CHOSEN,
        "report": paths.REPORT,
    }
    by_seed = {
        "pretrain": paths.pretrain,
        "finetune": paths.finetune,
        "sample": paths.samples,
        "evaluate": paths.metrics,
    }
    match what.split():
        case [stage] if stage in whole:
            return [whole[stage], paths.record(stage)]
        case [stage, arm, "seed", seed] if stage in by_seed and seed.isdecimal():
            return [by_seed[stage](arm, int(seed)), paths.record(stage, arm, int(seed))]
        case ["tune", arm, "trial", trial]:
            return [paths.trial(arm, trial), paths.record("tune", arm, trial=trial)]
    return [paths.RESULTS]


def _holder(lock: Path) -> Holder:
    content = _content(lock)
    what, pid, host = content.get("what"), content.get("pid"), content.get("host")
    return Holder(
        lock,
        what if isinstance(what, str) else lock.stem,
        pid if isinstance(pid, int) and pid > 0 else None,
        host if isinstance(host, str) else None,
        _time(content.get("started")),
    )


def _content(lock: Path) -> dict[str, Any]:
    """What the file says; empty where it is just being written."""
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _time(text: Any) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
