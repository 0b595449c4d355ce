"""`train_step`: real training steps at every mask rate, against the machine, the FLOPs, and timm's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import machine, reference
from benchmarks.kernels import kernel_table
from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import RATES, SHAPES, Shape
from benchmarks.steps import StepMaker, Steps
from benchmarks.timing import Rounds, Task, interleave

# What is promised of the quotient of time ratio and FLOP ratio, by shape and mask rate.
MOST_OVER_FLOPS = {("small", 0.5): 1.15, ("small", 0.9): 1.25, ("celeba", 0.5): 1.25, ("celeba", 0.9): 1.6}
RATE_TARGETS = {
    (name, rate): Target(f"{name}: time ÷ FLOPs at mask rate {rate}", None, bound)
    for (name, rate), bound in MOST_OVER_FLOPS.items()
}
BEST = "best"
TIMM_TARGETS = {
    (name, which): Target(f"{name}: images/s, ours {against}", None, bound, "at least")
    for name in SHAPES
    for which, against, bound in (
        (BEST, "in the best precision over timm fp32", 1.5),
        ("fp32", "over timm, both fp32", 1.0),
        ("bf16", "over timm, both bf16", 1.0),
    )
}
TARGETS: Mapping[Any, Target] = {**RATE_TARGETS, **TIMM_TARGETS}
RATES_NOTE = "time ÷ FLOPs: the ratio of times to rate 0 over the ratio of FLOPs; 1 is ideal"
TIMM_NOTE = (
    "timm: the same network of its ViT blocks, AdamW and averaged weights of timm and PyTorch as they come. Tuned: "
    "with PyTorch's fused AdamW and the attention kernel that our rule takes, as ours has them."
)


def run(settings: Settings) -> Outcome:
    """Measure every shape, one after the other."""
    runs = [_ShapeRun(shape, settings) for shape in settings.shapes]
    for each in runs:
        each.measure()
    tables = [
        Table("training steps", [row for each in runs for row in each.rate_rows()], RATES_NOTE),
        Table("the machine in the same runs", [each.ceiling_row() for each in runs]),
        *(each.kernels for each in runs),
    ]
    targets = [t for each in runs for t in rate_targets(each.shape.name, each.rounds, each.flops, each.best)]
    if not reference.is_installed():
        return Outcome(tables, targets, ["timm is not installed: no outside reference"])
    against = Table("against timm's blocks at mask rate 0", [row for e in runs for row in e.timm_rows()], TIMM_NOTE)
    return Outcome([tables[0], against, *tables[1:]], targets + [t for each in runs for t in each.timm_targets()])


class _ShapeRun:
    """All that is measured of a shape, in one interleaved run."""

    rounds: Rounds
    kernels: Table

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.device, self.precisions = settings.device, settings.precisions
        self.best = self.precisions[-1]
        self.maker = StepMaker(shape, settings)
        self.flops: dict[float, int] = {}

    def measure(self) -> None:
        """Time everything, then look where the time of a step goes."""
        steps = {rate: self.maker.steps(rate) for rate in RATES}
        self.flops = {rate: own.flops for rate, own in steps.items()}
        self.visible = {rate: own.num_visible for rate, own in steps.items()}
        self.rounds = interleave(self._tasks(steps), self.settings.rounds, f"train_step {self.shape.name}")
        self.kernels = kernel_table(self.shape, steps)

    def _tasks(self, steps: dict[float, Steps]) -> dict[str, Task]:
        tasks = machine.ceilings(self.device, self.precisions)
        tasks |= {_ours(rate, self.best): self.maker.task(own) for rate, own in steps.items()}
        for precision in self.precisions[:-1]:
            tasks[_ours(0.0, precision)] = self.maker.task(self.maker.steps(0.0, precision))
        if reference.is_installed():
            images = torch.from_numpy(self.maker.images().all())
            for precision in self.precisions:
                timm = reference.TimmSteps(self.shape, images, precision, self.device)
                tasks[f"timm {precision}"] = Task(timm.run, self.settings.step_seconds)
            tuned = reference.TimmSteps(self.shape, images, self.best, self.device, is_tuned=True)
            tasks[_tuned(self.best)] = Task(tuned.run, self.settings.step_seconds)
        return tasks

    def rate_rows(self) -> list[dict[str, Cell]]:
        """A row for every mask rate."""
        rounds, unmasked = self.rounds, _ours(0.0, self.best)
        rows: list[dict[str, Cell]] = []
        for rate, flops in self.flops.items():
            name, flop_ratio = _ours(rate, self.best), flops / self.flops[0.0]
            rows.append(
                {
                    "shape": self.shape.name,
                    "rate": rate,
                    "tokens": self.visible[rate],
                    "ms": rounds.of(name, 1e3),
                    "images/s": rounds.rate(name, self.shape.batch_size),
                    "GFLOP/s": rounds.rate(name, flops / 1e9),
                    "of the ceiling": machine.share_of_ceiling(rounds, name, flops, self.best, self.device),
                    "time ratio": rounds.ratio(name, unmasked),
                    "FLOP ratio": flop_ratio,
                    "time ÷ FLOPs": rounds.ratio(name, unmasked, 1 / flop_ratio),
                }
            )
        return rows

    def timm_rows(self) -> list[dict[str, Cell]]:
        """Ours and timm's in every precision, and timm's at its best."""
        own, theirs = self.flops[0.0], self.shape.batch_size * reference.count_flops(self.shape)
        rows: list[dict[str, Cell]] = []
        for precision in self.precisions:
            timm = f"timm {precision}"
            tuned = [(_tuned(precision), theirs)] if precision == self.best else []
            for name, flops in ((_ours(0.0, precision), own), (timm, theirs), *tuned):
                rows.append(
                    {
                        "shape": self.shape.name,
                        "what": name,
                        "images/s": self.rounds.rate(name, self.shape.batch_size),
                        "GFLOP/s": self.rounds.rate(name, flops / 1e9),
                        "images/s over timm's": self.rounds.ratio(timm, name),
                        "FLOP/s over timm's": self.rounds.ratio(timm, name, flops / theirs),
                        **self._over_tuned(name, flops / theirs),
                        "images/s over timm's in fp32": self.rounds.ratio("timm fp32", name),
                    }
                )
        return rows

    def _over_tuned(self, name: str, flop_ratio: float) -> dict[str, Cell]:
        is_best = name.endswith(self.best)
        return {"FLOP/s over tuned timm's": self.rounds.ratio(_tuned(self.best), name, flop_ratio) if is_best else None}

    def ceiling_row(self) -> dict[str, Cell]:
        """What the machine could do."""
        return {"shape": self.shape.name, **machine.ceiling_row(self.rounds, self.device, self.precisions)}

    def timm_targets(self) -> list[Target]:
        """Ours must not be slower, and in the best precision faster."""
        name = self.shape.name
        over = self.rounds.ratio("timm fp32", _ours(0.0, self.best)).median
        targets = [TIMM_TARGETS[name, BEST].measured(over)]
        for precision in self.precisions:
            equal = self.rounds.ratio(f"timm {precision}", _ours(0.0, precision)).median
            targets.append(TIMM_TARGETS[name, precision].measured(equal))
        return targets


def rate_targets(shape: str, rounds: Rounds, flops: Mapping[float, int], precision: str) -> list[Target]:
    """Time must fall as FLOPs do.

    Args:
        shape: its name.
        rounds: of steps at every mask rate.
        flops: mask rate → of a step.
        precision: of the steps.
    """
    targets = []
    for (name, rate), target in RATE_TARGETS.items():
        if name == shape:
            ratio = rounds.ratio(_ours(rate, precision), _ours(0.0, precision), flops[0.0] / flops[rate])
            targets.append(target.measured(ratio.median))
    return targets


def _tuned(precision: str) -> str:
    return f"timm tuned {precision}"


def _ours(rate: float, precision: str) -> str:
    return f"maskdm {precision}" if rate == 0 else f"maskdm {precision} at {rate}"
