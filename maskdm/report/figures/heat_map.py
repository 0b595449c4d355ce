"""The final score by strategy and mask rate: where masking helps, at a glance."""

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
from maskdm.report.figures.looks import WIDTH, family, short
from maskdm.report.numbers import decimals, rate_text, score_text, signed

# Purple below scratch, orange above: colour-blind readers can tell them apart. Pale in the middle, never very dark.
COLORS = ListedColormap(mpl.colormaps["PuOr_r"](np.linspace(0.12, 0.88, 256)))
UNCOLORED = "#F2F2F2"  # without a difference to scratch
ROW_HEIGHT = 0.52  # inches
CELL_WIDTH = 0.56


def _draw(found: Findings) -> Figure:
    places, rows, columns = _places(found)
    across, colors = max(len(columns), 1), _colors(found)
    size = (max(WIDTH, 1.6 + CELL_WIDTH * len(columns)), ROW_HEIGHT * len(rows) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlim=(0, across), ylim=(len(rows), 0))
    for arm, (row, column) in places.items():
        left, width = (0, across) if column is None else (column, 1)
        text, delta = _cell(found, arm)
        fill: Any = UNCOLORED if arm in found.arms else "white"
        if delta is not None and colors is not None:
            fill = colors.to_rgba(np.array(delta))
        axes.add_patch(Rectangle((left, row), width, 1, facecolor=fill, edgecolor="white", linewidth=3))
        red, green, blue, _ = mpl.colors.to_rgba(fill)
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"  # the more readable one
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "linespacing": 1.25, "color": ink}
        axes.text(left + width / 2, row + 0.5, text, **look)
    axes.set_xticks([index + 0.5 for index in range(len(columns))], columns)
    axes.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    axes.set_xlabel("realised mask rate in pretraining")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if colors is not None:
        _add_color_bar(figure, axes, colors, found)
    return figure


def _places(found: Findings) -> tuple[dict[str, tuple[int, int | None]], list[str], list[str]]:
    """By arm its row and column, the names of the rows, and those of the columns: realised rates, ascending.

    An arm without masking has a row of its own, and no column. Where several arms have the same family and rate, each
    but the first is in a further row.
    """
    params, masked = found.params, found.masked
    rates = {arm: rate_text(params.mask_of(arm).realised_mask_rate) for arm in masked}
    columns = sorted(set(rates.values()), key=float)
    families = list(dict.fromkeys(family(config) for config in params.arms.values()))
    seen: Counter[tuple[str, str]] = Counter()
    row_of: dict[str, tuple[int, int]] = {}  # the family, and how many arms before have the same family and rate
    for arm in masked:
        same = family(params.arm(arm)), rates[arm]
        row_of[arm] = families.index(same[0]), seen[same]
        seen[same] += 1
    unmasked = [arm for arm in params.arms if arm not in masked]
    names, rows = [short(arm, 18) for arm in unmasked], sorted(set(row_of.values()))
    for row in rows:
        first = next(arm for arm in masked if row_of[arm] == row)
        names.append(families[row[0]] if row[1] == 0 else f"as {short(first, 15)}")
    places: dict[str, tuple[int, int | None]] = {arm: (row, None) for row, arm in enumerate(unmasked)}
    for arm in masked:
        places[arm] = len(unmasked) + rows.index(row_of[arm]), columns.index(rates[arm])
    return places, names, columns


def _colors(found: Findings) -> ScalarMappable | None:
    """Colours of differences, symmetric around scratch; None without scratch.

    They span what scratch lacks of real images' score: the most that an arm could gain. So a small difference is pale.
    """
    if found.baseline is None:
        return None
    score = found.compared[found.baseline].scores[found.headline.key].mean
    limit = score - found.results.scale_of(found.headline.key)["floor"]
    return ScalarMappable(Normalize(-limit, limit) if limit > 0 else Normalize(-score, score), COLORS)


def _cell(found: Findings, arm: str) -> tuple[str, float | None]:
    """The text of a cell, and its difference to scratch, None where there is none."""
    one = found.compared[arm]
    if not one.num_seeds:
        return "missing", None
    score = one.scores[found.headline.key].mean
    delta = None if one.against is None else one.against.score.difference.mean
    lines = [score_text(score)]
    if delta is not None:
        lines.append(signed(delta, decimals(pd.Series([score]))))
    if one.num_seeds == 1 or one.num_seeds < len(found.params.seeds):
        lines.append(f"n={one.num_seeds}")
    return "\n".join(lines) if arm in found.masked else f"{found.headline.name} {' · '.join(lines)}", delta


def _add_color_bar(figure: Figure, axes: Axes, colors: ScalarMappable, found: Findings) -> None:
    place: dict[str, Any] = {"orientation": "horizontal", "aspect": 50, "pad": 0.02, "fraction": 0.06, "shrink": 0.6}
    low, high = colors.get_clim()
    gaps = [against.score.difference.mean for against in found.against.values()]
    is_below, is_above = min(gaps, default=0.0) < (low or 0.0), max(gaps, default=0.0) > (high or 0.0)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((is_below, is_above), "neither")
    bar = figure.colorbar(colors, ax=axes, extend=extend, **place)
    bar.set_label(f"{found.headline.name} minus {short(str(found.baseline))}'s (negative, purple: better)")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(signed_tick))


HEAT_MAP = Kind("fid_heat_map.png", _draw, lambda found: bool(found.masked), has_scores=True)
