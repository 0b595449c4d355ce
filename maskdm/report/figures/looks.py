"""How figures look: one style, and for each arm one colour and marker, chosen for colour-blind readers too."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from matplotlib.colors import to_hex, to_rgb

from maskdm.config import ArmConfig, Params
from maskdm.report.tables import strategy_text

# Okabe and Ito's colours, which the common kinds of colour blindness keep apart.
HUES = {"none": "#000000", "patch": "#0072B2", "crop": "#009E73"}
MORE_HUES = ("#D55E00", "#CC79A7", "#B8860B", "#56B4E9")  # of block sizes, then of other strategies
BASELINES = ("#000000", "#777777", "#AAAAAA")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
FLOOR = "#666666"
MISSING = "#8A8A8A"
REMARK = "#444444"
NO_MASKING = "no masking"
WIDTH = 7.2  # inches: a page's text width, so the font sizes below are those in print, none under 8 points
DPI = 200
# matplotlib's own defaults first: a user's matplotlibrc must not change the report.
STYLE: list[Any] = [
    "default",
    {
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9,
        "axes.labelsize": 8.5,
        "axes.titlelocation": "left",
        "figure.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.4,
        "lines.markersize": 5,
    },
]


@dataclass(frozen=True)
class Look:
    """An arm's line: hue by strategy and block size, shade and marker by mask rate, dashes where arms are equal."""

    color: str
    marker: str
    dashes: str

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`; scratch is drawn in front of the others."""
        return {"color": self.color, "linestyle": self.dashes, "zorder": 3 if self.color == BASELINES[0] else 2}


def family(arm: ArmConfig) -> str:
    """What arms of different mask rates have in common: strategy and block size."""
    return NO_MASKING if arm.strategy == "none" else strategy_text(arm.strategy, arm.block_size)


def arm_looks(params: Params) -> dict[str, Look]:
    """The look of every arm."""
    rates = sorted({arm.mask_rate for arm in params.arms.values() if arm.mask_rate is not None})
    kinds = {(arm.strategy != "block", arm.strategy, arm.block_size or 0) for arm in params.arms.values()}
    more = sorted(kind for kind in kinds if kind[1] not in HUES)
    seen: Counter[tuple[str, float | None]] = Counter()  # arms of a family and mask rate so far
    looks = {}
    for key, arm in params.arms.items():
        twin = seen[family(arm), arm.mask_rate]
        seen[family(arm), arm.mask_rate] += 1
        dashes = DASHES[twin % len(DASHES)]
        if arm.mask_rate is None:
            looks[key] = Look(BASELINES[twin % len(BASELINES)], "o", dashes)
            continue
        hue = HUES.get(arm.strategy)
        if hue is None:
            hue = MORE_HUES[more.index((arm.strategy != "block", arm.strategy, arm.block_size or 0)) % len(MORE_HUES)]
        rank = rates.index(arm.mask_rate)
        depth = rank / (len(rates) - 1) if len(rates) > 1 else 0.5
        looks[key] = Look(_shade(hue, depth), MARKERS[rank % len(MARKERS)], dashes)
    return looks


def short(name: str, length: int = 24) -> str:
    """A name shortened in its middle: arms whose names begin alike often differ at the end."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[-(length - 1 - head) :]}"


def _shade(color: str, depth: float) -> str:
    """The colour from lighter (depth 0) to darker (depth 1); 0.5 leaves it nearly as it is."""
    target, amount = ((1.0, 1.0, 1.0), 0.5 - depth) if depth < 0.5 else ((0.0, 0.0, 0.0), 0.8 * (depth - 0.5))
    red, green, blue = (c + (t - c) * amount for c, t in zip(to_rgb(color), target, strict=True))
    return to_hex((red, green, blue))
