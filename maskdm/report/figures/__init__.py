"""The figures, drawn without a display; equal inputs give equal bytes.

To add one, write its `Kind` in a file of this folder and list it in `FIGURES`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from maskdm.report.comparison import Findings
from maskdm.report.figures.against_scratch import AGAINST_SCRATCH
from maskdm.report.figures.costs import TIME, TUNING
from maskdm.report.figures.curves import FID_VS_COMPUTE, LOSSES
from maskdm.report.figures.heat_map import HEAT_MAP
from maskdm.report.figures.looks import DPI, FLOOR, STYLE, WIDTH
from maskdm.report.figures.pictures import MASKS, SAMPLES
from maskdm.report.figures.points import POINTS
from maskdm.report.results import Results
from maskdm.scoring.protocol import flips_text

# In the order of the report: first what answers the question, then the details.
FIGURES = (POINTS, AGAINST_SCRATCH, FID_VS_COMPUTE, HEAT_MAP, SAMPLES, MASKS, LOSSES, TIME, TUNING)
SMALL, LINE_SPACING = 8, 1.35  # points; lines
MARGIN = 0.06  # inches
LINE_CHARACTERS = 100  # so many fit even if all are digits, which are wide


@dataclass(frozen=True)
class Picture:
    """A figure in the report's folder: its file there, and the texts beside it."""

    file: str
    title: str
    caption: str
    alt: str = ""


def draw_figures(found: Findings, folder: Path, said: dict[str, list[str]]) -> list[Picture]:
    """Draw every figure that has something to show, in the order of the report.

    Args:
        found: what they show.
        folder: an existing one; it receives the files.
        said: by file, its title, caption and alternative text.
    """
    protocol, pictures = small_print(found.results), []
    for kind in FIGURES:
        if not kind.applies(found):
            continue
        with matplotlib.style.context(STYLE, after_reset=True):
            figure = kind.draw(found)
            below = [printed(protocol, figure.get_figwidth())] if kind.has_scores else []
            save([figure, *below], folder / kind.file)
        pictures.append(Picture(kind.file, *said[kind.file]))
    return pictures


def save(strips: list[Figure], file: Path) -> None:
    """Write figures of one width, one below the other, without a software version: equal figures give equal bytes."""
    pixels = []
    for figure in strips:
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(DPI)
        canvas.draw()
        pixels.append(np.asarray(canvas.buffer_rgba())[..., :3])
    Image.fromarray(np.concatenate(pixels)).save(file, dpi=(DPI, DPI))


def small_print(results: Results) -> str:
    """What all scores are of, and how training flipped images: people may see a figure without its page."""
    return " ".join(f"{results.protocol.text} {flips_text(results.flips)}".split())


def printed(text: str, width: float = WIDTH) -> Figure:
    """A strip of some width, in inches, with a text in as many lines as it needs."""
    lines = textwrap.wrap(text, LINE_CHARACTERS, break_on_hyphens=False)
    height = len(lines) * SMALL * LINE_SPACING / 72 + 2 * MARGIN
    figure = Figure(figsize=(width, height))
    place = (MARGIN / width, 1 - MARGIN / height)
    written = figure.text(*place, "\n".join(lines), fontsize=SMALL, linespacing=LINE_SPACING, color=FLOOR, va="top")
    written.set_parse_math(False)  # names that users gave may contain $
    return figure
