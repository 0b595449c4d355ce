"""What a benchmark gives: tables of rows, and targets that hold or do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate

from benchmarks.timing import Spread

Cell = str | int | float | Spread | None  # None: not measured


@dataclass(frozen=True)
class Target:
    """A promise about a number.

    Attributes:
        what: the number in words.
        value: what was measured; None before.
        bound: what was promised; None where that is measured too, and was not yet.
        sense: whether the value must be at most or at least the bound.
    """

    what: str
    value: float | None
    bound: float | None
    sense: str = "at most"

    def __post_init__(self) -> None:
        if self.sense not in ("at most", "at least"):
            raise ValueError(f"expected sense 'at most' or 'at least', got {self.sense!r}")

    @property
    def is_met(self) -> bool:
        """Whether the promise holds; without a number it never does."""
        if self.value is None or self.bound is None:
            return False
        return self.value <= self.bound if self.sense == "at most" else self.value >= self.bound

    def measured(self, value: float, bound: float | None = None) -> Target:
        """The same promise with a number.

        Args:
            value: what was measured.
            bound: where it was measured too.
        """
        return replace(self, value=value, bound=self.bound if bound is None else bound)

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


def render(outcome: Mapping[str, Any], style: str, has_verdicts: bool = True) -> str:
    """An outcome of a record as text.

    Args:
        outcome: `Outcome.as_dict`.
        style: of `tabulate`: `simple` for a terminal, `github` for Markdown.
        has_verdicts: whether to say which targets hold.
    """
    bold = "**" if style == "github" else ""
    parts = [text for table in outcome["tables"] for text in _render_table(table, style, bold)]
    if outcome["targets"]:
        parts.append(render_targets(outcome["targets"], style, has_verdicts))
    return "\n\n".join([*parts, *outcome["notes"]])


def _render_table(table: Mapping[str, Any], style: str, bold: str) -> list[str]:
    rows = [{column: show(cell) for column, cell in row.items()} for row in table["rows"]]
    shown = tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)
    return [f"{bold}{table['title']}{bold}", shown, *([table["note"]] if table["note"] else [])]


def render_targets(
    targets: Sequence[Mapping[str, Any]],
    style: str,
    has_verdicts: bool = True,
    not_measured: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Targets as a table.

    Args:
        targets: `Target.as_dict` of each.
        style: see `render`.
        has_verdicts: whether to say which of them hold.
        not_measured: further ones, that nothing is known of.
    """
    rows = [_target_row(target, show(target["value"]), "yes" if target["is_met"] else "NO") for target in targets]
    rows += [_target_row(target, "not measured", show(None)) for target in not_measured]
    if not has_verdicts:
        rows = [{column: cell for column, cell in row.items() if column != "holds"} for row in rows]
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)


def _target_row(target: Mapping[str, Any], measured: str, holds: str) -> dict[str, str]:
    promised = f"{target['sense']} {show(target['bound'])}"
    return {"target": target["what"], "measured": measured, "promised": promised, "holds": holds}


def show(cell: Any) -> str:
    """A cell of a record: the median, and the quartiles where they differ from it to be seen."""
    if cell is None:
        return "–"
    if isinstance(cell, Mapping):
        middle, low, high = (show(cell[key]) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} [{low}, {high}]"
    return _number(cell) if isinstance(cell, float) else str(cell)


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0 or not abs(value) < 1e15:
        return f"{value:g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"
