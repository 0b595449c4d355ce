"""`train_step`: real training steps at every mask rate, against the machine, the FLOPs, and timm's blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks import machine, reference
from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.shapes import RATES, SHAPES, Settings, Shape
from benchmarks.steps import make_steps, random_arrays, step_task
from benchmarks.timing import Rounds, Task, interleave, looped

RATE_TARGETS = {
    (name, rate): Target(f"{name}: time ÷ FLOPs at mask rate {rate}", bound)
    for name, rate, bound in (("small", 0.5, 1.15), ("small", 0.9, 1.25), ("celeba", 0.5, 1.25), ("celeba", 0.9, 1.6))
}
BEST = "best"
TIMM_TARGETS = {
    (name, which): Target(f"{name}: images/s, ours {against}", bound, "at least")
    for name in SHAPES
    for which, against, bound in (
        (BEST, "in the best precision over timm fp32", 1.5),
        ("fp32", "over timm, both fp32", 1.0),
        ("bf16", "over timm, both bf16", 1.0),
    )
}
UPDATE_TARGETS = {
    name: Target(f"{name}: share of clipping, AdamW and averaged weights in a step at mask rate 0", bound)
    for name, bound in (("tiny", 0.10), ("celeba", 0.03))
}
WAITING_TARGETS = {
    name: Target(f"{name}: share of a step spent waiting for data, the largest over rates", 0.02) for name in SHAPES
}
GRAD_CLIP = 1.0
RATES_NOTE = (
    "time ÷ FLOPs: the ratio of times to rate 0 over the ratio of FLOPs; 1 is ideal. update: clipping (grad_clip "
    f"{GRAD_CLIP:g}, which the default does not use), AdamW and averaged weights. waiting: for data."
)
TIMM_NOTE = (
    "timm: the same network built of its ViT blocks, with AdamW and averaged weights of PyTorch and timm, unchanged. "
    "Tuned: with PyTorch's fused AdamW and the attention kernel that our rule chooses."
)


def run(settings: Settings) -> Outcome:
    """Measure every shape, one after the other."""
    runs = [_ShapeRun(shape, settings) for shape in settings.shapes]
    tables = [
        Table("training steps", [row for each in runs for row in each.rate_rows()], RATES_NOTE),
        Table("the machine in the same runs", [each.ceiling_row() for each in runs]),
    ]
    targets = [target for each in runs for target in each.targets()]
    if not reference.is_installed():
        return Outcome(tables, targets, ["timm is not installed: no outside reference"])
    against = Table("against timm's blocks at mask rate 0", [row for e in runs for row in e.timm_rows()], TIMM_NOTE)
    return Outcome([*tables, against], targets + [target for each in runs for target in each.timm_targets()])


class _ShapeRun:
    """All measurements of a shape, in one interleaved run."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.device, self.precisions = settings.device, settings.precisions
        self.best = self.precisions[-1]
        self.steps = {rate: make_steps(shape, settings, rate) for rate in RATES}
        self.flops = {rate: steps.flops for rate, steps in self.steps.items()}
        self.rounds = interleave(self._tasks(), settings.rounds, f"train_step {shape.name}")

    def _tasks(self) -> dict[str, Task]:
        shape, settings = self.shape, self.settings
        tasks = machine.ceilings(self.device, self.precisions)
        tasks |= {_ours(rate, self.best): step_task(steps, settings) for rate, steps in self.steps.items()}
        for precision in self.precisions[:-1]:
            tasks[_ours(0.0, precision)] = step_task(make_steps(shape, settings, 0.0, precision), settings)
        updated = make_steps(shape, settings, 0.0, grad_clip=GRAD_CLIP)
        updated.run(1)
        updated.fill_gradients()
        tasks["update"] = Task(looped(updated.update, machine.waiting_for(self.device)), least_seconds=0.1)
        if reference.is_installed():
            images = torch.from_numpy(random_arrays(settings.folder, shape.image_size, shape.channels).all())
            for precision in self.precisions:
                timm = reference.TimmSteps(shape, images, precision, self.device)
                tasks[f"timm {precision}"] = Task(timm.run, settings.step_seconds)
            tuned = reference.TimmSteps(shape, images, self.best, self.device, is_tuned=True)
            tasks[_tuned(self.best)] = Task(tuned.run, settings.step_seconds)
        return tasks

    def rate_rows(self) -> list[dict[str, Cell]]:
        """A row per mask rate."""
        rounds, unmasked = self.rounds, _ours(0.0, self.best)
        rows: list[dict[str, Cell]] = []
        for rate, flops in self.flops.items():
            name, flop_ratio = _ours(rate, self.best), flops / self.flops[0.0]
            rows.append(
                {
                    "shape": self.shape.name,
                    "rate": rate,
                    "tokens": self.steps[rate].num_visible,
                    "ms": rounds.of(name, 1e3),
                    "images/s": rounds.rate(name, self.shape.batch_size),
                    "GFLOP/s": rounds.rate(name, flops / 1e9),
                    "of the ceiling": machine.share_of_ceiling(rounds, name, flops, self.best, self.device),
                    "time ratio": rounds.ratio(name, unmasked),
                    "FLOP ratio": flop_ratio,
                    "time ÷ FLOPs": rounds.ratio(name, unmasked, 1 / flop_ratio),
                    "update": rounds.ratio("update", name),
                    "waiting": self.steps[rate].waiting_share,
                }
            )
        return rows

    def timm_rows(self) -> list[dict[str, Cell]]:
        """Ours and timm's in every precision, and tuned timm in the best one."""
        own, theirs = self.flops[0.0], self.shape.batch_size * reference.count_flops(self.shape)
        rows: list[dict[str, Cell]] = []
        for precision in self.precisions:
            timm, is_best = f"timm {precision}", precision == self.best
            tuned = [(_tuned(precision), theirs)] if is_best else []
            for name, flops in ((_ours(0.0, precision), own), (timm, theirs), *tuned):
                rows.append(
                    {
                        "shape": self.shape.name,
                        "what": name,
                        "images/s": self.rounds.rate(name, self.shape.batch_size),
                        "GFLOP/s": self.rounds.rate(name, flops / 1e9),
                        "images/s over timm's": self.rounds.ratio(timm, name),
                        "over tuned timm's": self.rounds.ratio(_tuned(precision), name) if is_best else None,
                        "over timm's in fp32": self.rounds.ratio("timm fp32", name),
                    }
                )
        return rows

    def ceiling_row(self) -> dict[str, Cell]:
        """The machine's limits."""
        return {"shape": self.shape.name, **machine.ceiling_row(self.rounds, self.device, self.precisions)}

    def targets(self) -> list[Target]:
        """Time must fall as FLOPs do; updates and waiting must be small."""
        name = self.shape.name
        targets = rate_targets(name, self.rounds, self.flops, self.best)
        if name in UPDATE_TARGETS:
            share = self.rounds.ratio("update", _ours(0.0, self.best)).median
            targets.append(UPDATE_TARGETS[name].measured(share))
        waiting = max(steps.waiting_share for steps in self.steps.values())
        return [*targets, WAITING_TARGETS[name].measured(waiting)]

    def timm_targets(self) -> list[Target]:
        """Ours must not be slower than timm's, and in the best precision faster than timm's fp32."""
        name = self.shape.name
        over = self.rounds.ratio("timm fp32", _ours(0.0, self.best)).median
        targets = [TIMM_TARGETS[name, BEST].measured(over)]
        for precision in self.precisions:
            equal = self.rounds.ratio(f"timm {precision}", _ours(0.0, precision)).median
            targets.append(TIMM_TARGETS[name, precision].measured(equal))
        return targets


def rate_targets(shape: str, rounds: Rounds, flops: Mapping[float, int], precision: str) -> list[Target]:
    """The measured `RATE_TARGETS` of a shape.

    Args:
        shape: the shape's name.
        rounds: steps at every mask rate.
        flops: mask rate → FLOPs of a step.
        precision: precision of the steps.
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
