"""The figures, drawn without a display; equal inputs give equal bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from maskdm.config import Params
from maskdm.report.comparison import Comparison
from maskdm.report.figures.against_scratch import AGAINST_SCRATCH
from maskdm.report.figures.fid_vs_compute import FID_VS_COMPUTE
from maskdm.report.figures.heat_map import HEAT_MAP
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.figures.losses import LOSSES
from maskdm.report.figures.masks import MASKS
from maskdm.report.figures.points import POINTS
from maskdm.report.figures.samples import SAMPLES
from maskdm.report.figures.small_print import printed, small_print
from maskdm.report.figures.stage_time import TIME
from maskdm.report.figures.tuning import TUNING
from maskdm.report.looks import DPI, STYLE
from maskdm.report.page import Picture
from maskdm.report.results import Results

# In the order of the report: the answer first, then what it rests on.
FIGURES = (POINTS, AGAINST_SCRATCH, FID_VS_COMPUTE, HEAT_MAP, SAMPLES, MASKS, LOSSES, TIME, TUNING)


def draw_figures(
    params: Params, results: Results, summary: pd.DataFrame, compared: list[Comparison], folder: Path
) -> list[Picture]:
    """Draw every figure that there is something to draw for.

    Args:
        params: the experiment.
        results: what was read of it.
        summary: a row per arm, seed and milestone.
        compared: every arm of params.yaml.
        folder: an existing one; it receives the files.

    Returns:
        the figures with what stands beside them, in the order of the report.
    """
    shown = Shown(params, results, summary, {one.arm: one for one in compared})
    kinds = [kind for kind in FIGURES if kind.applies(shown)]
    said = small_print(results)
    with matplotlib.style.context(STYLE, after_reset=True):
        for kind in kinds:
            figure = kind.draw(shown)
            below = [printed(said, figure.get_figwidth())] if kind.has_scores else []
            _save([figure, *below], folder / kind.file)
    return [_picture(kind, shown) for kind in kinds]


def _save(strips: list[Figure], file: Path) -> None:
    """Write figures of one width, one under the other; no software version inside: equal figures, equal bytes."""
    Image.fromarray(np.concatenate([_pixels(figure) for figure in strips])).save(file, dpi=(DPI, DPI))


def _pixels(figure: Figure) -> np.ndarray:
    """A figure as (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _picture(kind: Kind, shown: Shown) -> Picture:
    title = kind.title.format(score=shown.headline.name)
    return Picture(kind.file, title[0].upper() + title[1:], kind.caption(shown), kind.alt(shown))
