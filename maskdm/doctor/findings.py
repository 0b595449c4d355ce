"""What a check found: how bad it is, what it means, what to do, and how to do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Mark(StrEnum):
    """How bad a finding is; only a problem makes the command fail."""

    OK = "ok"
    INFO = "info"
    PROBLEM = "problem"
    FIXED = "fixed"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        mark: how bad it is.
        text: what is so, and what it means.
        advice: what to do; empty where there is nothing to do.
        fix: does it, and returns what was done; raises UserError or OSError where it can't. None: nothing to do, or
            nothing that is the doctor's to do.
    """

    mark: Mark
    text: str
    advice: str = ""
    fix: Callable[[], str] | None = None


def ok(text: str) -> Finding:
    """All is well."""
    return Finding(Mark.OK, text)


def info(text: str, advice: str = "", fix: Callable[[], str] | None = None) -> Finding:
    """Good to know; nothing stands in the way."""
    return Finding(Mark.INFO, text, advice, fix)


def problem(text: str, advice: str = "", fix: Callable[[], str] | None = None) -> Finding:
    """Stands in the way, now or later."""
    return Finding(Mark.PROBLEM, text, advice, fix)


def counted(number: int, what: str, plural: str | None = None) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {what if number == 1 else plural or what + 's'}"


def files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file and folder below a folder, links not followed; none where it can't be read or has just gone."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(Path(entry.path))


def size_of(path: Path) -> int:
    """Bytes in a file, or in all files below a folder; 0 where it is gone."""
    return sum(_bytes(Path(entry.path)) for entry in files_below(path)) if path.is_dir() else _bytes(path)


def _bytes(path: Path) -> int:
    try:
        return 0 if path.is_dir() else path.lstat().st_size
    except OSError:
        return 0
