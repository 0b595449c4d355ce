"""`maskdm doctor` from the checks to the report."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from maskdm.doctor import (
    clock,
    dvc_locks,
    installation,
    leftovers,
    room,
    stages_at_work,
    unsent,
    work_folders,
)
from maskdm.doctor.findings import Finding, Mark, counted, problem
from maskdm.errors import UserError

# In this order: an orphan must have stopped before its leftovers go, and those before the room is looked at.
CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "params.yaml and packages": installation.check,
    "DVC": dvc_locks.check,
    "stages at work": stages_at_work.check,
    "saved work": work_folders.check,
    "half-built outputs": leftovers.check,
    "clock": clock.check,
    "room": room.check,
    "MLflow": unsent.check,
}
MARK_WIDTH = 9
MIN_WIDTH, MAX_WIDTH = 60, 110


def run(fix: bool) -> int:
    """Look at the experiment in the working directory, and print what was found.

    Args:
        fix: whether to mend what can be mended.

    Returns:
        the exit code: 0 where there is no problem, or none any more.
    """
    print(f"maskdm doctor in {Path.cwd()}\n", flush=True)
    found: list[Finding] = []
    for title, check in CHECKS.items():
        print(title, flush=True)
        for finding in _look(check):
            result = _mend(finding) if fix and finding.fix is not None else finding
            print(_lines(result), flush=True)
            found.append(result)
    print(f"\n{verdict(found, fix)}", flush=True)
    return int(any(finding.mark is Mark.PROBLEM for finding in found))


def verdict(found: list[Finding], fix: bool) -> str:
    """All findings in one line."""
    counts = Counter(finding.mark for finding in found)
    problems, fixed = counts[Mark.PROBLEM], counts[Mark.FIXED]
    fixable = [finding.mark for finding in found if finding.fix is not None and not fix]
    parts = [f"{fixed} fixed"] if fixed else []
    parts += [counted(problems, "problem") + (" left" if fixed else "") if problems else "no problem"]
    text = ", ".join(parts)
    if Mark.PROBLEM in fixable:
        mended = fixable.count(Mark.PROBLEM)
        which = f"{mended} of them" if mended < problems else "it" if problems == 1 else "them"
        return f"{text}; `maskdm doctor --fix` mends {which}"
    if fixable:
        return f"{text}; `maskdm doctor --fix` would tidy up"
    return text


def _look(check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; what keeps it from looking is a finding too."""
    try:
        return check()
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        return [problem(f"can't look{place}: {room.words_of(error)}", "mend this first, then ask again")]


def _mend(finding: Finding) -> Finding:
    assert finding.fix is not None
    try:
        done = finding.fix()
    except (UserError, OSError) as error:
        why = room.words_of(error) if isinstance(error, OSError) else str(error)
        return replace(finding, advice=f"could not be mended: {why}\n{finding.advice}")
    return replace(finding, mark=Mark.FIXED, advice=done)


def _lines(finding: Finding) -> str:
    """A finding with its mark, its further lines indented, and an arrow before what to do or what was done."""
    indent = " " * (2 + MARK_WIDTH)
    first, *more = finding.text.splitlines()
    lines = _wrapped(first, f"  {finding.mark:<{MARK_WIDTH}}", indent)
    lines += [wrapped for line in more for wrapped in _wrapped(line, indent, indent)]
    lines += [
        wrapped for line in finding.advice.splitlines() for wrapped in _wrapped(line, f"{indent}→ ", f"{indent}  ")
    ]
    return "\n".join(lines)


def _wrapped(line: str, first: str, others: str) -> list[str]:
    """A line as lines of the terminal's width; a path or a command is never broken."""
    width = min(max(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MIN_WIDTH), MAX_WIDTH)
    return textwrap.wrap(
        line, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
