"""`ema_optimizer`: the share of a step that clipping, AdamW and the averaged weights take.

They cost the same at every mask rate while the rest of a step shrinks: their share grows with the rate. The promise is
about a step at rate 0; the table has all rates.
"""

from __future__ import annotations

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import RATES, Shape
from benchmarks.steps import StepMaker
from benchmarks.timing import Task, interleave, looped

TARGETS = {
    name: Target(f"{name}: their share of a step at mask rate 0", None, bound)
    for name, bound in (("tiny", 0.10), ("celeba", 0.03))
}
GRAD_CLIP = 1.0


def run(settings: Settings) -> Outcome:
    """Measure every shape that something is promised of; `small` lies between."""
    outcomes = [_measure(shape, settings) for shape in settings.shapes if shape.name in TARGETS]
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
    target = TARGETS[shape.name].measured(rounds.ratio("update", "rate 0.0").median)
    title = f"{shape.name}: clipping, AdamW and averaged weights, batch {shape.batch_size}"
    return Table(title, rows, f"with grad_clip: {GRAD_CLIP}, which the default does not use"), target
