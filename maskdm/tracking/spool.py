"""What stages leave for MLflow on disk: one folder of events per run, which outlives its process.

`<project>/.work/tracking/<number>-<pid>-<stage>[-<arm>-<seed>]/` holds `events.jsonl`, copies of figures, and
`sent.json`, where the sender notes how far it has come. The number is the time in nanoseconds, or one more than the
largest that is there, as clocks jump back: a killed stage's spool comes before the one of the process that goes on.
The writer holds a lock on `events.jsonl` while it lives: unlike a process id no other process can take it over, and it
holds across machines that share the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from maskdm.config import paths

EVENTS = "events.jsonl"
PROGRESS = "sent.json"
NAME = re.compile(r"\d+-\d+-.")
MAX_PENDING_BYTES = 2**24
EXPERIMENT, RUN, METRICS, PARAMS, TAGS, FIGURE = "experiment", "run", "metrics", "params", "tags", "figure"
PUBLISH, MODELS, END = "publish", "models", "end"


def tracking_folder(root: Path) -> Path:
    """Where the spools of a project lie."""
    return root / paths.WORK / "tracking"


def spools(root: Path) -> list[Path]:
    """The project's spools, oldest first; one that is still being made starts with a dot.

    Raises:
        OSError: the place can't be read.
    """
    folder = tracking_folder(root)
    if not folder.is_dir():
        return []
    return sorted((spool for spool in folder.iterdir() if _is_spool(spool)), key=_number)


def _is_spool(path: Path) -> bool:
    return NAME.match(path.name) is not None and path.is_dir()


def _number(spool: Path) -> int:
    return int(spool.name.partition("-")[0])


def _next_number(root: Path) -> int:
    return max([time.time_ns(), *(_number(spool) + 1 for spool in spools(root))])


def now_ms() -> int:
    """MLflow's time."""
    return time.time_ns() // 1_000_000


class Spool:
    """A spool as its stage sees it.

    Where it can't be made, it warns and does nothing any more. Where the disk is full later on, it warns once and holds
    in memory what it can't write until it can.

    Args:
        root: the project's root.
        name: stage, arm and seed, for the folder's name.
        uri: the store that it is for.

    Attributes:
        is_kept: whether all of it is on disk so far.
    """

    def __init__(self, root: Path, name: str, uri: str) -> None:
        self._name, self._num_files, self._has_warned, self.is_kept = name, 0, False, True
        self._descriptor: int | None = None
        self._pending = bytearray()
        try:
            self._create(root, uri)
        except OSError as error:
            self.close()
            self.is_kept = False
            self._warn(f"nothing that {name} logs can be kept for MLflow ({_why(error)})")

    def append(self, event: str, **fields: Any) -> None:
        """Write an event: one whole line at once, so that a killed stage leaves a valid beginning."""
        if self._descriptor is not None:
            line = json.dumps({"event": event, "time_ms": now_ms(), **fields}) + "\n"
            self._pending += line.encode()
            self._write_pending(self._descriptor)

    def add_file(self, file: Path) -> None:
        """Copy a file into the spool and write an event of it; a file that can't be copied is left out."""
        if self._descriptor is None:
            return
        copy = self._folder / str(self._num_files) / file.name  # each in a folder: MLflow shows the name
        self._num_files += 1
        try:
            copy.parent.mkdir()
            shutil.copyfile(file, copy)
        except OSError as error:
            shutil.rmtree(copy.parent, ignore_errors=True)
            self._warn(f"{file.name} of {self._name} can't be kept for MLflow ({_why(error)})")
        else:
            self.append(FIGURE, file=str(copy.relative_to(self._folder)))

    def close(self) -> None:
        """Let go of the spool: it is complete."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _create(self, root: Path, uri: str) -> None:
        """Make the folder beside and rename it: the sender must not see it before it is locked."""
        self._folder = tracking_folder(root) / f"{_next_number(root)}-{os.getpid()}-{self._name}"
        building = self._folder.with_name(f".{self._folder.name}")
        try:
            building.mkdir(parents=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._descriptor = os.open(building / EVENTS, flags, 0o600)  # the URI may hold a password
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.append("spool", uri=uri, cwd=str(Path.cwd()), pid=os.getpid(), host=socket.gethostname())
            building.rename(self._folder)
        except OSError:
            shutil.rmtree(building, ignore_errors=True)
            raise

    def _write_pending(self, descriptor: int) -> None:
        try:
            while self._pending:
                del self._pending[: _write(descriptor, self._pending)]
            self.is_kept = True
        except OSError as error:
            self.is_kept = False
            self._warn(
                f"what {self._name} logs can't be written to {os.path.relpath(self._folder)} ({_why(error)}): what was "
                "written before is sent by the next stage or by `maskdm sync`, the rest if there is space again before "
                "the stage ends"
            )
            if len(self._pending) > MAX_PENDING_BYTES:
                self.close()

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            print(
                f"warning: tracking: {what}. The results are complete without it; `maskdm report` brings them to "
                "MLflow later.",
                file=sys.stderr,
                flush=True,
            )
        self._has_warned = True


class Event(NamedTuple):
    """An event of a spool.

    Attributes:
        kind: what it is.
        fields: its content.
        end: the offset behind its line.
    """

    kind: str
    fields: dict[str, Any]
    end: int


@dataclass
class Progress:
    """How far a spool has been sent.

    Attributes:
        offset: the bytes of events.jsonl that are in MLflow.
        run_id: the stage's run there.
        ended: whether the end of that run has been sent.
        is_continued: whether an earlier process had made that run.
    """

    offset: int = 0
    run_id: str | None = None
    ended: bool = False
    is_continued: bool = False


class SpoolReader:
    """A spool as the sender sees it; it may still be growing.

    Args:
        folder: the spool.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._events = folder, folder / EVENTS
        self.progress = self._load_progress()

    @cached_property
    def uri(self) -> str | None:
        """The store that the spool is for; None where a power cut has left no readable first event."""
        first = next(self._read(0), None)
        return None if first is None or first.kind != "spool" else str(first.fields["uri"])

    @property
    def is_live(self) -> bool:
        """Whether its writer still holds it."""
        with self._events.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @property
    def is_sent(self) -> bool:
        """Whether there is nothing to send now: of a spool whose writer is gone, there still is its end."""
        return self.is_live and self._events.stat().st_size == self.progress.offset

    @property
    def changed_ms(self) -> int:
        """When the last event was written."""
        return self._events.stat().st_mtime_ns // 1_000_000

    def unsent(self) -> Iterator[Event]:
        """The events that are not in MLflow yet."""
        return self._read(self.progress.offset)

    def mark(self, **changes: Any) -> None:
        """Note how far the spool has been sent; a killed sender goes on from there."""
        self.progress = Progress(**{**asdict(self.progress), **changes})
        building = self.folder / (PROGRESS + ".building")
        building.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        building.replace(self.folder / PROGRESS)

    def remove(self) -> None:
        """Delete the spool: all of it is in MLflow."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load_progress(self) -> Progress:
        try:
            return Progress(**json.loads((self.folder / PROGRESS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or cut by a power loss: sending twice does no harm
            return Progress()

    def _read(self, offset: int) -> Iterator[Event]:
        with self._events.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # torn by a kill, or just being written
                    return
                offset += len(line)
                yield _parse(line, offset)


def _parse(line: bytes, end: int) -> Event:
    try:
        fields = json.loads(line)
        return Event(fields.pop("event"), fields, end)
    except (ValueError, KeyError, AttributeError):
        return Event("unreadable", {}, end)


def _write(descriptor: int, content: bytearray) -> int:
    """Write some of it, and say how many bytes."""
    written = os.write(descriptor, content)
    if written == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return written


def _why(error: OSError) -> str:
    return error.strerror or str(error)
