"""The final score as strategy × mask rate: where masking helps at a glance."""

from __future__ import annotations

from collections import Counter
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

from maskdm.report.comparison import Findings
from maskdm.report.figures.axes import Kind, signed_tick
from maskdm.report.figures.looks import MISSING, REMARK, WIDTH, family, short, twins
from maskdm.report.numbers import decimals, rate_text, score_text, signed

# Purple below scratch, orange above: apart for the colour-blind, pale in the middle, without the darkest ends.
COLORS = ListedColormap(mpl.colormaps["PuOr_r"](np.linspace(0.12, 0.88, 256)))
ROW_HEIGHT = 0.52  # inches
CELL_WIDTH = 0.56
FULL_ROW = 10  # cells of that width in a page's
GAP = 0.015  # inches around a cell


def _draw(found: Findings) -> Figure:
    cells, rows, columns = _places(found)
    across = max(len(columns), 1)
    figure = Figure(
        figsize=(max(WIDTH, 1.6 + CELL_WIDTH * len(columns)), ROW_HEIGHT * len(rows) + 1.5), layout="constrained"
    )
    axes, colors = figure.add_subplot(), _colors(found)
    axes.set(xlim=(0, across), ylim=(len(rows), 0))
    taken = set(cells.values())
    for row in range(len(rows)):
        for column in range(across):
            if (row, None) not in taken and (row, column) not in taken:
                _box(axes, column, row, 1, facecolor="#FAFAFA", edgecolor="#CFCFCF", hatch="////")
    for arm, (row, place) in cells.items():
        _draw_cell(axes, found, arm, row, (0, across) if place is None else (place, 1), colors)
    axes.set_xticks([index + 0.5 for index in range(len(columns))], columns)
    axes.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    axes.set_xlabel("realised mask rate in pretraining" if columns else "")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if colors is not None:
        _color_bar(figure, axes, colors, found)
    return figure


def _places(found: Findings) -> tuple[dict[str, tuple[int, int | None]], list[str], list[str]]:
    """By arm its row and column, the names of the rows, and those of the columns: realised rates, ascending.

    An arm without masking has a row of its own, and no column. Of arms with the same family and rate each but the
    first gets a row of its own.
    """
    params, twin, masked = found.params, twins(found.params), found.masked
    rates = {arm: rate_text(params.mask_of(arm).realised_mask_rate) for arm in masked}
    columns = sorted(set(rates.values()), key=float)
    unmasked = [arm for arm in params.arms if arm not in masked]
    cells: dict[str, tuple[int, int | None]] = {arm: (row, None) for row, arm in enumerate(unmasked)}
    names = [short(arm, 18) for arm in unmasked]
    of_family = {arm: family(config) for arm, config in params.arms.items()}
    families, before, levels = list(dict.fromkeys(of_family.values())), Counter[tuple[str, str]](), {}
    for arm in masked:
        levels[arm] = before[of_family[arm], rates[arm]]
        before[of_family[arm], rates[arm]] += 1
    row_of: dict[tuple[str, int], int] = {}
    for arm in sorted(masked, key=lambda key: (families.index(of_family[key]), twin[key])):
        place = (of_family[arm], levels[arm])
        if place not in row_of:
            row_of[place] = len(names)
            names.append(place[0] if place[1] == 0 else f"as {short(arm, 15)}")
        cells[arm] = (row_of[place], columns.index(rates[arm]))
    return cells, names, columns


def _colors(found: Findings) -> ScalarMappable | None:
    """Symmetric around scratch; at most as far as from scratch to a perfect score. None without scratch."""
    if found.baseline is None:
        return None
    limit = min(_largest(found), found.compared[found.baseline].scores[found.headline.key].mean) or 1.0
    return ScalarMappable(Normalize(-limit, limit), COLORS)


def _largest(found: Findings) -> float:
    """The largest difference to scratch, better or worse."""
    return max((abs(against.score.difference.mean) for against in found.against.values()), default=0.0)


def _box(axes: Axes, column: float, row: float, width: float, **look: Any) -> None:
    x, y = GAP / CELL_WIDTH * (axes.get_xlim()[1] / FULL_ROW), GAP / ROW_HEIGHT
    axes.add_patch(Rectangle((column + x, row + y), width - 2 * x, 1 - 2 * y, linewidth=0.8, **look))


def _draw_cell(
    axes: Axes, found: Findings, arm: str, row: int, place: tuple[int, int], colors: ScalarMappable | None
) -> None:
    """An arm's score and difference on its colour; `place` is its column and its width in columns."""
    left, width = place
    middle = (left + width / 2, row + 0.5)
    look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
    lines, delta = _cell_lines(found, arm)
    if not lines:
        _box(axes, left, row, width, facecolor="white", edgecolor=MISSING, linestyle=(0, (3, 2)))
        axes.text(*middle, "missing", style="italic", color=REMARK, **look)
        return
    text = "\n".join(lines)
    if arm not in found.masked:
        text = " · ".join([f"{found.headline.name} {lines[0]}", *lines[1:]])
    fill: Any = "white" if delta is None or colors is None else colors.to_rgba(np.array(delta))
    _box(axes, left, row, width, facecolor=fill, edgecolor="black" if delta is None else "none")
    red, green, blue, _ = mpl.colors.to_rgba(fill)
    ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"  # whichever reads better on it
    axes.text(*middle, text, linespacing=1.25, color=ink, **look)


def _cell_lines(found: Findings, arm: str) -> tuple[list[str], float | None]:
    """What a cell says, nothing where the arm is missing; and its difference to scratch, None where there is none."""
    one = found.compared[arm]
    if not one.num_seeds:
        return [], None
    score = one.scores[found.headline.key].mean
    delta = None if one.against is None else one.against.score.difference.mean
    lines = [score_text(score)]
    if delta is not None:
        lines.append(signed(delta, decimals(pd.Series([score]))))
    if one.num_seeds == 1 or one.num_seeds < len(found.params.seeds):
        lines.append(f"n={one.num_seeds}")
    return lines, delta


def _color_bar(figure: Figure, axes: Axes, colors: ScalarMappable, found: Findings) -> None:
    place: dict[str, Any] = {"orientation": "horizontal", "aspect": 50, "pad": 0.02, "fraction": 0.06, "shrink": 0.6}
    is_clipped = _largest(found) > (colors.get_clim()[1] or 0.0)
    bar = figure.colorbar(colors, ax=axes, extend="max" if is_clipped else "neither", **place)
    bar.set_label(f"{found.headline.name} less {short(str(found.baseline))}'s (negative, purple: better)")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(signed_tick))


def _caption(found: Findings) -> str:
    parts, asked = [f"Mean {found.headline.name} at the end of the budget"], len(found.params.seeds)
    if found.baseline is not None:
        difference = f"the difference to {found.baseline}, paired by seed"
        parts.append(f", and under it {difference}; colours follow the difference")
    parts.append(". Hatched: no such arm.")
    if len(found.arms) < len(found.params.arms):
        parts.append(" Dashed frame: the arm has no result.")
    if any(0 < one.num_seeds < max(asked, 2) for one in found.compared.values()):
        parts.append(" n: number of seeds, where there is one, or fewer than asked for.")
    return "".join(parts) + " “Each arm against scratch” shows how sure a difference is."


def _alt(found: Findings) -> str:
    said = []
    for arm in found.params.arms:
        lines, _ = _cell_lines(found, arm)
        named = f"{found.headline.name} " if lines else ""
        said.append(f"{arm}: {named}{', '.join(lines) or 'missing'}")
    return f"Table of final {found.headline.name}s by strategy and mask rate: {'; '.join(said)}."


HEAT_MAP = Kind(
    "fid_heat_map.png",
    "Final {score} by strategy and mask rate",
    _draw,
    _caption,
    _alt,
    lambda found: bool(found.masked),
    has_scores=True,
)
