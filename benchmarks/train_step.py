"""`train_step`: real training steps at every mask rate, against the machine, the FLOPs, and timm's blocks."""

from __future__ import annotations

import torch

from benchmarks import machine, reference
from benchmarks.kernels import kernel_table
from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import RATES, Shape
from benchmarks.steps import StepMaker, Steps
from benchmarks.timing import Rounds, Task, interleave

# What is promised of the quotient of time ratio and FLOP ratio, by shape and mask rate.
MOST_OVER_FLOPS = {("small", 0.5): 1.15, ("small", 0.9): 1.25, ("celeba", 0.5): 1.25, ("celeba", 0.9): 1.6}
LEAST_OVER_TIMM = 1.5  # images/s of ours in the best precision over the reference's in fp32
RATES_NOTE = "time ÷ FLOPs: the ratio of times to rate 0 over the ratio of FLOPs; 1 is ideal"
TIMM_NOTE = (
    "timm: its ViT blocks with the same width, depth, heads and tokens, AdamW and averaged weights of timm and PyTorch "
    "as they come. Ours has long skips: more FLOPs for an image."
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
    targets = [target for each in runs for target in each.rate_targets()]
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
        """Ours and timm's in every precision."""
        own, theirs = self.flops[0.0], self.shape.batch_size * reference.count_flops(self.shape)
        rows: list[dict[str, Cell]] = []
        for precision in self.precisions:
            timm = f"timm {precision}"
            for name, flops in ((_ours(0.0, precision), own), (timm, theirs)):
                rows.append(
                    {
                        "shape": self.shape.name,
                        "what": name,
                        "images/s": self.rounds.rate(name, self.shape.batch_size),
                        "GFLOP/s": self.rounds.rate(name, flops / 1e9),
                        "images/s over timm's": self.rounds.ratio(timm, name),
                        "FLOP/s over timm's": self.rounds.ratio(timm, name, flops / theirs),
                        "images/s over timm's in fp32": self.rounds.ratio("timm fp32", name),
                    }
                )
        return rows

    def ceiling_row(self) -> dict[str, Cell]:
        """What the machine could do."""
        return {"shape": self.shape.name, **machine.ceiling_row(self.rounds, self.device, self.precisions)}

    def rate_targets(self) -> list[Target]:
        """Time must fall as FLOPs do."""
        targets = []
        for (shape, rate), bound in MOST_OVER_FLOPS.items():
            if shape == self.shape.name:
                times = self.flops[0.0] / self.flops[rate]
                over = self.rounds.ratio(_ours(rate, self.best), _ours(0.0, self.best), times).median
                targets.append(Target(f"{shape}: time ÷ FLOPs at mask rate {rate}", over, bound))
        return targets

    def timm_targets(self) -> list[Target]:
        """Ours must not be slower, and in the best precision faster."""
        best, name = _ours(0.0, self.best), self.shape.name
        over = self.rounds.ratio("timm fp32", best).median
        what = f"{name}: images/s, ours {self.best} over timm fp32"
        targets = [Target(what, over, LEAST_OVER_TIMM, "at least")]
        for precision in self.precisions:
            equal = self.rounds.ratio(f"timm {precision}", _ours(0.0, precision)).median
            targets.append(Target(f"{name}: images/s, ours over timm, both {precision}", equal, 1.0, "at least"))
        return targets


def _ours(rate: float, precision: str) -> str:
    return f"maskdm {precision}" if rate == 0 else f"maskdm {precision} at {rate}"
