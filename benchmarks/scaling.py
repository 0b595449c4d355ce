"""`scaling`: how time grows with images, tokens, width and batch, as exponents of power laws."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import linear_regression

from benchmarks.data import folder_params, write_jpegs
from benchmarks.outcome import Cell, Outcome, Table
from benchmarks.settings import Settings
from benchmarks.shapes import Shape
from benchmarks.steps import StepMaker
from benchmarks.timing import Rounds, Spread, Task, interleave, looped
from maskdm.data.prepare import prepare

MIDDLE = Shape("middle", 32, 3, {"patch_size": 4, "dim": 128, "depth": 5, "num_heads": 2, "mlp_ratio": 4.0}, 16)
NUM_IMAGES, QUICK_IMAGES = (256, 512, 1024, 2048), (16, 32)
JPEG_SIDE = 64
ATTENTION = "plain"  # at all sizes: the rule of `auto` changes the kernel on the way, which is no power law


def run(settings: Settings) -> Outcome:
    """Fit every axis."""
    axes: dict[str, dict[int, Shape]] = {
        "tokens": {(side // 4) ** 2: replace(MIDDLE, image_size=side) for side in (16, 32, 64, 96)},
        "width": {dim: _wide(dim) for dim in (64, 128, 256, 512)},
        "batch": {batch: MIDDLE.with_batch(batch) for batch in (4, 16, 64, 128)},
    }
    if settings.is_quick:
        axes = {axis: dict(list(shapes.items())[:2]) for axis, shapes in axes.items()}
    tables = [_prepare(settings), *(_steps(axis, shapes, settings) for axis, shapes in axes.items())]
    rows = [row for _, row in tables]
    note = "time ∝ (what grows)^exponent, least squares on logarithms, round by round"
    return Outcome([Table("exponents", rows, note), *(table for table, _ in tables)])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The a of values ∝ sizesᵃ, by least squares on logarithms.

    Args:
        sizes: positive.
        values: positive, one for each.
    """
    return linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def exponents(rounds: Rounds, sizes: Mapping[str, float]) -> Spread:
    """The exponent of every round.

    Args:
        rounds: of tasks.
        sizes: task → what grows.
    """
    count = len(next(iter(rounds.seconds.values())))
    of_rounds = ([rounds.seconds[name][i] for name in sizes] for i in range(count))
    return Spread(tuple(exponent(list(sizes.values()), seconds) for seconds in of_rounds))


def _wide(dim: int) -> Shape:
    return replace(MIDDLE, model={**MIDDLE.model, "dim": dim, "num_heads": dim // 64})


def _prepare(settings: Settings) -> tuple[Table, dict[str, Cell]]:
    counts = QUICK_IMAGES if settings.is_quick else NUM_IMAGES
    jpegs = write_jpegs(settings.folder / "scaling-jpegs", max(counts), JPEG_SIDE)
    tasks = {f"{count}": Task(looped(partial(_prepare_once, settings, jpegs, count))) for count in counts}
    rounds = interleave(tasks, settings.rounds, "scaling: prepare")
    rows: list[dict[str, Cell]] = [
        {"images": count, "s": rounds.of(f"{count}"), "images/s": rounds.rate(f"{count}", count)} for count in counts
    ]
    found = exponents(rounds, {f"{count}": count for count in counts})
    table = Table(f"prepare: JPEGs of {JPEG_SIDE}×{JPEG_SIDE}, in one process without start-up", rows)
    return table, {"what grows": "images of `prepare`", "exponent of time": found, "exponent of FLOPs": None}


def _prepare_once(settings: Settings, jpegs: Path, count: int) -> None:
    output = settings.folder / "scaling-prepared"
    with redirect_stderr(StringIO()):  # its own progress
        prepare(folder_params(jpegs, JPEG_SIDE, settings.threads, count), output)
    shutil.rmtree(output)


def _steps(axis: str, shapes: Mapping[int, Shape], settings: Settings) -> tuple[Table, dict[str, Cell]]:
    makers = {size: StepMaker(shape, settings) for size, shape in shapes.items()}
    steps = {size: maker.steps(0.0, attention=ATTENTION) for size, maker in makers.items()}
    tasks = {f"{size}": makers[size].task(own) for size, own in steps.items()}
    rounds = interleave(tasks, settings.rounds, f"scaling: {axis}")
    rows: list[dict[str, Cell]] = [
        {
            axis: size,
            "ms": rounds.of(f"{size}", 1e3),
            "GFLOP": own.flops / 1e9,
            "GFLOP/s": rounds.rate(f"{size}", own.flops / 1e9),
        }
        for size, own in steps.items()
    ]
    of_flops = exponent(list(steps), [own.flops for own in steps.values()])
    found = exponents(rounds, {f"{size}": size for size in steps})
    title = f"a training step at mask rate 0 against {axis}; else dim 128, depth 5, 8×8 tokens, batch 16"
    note = f"compute.attention: {ATTENTION} at all sizes; `auto` would change the kernel on the way"
    row: dict[str, Cell] = {"what grows": f"{axis} of a step", "exponent of time": found, "exponent of FLOPs": of_flops}
    return Table(title, rows, note), row
