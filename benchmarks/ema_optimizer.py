"""`ema_optimizer`: the share of a step that clipping, AdamW and the averaged weights take."""

from __future__ import annotations

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import RATES, Shape
from benchmarks.steps import StepMaker
from benchmarks.timing import Task, interleave, looped

# What is promised of the share at mask rate 0, by shape.
MOST_SHARE = {"tiny": 0.10, "celeba": 0.03}
GRAD_CLIP = 1.0


def run(settings: Settings) -> Outcome:
    """Measure every shape that something is promised of; `small` lies between."""
    outcomes = [_measure(shape, settings) for shape in settings.shapes if shape.name in MOST_SHARE]
    return Outcome([table for table, _ in outcomes], [target for _, target in outcomes])


def _measure(shape: Shape, settings: Settings) -> tuple[Table, Target]:
    maker = StepMaker(shape, settings, GRAD_CLIP)
    tasks = {f"rate {rate}": maker.task(maker.steps(rate)) for rate in RATES}
    updated = maker.steps(0.0)
    updated.run(1)
    updated.fill_gradients()
    tasks["update"] = Task(looped(updated.update), least_seconds=0.1)
    rounds = interleave(tasks, settings.rounds, f"ema_optimizer {shape.name}")
    rows: list[dict[str, Cell]] = [
        {
            "mask rate": rate,
            "step ms": rounds.of(f"rate {rate}", 1e3),
            "update ms": rounds.of("update", 1e3),
            "share": rounds.ratio("update", f"rate {rate}"),
        }
        for rate in RATES
    ]
    share = rounds.ratio("update", "rate 0.0").median
    title = f"{shape.name}: clipping, AdamW and averaged weights, batch {shape.batch_size}"
    target = Target(f"{shape.name}: their share of a step at mask rate 0", share, MOST_SHARE[shape.name])
    return Table(title, rows, f"with grad_clip: {GRAD_CLIP}, which the default does not use"), target
