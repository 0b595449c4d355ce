"""The results of a benchmark: tables, and targets that hold or do not; and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from tabulate import tabulate

from benchmarks.timing import Spread

Cell = str | int | float | Spread | None  # None: not measured


@dataclass(frozen=True)
class Target:
    """A promise about a number.

    Attributes:
        what: the number in words.
        bound: what is promised; NaN until it is measured, if it is measured itself.
        sense: whether the value must be at most or at least the bound.
        value: the measurement; NaN before.
    """

    what: str
    bound: float
    sense: Literal["at most", "at least"] = "at most"
    value: float = float("nan")

    @property
    def is_met(self) -> bool:
        """Whether the promise holds; False without a value."""
        return self.value <= self.bound if self.sense == "at most" else self.value >= self.bound

    def measured(self, value: float, bound: float | None = None) -> Target:
        """The same promise with a measurement, and with a bound if that is measured too."""
        return replace(self, value=value, bound=self.bound if bound is None else bound)


@dataclass(frozen=True)
class Table:
    """Rows with the same columns.

    Attributes:
        title: what is measured.
        rows: column → cell.
        note: a remark for readers.
    """

    title: str
    rows: list[dict[str, Cell]]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The results of one benchmark.

    Attributes:
        tables: the measurements.
        targets: the promises about them.
        notes: remarks, such as why something was not measured.
    """

    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For records, with every measurement behind every cell."""
        tables = [
            {
                "title": table.title,
                "note": table.note,
                "rows": [
                    {k: v.as_dict() if isinstance(v, Spread) else v for k, v in row.items()} for row in table.rows
                ],
            }
            for table in self.tables
        ]
        targets = [{**asdict(target), "is_met": target.is_met} for target in self.targets]
        return {"tables": tables, "targets": targets, "notes": self.notes}


def render(outcome: Mapping[str, Any], style: str, has_verdicts: bool = True) -> str:
    """An outcome of a record as text.

    Args:
        outcome: `Outcome.as_dict`.
        style: of `tabulate`: `simple` for a terminal, `github` for Markdown.
        has_verdicts: whether to say which targets hold.
    """
    bold = "**" if style == "github" else ""
    parts: list[str] = []
    for table in outcome["tables"]:
        rows = [{column: show(cell) for column, cell in row.items()} for row in table["rows"]]
        parts += [f"{bold}{table['title']}{bold}", _table(rows, style)]
        parts += [table["note"]] if table["note"] else []
    if outcome["targets"]:
        parts.append(render_targets(outcome["targets"], style, has_verdicts))
    return "\n\n".join([*parts, *outcome["notes"]])


def render_targets(targets: Sequence[Mapping[str, Any]], style: str, has_verdicts: bool = True) -> str:
    """The targets of records as a table; see `render`."""
    rows = [
        {
            "target": target["what"],
            "measured": show(target["value"]),
            "promised": f"{target['sense']} {show(target['bound'])}",
            **({"holds": "yes" if target["is_met"] else "NO"} if has_verdicts else {}),
        }
        for target in targets
    ]
    return _table(rows, style)


def show(cell: Any) -> str:
    """A cell of a record as text: the median, and the quartiles if they differ visibly."""
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


def _table(rows: Sequence[Mapping[str, str]], style: str) -> str:
    return tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True)
