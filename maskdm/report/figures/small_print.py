"""What a figure's scores are of, in small print under it: a figure is shown to people without its page."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from maskdm.report.looks import FLOOR, WIDTH
from maskdm.report.results import Results
from maskdm.scoring.protocol import flips_text

FONT_SIZE, LINE_SPACING = 8, 1.35  # points; lines
MARGIN = 0.06  # inches
LINE_CHARACTERS = 100  # of digits, which are wider than most, fit


def small_print(results: Results) -> str:
    """The protocol of all scores, and how training flipped images."""
    return " ".join(f"{results.protocol.text} {flips_text(results.flips)}".split())


def printed(text: str, width: float = WIDTH) -> Figure:
    """A strip of some width, in inches, with a text in as many lines as it takes."""
    lines = textwrap.wrap(text, LINE_CHARACTERS, break_on_hyphens=False)
    height = len(lines) * FONT_SIZE * LINE_SPACING / 72 + 2 * MARGIN
    figure = Figure(figsize=(width, height))
    place = (MARGIN / width, 1 - MARGIN / height)
    written = figure.text(*place, "\n".join(lines), fontsize=FONT_SIZE, linespacing=LINE_SPACING, color=FLOOR, va="top")
    written.set_parse_math(False)  # classes have the names that users gave them
    return figure
