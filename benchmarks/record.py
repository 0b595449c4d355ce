"""Records: one JSON file per run, with the machine, every measurement and every target."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import slug
from benchmarks.outcome import render, render_targets
from maskdm.base.errors import UserError

FORMAT = "maskdm-benchmarks/1"
FOLDER = Path(__file__).parent / "records"


def path_for(about: Mapping[str, Any], is_full: bool) -> Path:
    """The default path of a record.

    Args:
        about: the machine, from `machine.describe`.
        is_full: whether the run measures everything; only such records are kept, by day, machine and commit.
    """
    if not is_full:
        return Path(tempfile.mkdtemp(prefix="maskdm-bench-record-")) / "record.json"
    return FOLDER / f"{about['date'][:10]}-{slug(about)}-{(about['git_commit'] or 'no-git')[:7]}.json"


def create_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a new record, before anything is measured.

    Raises:
        UserError: there is already a file, or the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(_text(record))
    except OSError as error:
        if path.exists():
            raise UserError(
                f"{path} exists; records are never overwritten: remove it, or choose another --out"
            ) from None
        raise UserError(f"cannot write the record {path}: {error.strerror}; name another place by --out") from None


def replace_record(record: Mapping[str, Any], path: Path) -> None:
    """Replace the record of this run atomically."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(_text(record), encoding="utf-8")
    new.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        UserError: the file is missing, or is not a record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the record {path}: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not a record of the benchmarks ({FORMAT}); `python -m benchmarks` writes them")
    return record


def header(record: Mapping[str, Any]) -> str:
    """Machine, threads, rounds and commit, with warnings about quick and unfinished runs."""
    about = record["machine"]
    names = [about["cpu"], *([about["gpu"]] if about["gpu"] else [])]
    counts = [f"{about['cores']} cores", f"{about['threads']} threads", f"{record['rounds']} rounds"]
    commit = f"commit {(about['git_commit'] or 'unknown')[:7]}{' DIRTY' if about['git_dirty'] else ''}"
    lines = [", ".join([*names, *counts, commit, about["date"]])]
    if record["is_quick"]:
        lines.append("QUICK: proves nothing")
    if not record["is_complete"]:
        lines.append("INCOMPLETE: the run was interrupted")
    return "\n".join(lines)


def section(record: Mapping[str, Any], name: str, style: str) -> str:
    """The tables and targets of a benchmark in a record; see `render` for the style."""
    return render(record["benchmarks"][name], style, not record["is_quick"])


def summary(record: Mapping[str, Any], style: str = "simple") -> str:
    """All targets of a record, and how many hold; see `render` for the style."""
    targets = [target for outcome in record["benchmarks"].values() for target in outcome["targets"]]
    held = sum(target["is_met"] for target in targets)
    verdict = "QUICK: proves nothing" if record["is_quick"] else f"{held} of {len(targets)} targets hold"
    return f"{render_targets(targets, style, not record['is_quick'])}\n\n{verdict}"


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by null, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
