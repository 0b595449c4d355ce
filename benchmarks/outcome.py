"""What a benchmark gives: tables of rows, and targets that hold or do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from benchmarks.timing import Spread

Cell = str | int | float | Spread | None  # None: not measured


@dataclass(frozen=True)
class Target:
    """A promise about a number.

    Attributes:
        what: the number in words.
        value: what was measured.
        bound: what was promised.
        sense: whether the value must be at most or at least the bound.
    """

    what: str
    value: float
    bound: float
    sense: str = "at most"

    def __post_init__(self) -> None:
        if self.sense not in ("at most", "at least"):
            raise ValueError(f"expected sense 'at most' or 'at least', got {self.sense!r}")

    @property
    def is_met(self) -> bool:
        """Whether the promise holds; a number that is none never does."""
        return self.value <= self.bound if self.sense == "at most" else self.value >= self.bound

    def as_dict(self) -> dict[str, Any]:
        """For records."""
        return {
            "what": self.what,
            "value": self.value,
            "sense": self.sense,
            "bound": self.bound,
            "is_met": self.is_met,
        }


@dataclass(frozen=True)
class Table:
    """Rows with the same columns.

    Attributes:
        title: what is measured.
        rows: column → cell.
        note: what a reader has to know, if anything.
    """

    title: str
    rows: list[dict[str, Cell]]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For records: every measurement behind every cell."""
        rows = [{k: v.as_dict() if isinstance(v, Spread) else v for k, v in row.items()} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


@dataclass(frozen=True)
class Outcome:
    """Of one benchmark.

    Attributes:
        tables: what was measured.
        targets: what was promised about it.
        notes: why something was not measured.
    """

    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For records."""
        return {
            "tables": [table.as_dict() for table in self.tables],
            "targets": [target.as_dict() for target in self.targets],
            "notes": self.notes,
        }


def render(outcome: Mapping[str, Any], style: str) -> str:
    """An outcome of a record as text.

    Args:
        outcome: `Outcome.as_dict`.
        style: of `tabulate`: `simple` for a terminal, `github` for Markdown.
    """
    bold = "**" if style == "github" else ""
    parts = [text for table in outcome["tables"] for text in _render_table(table, style, bold)]
    if outcome["targets"]:
        parts.append(_render_targets(outcome["targets"], style))
    return "\n\n".join([*parts, *outcome["notes"]])


def _render_table(table: Mapping[str, Any], style: str, bold: str) -> list[str]:
    rows = [{column: show(cell) for column, cell in row.items()} for row in table["rows"]]
    shown = tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)
    return [f"{bold}{table['title']}{bold}", shown, *([table["note"]] if table["note"] else [])]


def _render_targets(targets: list[Mapping[str, Any]], style: str) -> str:
    rows = [
        {
            "target": target["what"],
            "measured": show(target["value"]),
            "promised": f"{target['sense']} {show(target['bound'])}",
            "holds": "yes" if target["is_met"] else "NO",
        }
        for target in targets
    ]
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def show(cell: Any) -> str:
    """A cell of a record: the median, and the quartiles where they differ from it to be seen."""
    if cell is None:
        return "–"
    if isinstance(cell, Mapping):
        middle, low, high = (_number(cell[key]) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} [{low}, {high}]"
    return _number(cell) if isinstance(cell, float) else str(cell)


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0 or not abs(value) < 1e15:
        return f"{value:g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"
