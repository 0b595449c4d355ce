"""The plan laid out: a table, and words below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from maskdm.base.units import duration, flops, size
from maskdm.config import Params
from maskdm.plan.calibration import Calibration
from maskdm.plan.estimates import Estimates, StageEstimate, Total, total_of
from maskdm.plan.gpus import Gpu

WIDTH = 118  # of the words
GAP = "  "
NAMED = 5  # the columns that have no sum: the name and what a step is


@dataclass(frozen=True)
class Outlook:
    """What times are told for.

    Attributes:
        gpus: beside this machine.
        utilisation: the share of a datasheet's rate that a GPU is said to reach.
        precision: of training: "bf16" or "fp32".
        calibration: of this machine, or None.
    """

    gpus: tuple[Gpu, ...]
    utilisation: float
    precision: str
    calibration: Calibration | None

    @property
    def columns(self) -> list[tuple[str, Gpu]]:
        """A column per rate: GPUs of equal rates share one."""
        names: dict[float, list[Gpu]] = {}
        for gpu in self.gpus:
            names.setdefault(gpu.rate(self.precision), []).append(gpu)
        return [("/".join(gpu.name for gpu in equal), equal[0]) for equal in names.values()]


def format_table(estimates: Estimates, outlook: Outlook) -> str:
    """A row per arm with its sum, a row per stage below it, and the totals."""
    here = [] if estimates.seeds.seconds is None else ["this\nmachine"]
    gpus = [name for name, _ in outlook.columns]
    num_patches = next(iter(estimates.arms.values()))[0].num_patches
    header = [
        "arm, stage",
        f"visible\nof {num_patches}",
        "rate",
        "GFLOP\nper step",
        "steps × batch",
        "total",
        "memory",
        "disk",
        *here,
        *gpus,
    ]
    rows: list[list[str]] = []
    for arm, stages in estimates.arms.items():
        rows.append([arm, "", "", "", "", *_sums(total_of(stages), outlook)])
        rows += [_stage_row(stage, outlook) for stage in stages]
    totals = [["all arms and seeds", "", "", "", "", *_sums(estimates.seeds, outlook)]]
    if estimates.tuning is not None:
        trials = f"tuning: {estimates.tuning.num_trials} trials"
        totals.append([trials, "", "", "", "", *_sums(estimates.tuning.total, outlook)])
        both = total_of([estimates.seeds, estimates.tuning.total])
        totals.append(["with tuning", "", "", "", "", *_sums(both, outlook)])
    return _aligned(header, rows, totals)


def paragraph(text: str, bullet: str = "") -> str:
    """Words at a readable width."""
    return textwrap.fill(text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def crop_windows(params: Params) -> str:
    """The windows that `crop` arms see; empty without such arms."""
    windows = [(arm, params.visible_of(arm).window) for arm in params.arms]
    return ", ".join(f"{arm} {window[0]}×{window[1]}" for arm, window in windows if window is not None)


def _stage_row(stage: StageEstimate, outlook: Outlook) -> list[str]:
    return [
        f"  {stage.stage}",
        str(stage.num_visible),
        f"{stage.realised_mask_rate:.3g}",
        f"{float(f'{stage.flops_per_step / 1e9:.3g}'):,g}",
        f"{stage.num_steps:,} × {_batch(stage)}",
        *_sums(Total(stage.flops, stage.memory, stage.disk, stage.seconds), outlook),
    ]


def _batch(stage: StageEstimate) -> str:
    """Its images; those of a micro-batch in brackets, where it is taken in several."""
    is_whole = stage.micro_batch_size == stage.batch_size
    return f"{stage.batch_size}" if is_whole else f"{stage.batch_size} (by {stage.micro_batch_size})"


def _sums(total: Total, outlook: Outlook) -> list[str]:
    """What rows of stages, arms and totals share."""
    here = [] if total.seconds is None else [duration(total.seconds)]
    gpus = [gpu.seconds(total.flops, outlook.precision, outlook.utilisation) for _, gpu in outlook.columns]
    return [
        flops(total.flops),
        size(total.memory),
        size(total.disk) if total.disk else "",
        *here,
        *(duration(seconds) for seconds in gpus),
    ]


def _aligned(header: list[str], rows: Sequence[list[str]], totals: Sequence[list[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right; totals may run over."""
    above = [name.rpartition("\n")[0] for name in header]
    below = [name.rpartition("\n")[2] for name in header]
    widths = [max(len(row[i]) for row in (above, below, *rows)) for i in range(len(header))]
    for i in range(NAMED, len(header)):
        widths[i] = max(widths[i], *(len(row[i]) for row in totals))
    ruler = GAP.join("─" * width for width in widths)
    lines = [_line(above, widths), _line(below, widths), ruler, *(_line(row, widths) for row in rows), ruler]
    return "\n".join([*lines, *(_total_line(row, widths) for row in totals)])


def _line(row: list[str], widths: list[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return GAP.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def _total_line(row: list[str], widths: list[int]) -> str:
    """The name of a total takes the place of the columns that have no sum."""
    label_width = sum(widths[:NAMED]) + (NAMED - 1) * len(GAP)
    return GAP.join([row[0].ljust(label_width), _line(["", *row[NAMED:]], [0, *widths[NAMED:]])[len(GAP) :]])
