"""The final score as strategy × mask rate: where masking helps at a glance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maskdm.report.figures.axes import fid_text
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.looks import MISSING, WIDTH, family, short, twins
from maskdm.report.numbers import decimals, rate_text, signed

# Purple below scratch, orange above: apart for the colour-blind, pale in the middle, without the darkest ends.
COLORS = ListedColormap(mpl.colormaps["PuOr_r"](np.linspace(0.12, 0.88, 256)))
ROW_HEIGHT = 0.52  # inches
CELL_WIDTH = 0.56
FULL_ROW = 10  # cells of that width in a page's
GAP = 0.015  # inches around a cell
EMPTY_HATCH = "////"


@dataclass(frozen=True)
class Cell:
    """An arm's place in the map: row and column from the top left; the strip of an unmasked arm has no column."""

    arm: str
    row: int
    column: int | None


def _draw(shown: Shown) -> Figure:
    cells, rows, columns = _places(shown)
    width = max(WIDTH, 1.6 + CELL_WIDTH * len(columns))
    figure = Figure(figsize=(width, ROW_HEIGHT * len(rows) + 1.5), layout="constrained")
    axes, colors, across = figure.add_subplot(), _colors(shown), max(len(columns), 1)
    axes.set(xlim=(0, across), ylim=(len(rows), 0))
    taken = {(cell.row, cell.column) for cell in cells}
    for row in range(len(rows)):
        for column in range(across):
            if (row, None) not in taken and (row, column) not in taken:
                _box(axes, column, row, 1, facecolor="#FAFAFA", edgecolor="#CFCFCF", hatch=EMPTY_HATCH)
    for cell in cells:
        _draw_cell(axes, shown, cell, across, colors)
    _finish(axes, rows, columns)
    if colors is not None:
        _color_bar(figure, axes, colors, shown)
    return figure


def _places(shown: Shown) -> tuple[list[Cell], list[str], list[str]]:
    """The cells, the names of the rows, and those of the columns: realised rates, ascending."""
    params, twin = shown.params, twins(shown.params)
    masked = [arm for arm in params.arms if params.arm(arm).strategy != "none"]
    rates = {arm: params.realised_mask_rate_of(arm) for arm in masked}
    columns = sorted({rate_text(rate) for rate in rates.values()}, key=float)
    rows = [arm for arm in params.arms if arm not in masked]
    places: dict[tuple[str, int], int] = {}
    cells = [Cell(arm, row, None) for row, arm in enumerate(rows)]
    names = [short(arm, 18) for arm in rows]
    for arm in sorted(masked, key=lambda key: (_family_rank(shown, key), twin[key])):
        place = (family(params.arm(arm)), _level(shown, arm, rates))
        if place not in places:
            places[place] = len(names)
            names.append(place[0] if place[1] == 0 else f"as {short(arm, 15)}")
        cells.append(Cell(arm, places[place], columns.index(rate_text(rates[arm]))))
    return cells, names, columns


def _family_rank(shown: Shown, arm: str) -> int:
    names = list(dict.fromkeys(family(a) for a in shown.params.arms.values()))
    return names.index(family(shown.params.arm(arm)))


def _level(shown: Shown, arm: str, rates: dict[str, float]) -> int:
    """How many arms before it share an arm's family and column, usually 0: they get a row of their own."""
    before = list(rates)[: list(rates).index(arm)]
    ours = (family(shown.params.arm(arm)), rate_text(rates[arm]))
    return sum((family(shown.params.arm(other)), rate_text(rates[other])) == ours for other in before)


def _colors(shown: Shown) -> ScalarMappable | None:
    """Symmetric around scratch; at most as far as from scratch to a perfect score. None without scratch."""
    if shown.reference is None:
        return None
    limit = min(_largest(shown), shown.compared[shown.reference].scores[shown.headline.key].mean) or 1.0
    return ScalarMappable(Normalize(-limit, limit), COLORS)


def _largest(shown: Shown) -> float:
    """The largest difference to scratch, better or worse."""
    found = (one.against for one in shown.compared.values())
    return max((abs(against.score.difference.mean) for against in found if against is not None), default=0.0)


def _box(axes: Axes, column: float, row: float, width: float, **look: Any) -> None:
    x, y = GAP / CELL_WIDTH * (axes.get_xlim()[1] / FULL_ROW), GAP / ROW_HEIGHT
    axes.add_patch(Rectangle((column + x, row + y), width - 2 * x, 1 - 2 * y, linewidth=0.8, **look))


def _draw_cell(axes: Axes, shown: Shown, cell: Cell, across: int, colors: ScalarMappable | None) -> None:
    left, width = (0, across) if cell.column is None else (cell.column, 1)
    text, delta = _cell_text(shown, cell.arm, " · " if cell.column is None else "\n")
    middle = (left + width / 2, cell.row + 0.5)
    if text is None:
        _box(axes, left, cell.row, width, facecolor="white", edgecolor=MISSING, linestyle=(0, (3, 2)))
        axes.text(*middle, "missing", ha="center", va="center", fontsize=8, style="italic", color="#444444")
        return
    fill = "white" if delta is None or colors is None else colors.to_rgba(np.array(delta))
    _box(axes, left, cell.row, width, facecolor=fill, edgecolor="black" if delta is None else "none")
    axes.text(*middle, text, ha="center", va="center", fontsize=8, linespacing=1.25, color=_ink(fill))


def _cell_text(shown: Shown, arm: str, between: str) -> tuple[str | None, float | None]:
    """What a cell says, and its difference to scratch; None where there is none."""
    one = shown.compared[arm]
    if not one.num_seeds:
        return None, None
    score = one.scores[shown.headline.key].mean
    delta = None if one.against is None else one.against.score.difference.mean
    lines = [fid_text(score)]
    if delta is not None:
        lines.append(signed(delta, decimals(pd.Series([score]))))
    if one.num_seeds == 1 or one.num_seeds < len(shown.params.seeds):
        lines.append(f"n={one.num_seeds}")
    if between != "\n":
        lines[0] = f"{shown.headline.name} {lines[0]}"
    return between.join(lines), delta


def _ink(fill: Any) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue, _ = mpl.colors.to_rgba(fill)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _finish(axes: Axes, rows: list[str], columns: list[str]) -> None:
    axes.set_xticks([index + 0.5 for index in range(len(columns))], columns)
    axes.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    axes.set_xlabel("realised mask rate in pretraining" if columns else "")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _color_bar(figure: Figure, axes: Axes, colors: ScalarMappable, shown: Shown) -> None:
    place: dict[str, Any] = {"orientation": "horizontal", "aspect": 50, "pad": 0.02, "fraction": 0.06, "shrink": 0.6}
    is_clipped = _largest(shown) > (colors.get_clim()[1] or 0.0)
    bar = figure.colorbar(colors, ax=axes, extend="max" if is_clipped else "neither", **place)
    bar.set_label(f"{shown.headline.name} less {short(str(shown.reference))}'s (negative, purple: better)")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(_signed_tick))


def _signed_tick(value: float, _: int) -> str:
    return "0" if math.isclose(value, 0, abs_tol=1e-12) else f"{value:+.4g}".replace("-", "−")


def _caption(shown: Shown) -> str:
    reference = shown.reference
    parts = [f"Mean {shown.headline.name} at the end of the budget"]
    if reference is not None:
        parts.append(f", and under it the difference to {reference}, paired by seed; colours follow the difference")
    parts.append(". Hatched: no such arm.")
    if shown.missing_arms:
        parts.append(" Dashed frame: the arm has no result.")
    if any(0 < one.num_seeds < max(len(shown.params.seeds), 2) for one in shown.compared.values()):
        parts.append(" n: number of seeds, where there is one, or fewer than asked for.")
    return "".join(parts) + " “Each arm against scratch” shows how sure a difference is."


def _alt(shown: Shown) -> str:
    texts = ((arm, _cell_text(shown, arm, ", ")[0] or "missing") for arm in shown.params.arms)
    said = "; ".join(f"{arm}: {text}" for arm, text in texts)
    return f"Table of final {shown.headline.name}s by strategy and mask rate: {said}."


def _applies(shown: Shown) -> bool:
    return any(arm.strategy != "none" for arm in shown.params.arms.values())


HEAT_MAP = Kind(
    "fid_heat_map.png", "Final {score} by strategy and mask rate", _draw, _caption, _alt, _applies, has_scores=True
)
