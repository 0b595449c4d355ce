"""DVC's own locks: entries of processes that are gone, or that are something else by now, and damaged files.

`.dvc/tmp/rwlock` says which process reads and writes which path. DVC drops the entries of pids that do not exist. It
refuses to work where such a pid exists, whatever it is by now: another process, or one that died and was not buried.
`.dvc/tmp/lock` and `rwlock.lock` are held through the kernel, which frees them, unless `core.hardlink_lock` is set.
"""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from maskdm import paths
from maskdm.doctor import processes
from maskdm.doctor.findings import Finding, counted, info, ok, problem
from maskdm.errors import UserError

RWLOCK, GUARD, REPO_LOCK = "rwlock", "rwlock.lock", "lock"
READ_TRIES, READ_PAUSE_SECONDS = 3, 0.1  # DVC rewrites the file in place: it may be cut for a moment
GUARD_SECONDS = 3.0

Entry = dict[str, Any]  # {"pid": 123, "cmd": "/path/to/dvc repro"}


class UnreadableError(Exception):
    """The file is not what DVC writes."""


def check() -> list[Finding]:
    """Look at the locks of the project's DVC."""
    root = paths.project_root()
    if not (root / ".dvc").is_dir():
        return [info("no DVC project here or above: DVC's locks were not looked for")]
    found = [*_check_rwlock(root), *_check_hardlinks(root)]
    return found or [ok("its locks: nothing stands in the way")]


def config(root: Path) -> configparser.ConfigParser:
    """The project's DVC settings, those of this machine included; what can't be read is left out."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, allow_no_value=True)
    for name in ("config", "config.local"):
        try:
            parser.read(root / ".dvc" / name, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
    return parser


def _check_rwlock(root: Path) -> list[Finding]:
    file = _tmp(root) / RWLOCK
    try:
        entries = _entries(_read(file))
    except FileNotFoundError:
        return []
    except UnreadableError as error:
        return [
            problem(
                f"{_shown(file)} is damaged ({error}): every DVC command that runs or checks a stage fails",
                f"remove it while DVC is not running: rm {_shown(file)}",
                partial(_remove_damaged, root),
            )
        ]
    commands = {(entry["pid"], entry["cmd"]) for entry in entries}
    return [finding for pid, cmd in sorted(commands) if (finding := _judge(root, pid, cmd))]


def _judge(root: Path, pid: int, cmd: str) -> Finding | None:
    """What an entry of the file means; None where DVC drops it by itself.

    Args:
        root: the project's.
        pid: of the entry.
        cmd: of the entry: DVC's words, as its `sys.argv` has them.
    """
    program, _, arguments = cmd.partition(" ")
    said = f"process {pid} ({f'{Path(program).name} {arguments}'.strip()})"
    if not psutil.pid_exists(pid) or pid == os.getpid():
        return None
    process = processes.find(pid)
    if process is not None and _is_that(process, cmd, arguments):
        return info(f"DVC is at work: {said}")
    now = "is dead, though its parent has not noticed yet" if process is None else f"is now {processes.shown(process)}"
    moment = "type your command again in a moment; " if process is None else ""
    return problem(
        f"{_shown(_tmp(root) / RWLOCK)} says that {said} is at work; that process {now}. "
        "DVC believes the file and fails: “… is busy, it is being blocked by …”",
        f"{moment}unless that DVC runs on another machine that shares this folder: rm {_shown(_tmp(root) / RWLOCK)}",
        partial(_drop, root, pid),
    )


def _is_that(process: psutil.Process, cmd: str, arguments: str) -> bool:
    """Whether a process is the command of an entry; a second one of the same pid and words is not refused by DVC."""
    words = " ".join(processes.command_line(process))
    return cmd in words or (processes.engine_of(process) == "dvc" and words.endswith(arguments))


def _check_hardlinks(root: Path) -> list[Finding]:
    """With `core.hardlink_lock`, a lock is a file that stays when its process is killed."""
    if config(root).get("core", "hardlink_lock", fallback="false").lower() not in ("true", "1", "yes", "on"):
        return []
    left = [_tmp(root) / name for name in (REPO_LOCK, GUARD) if (_tmp(root) / name).exists()]
    if not left or _dvc_at_work(root):
        return []
    return [
        problem(
            f"core.hardlink_lock is set and {_shown(file)} was left by a DVC that is gone: DVC waits for it in vain",
            f"unless DVC runs on another machine that shares this folder: rm {_shown(file)}",
            partial(_remove, file),
        )
        for file in left
    ]


def _drop(root: Path, pid: int) -> str:
    """Take the entries of a pid out of the file, under DVC's own guard."""
    file = _tmp(root) / RWLOCK
    with _guarded(root):
        content = _read(file)
        write = {path: entry for path, entry in content.get("write", {}).items() if entry["pid"] != pid}
        read = {path: [e for e in entries if e["pid"] != pid] for path, entries in content.get("read", {}).items()}
        building = file.with_name(f"{file.name}.building")
        building.write_text(json.dumps({"write": write, "read": {p: e for p, e in read.items() if e}}))
        building.replace(file)
    return f"took process {pid} out of {_shown(file)}"


def _remove_damaged(root: Path) -> str:
    """Remove the file, unless a DVC at work would miss its entries."""
    if working := _dvc_at_work(root):
        raise UserError(f"DVC is at work here (process {working[0].pid}): wait for it or stop it first")
    with _guarded(root):
        return _remove(_tmp(root) / RWLOCK)


def _remove(file: Path) -> str:
    file.unlink(missing_ok=True)
    return f"removed {_shown(file)}"


def _dvc_at_work(root: Path) -> list[psutil.Process]:
    return [process for process in processes.engines_at_work(root) if processes.engine_of(process) == "dvc"]


@contextmanager
def _guarded(root: Path) -> Iterator[None]:
    """Keep DVC from rewriting the file meanwhile, with the lock that it uses itself.

    Raises:
        UserError: somebody keeps it.
    """
    with (_tmp(root) / GUARD).open("a") as guard:
        deadline = time.monotonic() + GUARD_SECONDS
        while not _try_lock(guard.fileno()):
            if time.monotonic() > deadline:
                raise UserError(f"a DVC process keeps {_shown(_tmp(root) / GUARD)}: try again when it has ended")
            time.sleep(READ_PAUSE_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: Path) -> dict[str, Any]:
    """The content of the file.

    Raises:
        UnreadableError: it is not what DVC writes, and stays so.
    """
    for _ in range(READ_TRIES - 1):
        try:
            return _parse(file)
        except UnreadableError:
            time.sleep(READ_PAUSE_SECONDS)
    return _parse(file)


def _parse(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    try:
        content = json.loads(raw)
        _entries(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnreadableError("empty" if not raw else f"{counted(len(raw), 'byte')} that DVC can't read") from None
    return dict(content)


def _entries(content: dict[str, Any]) -> list[Entry]:
    """Every entry, checked as DVC checks it."""
    _expect(not content.keys() - {"write", "read"})
    write, read = content.get("write", {}), content.get("read", {})
    entries = [*write.values(), *(entry for readers in read.values() for entry in readers)]
    for entry in entries:
        _expect(entry.keys() == {"pid", "cmd"} and isinstance(entry["pid"], int) and isinstance(entry["cmd"], str))
    return entries


def _expect(is_so: bool) -> None:
    if not is_so:
        raise TypeError


def _tmp(root: Path) -> Path:
    return root / ".dvc" / "tmp"


def _shown(file: Path) -> str:
    return os.path.relpath(file)
