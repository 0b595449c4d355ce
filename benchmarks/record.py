"""Records: one JSON file per run, with the machine, every measurement and every target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.machine import slug
from benchmarks.outcome import show
from maskdm.errors import UserError

FORMAT = "maskdm-benchmarks/1"
FOLDER = Path(__file__).parent / "records"


def default_path(record: dict[str, Any]) -> Path:
    """Where a record is kept: by its day and machine."""
    about = record["machine"]
    return FOLDER / f"{about['date'][:10]}-{slug(about)}.json"


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        UserError: it is missing, or something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the record {path}: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no record of the benchmarks ({FORMAT}); `python -m benchmarks` writes them")
    return record


def summary(record: dict[str, Any]) -> str:
    """Which targets hold."""
    targets = [target for outcome in record["benchmarks"].values() for target in outcome["targets"]]
    if not targets:
        return "no target was measured"
    rows = [
        [t["what"], show(t["value"]), f"{t['sense']} {show(t['bound'])}", "yes" if t["is_met"] else "NO"]
        for t in targets
    ]
    held = sum(target["is_met"] for target in targets)
    table = tabulate(rows, headers=["target", "measured", "promised", "holds"], disable_numparse=True)
    return f"{table}\n\n{held} of {len(targets)} targets hold"
