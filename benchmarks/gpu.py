"""`gpu`: a training step on a CUDA device: MFU, memory, compiled or eager, images on the device or streamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from benchmarks import machine
from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.shapes import BASE, CELEBA, Settings, Shape
from benchmarks.steps import make_steps
from benchmarks.timing import Task, interleave

LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """A shape to measure.

    Attributes:
        shape: images, network and batch.
        rates: mask rates.
        target_rate: the mask rate of the target and of the variants.
        least_share: the promised fraction of the matmul rate at that mask rate.
    """

    shape: Shape
    rates: tuple[float, ...]
    target_rate: float
    least_share: float


CASES = (
    Case(replace(CELEBA, batch_size=256), (0.0, 0.5, 0.9), 0.0, 0.40),
    Case(BASE, (0.9,), 0.9, 0.45),
)


def run(settings: Settings) -> Outcome:
    """Measure on the CUDA device, if there is one."""
    if not torch.cuda.is_available():
        return Outcome(notes=["no CUDA device: not measured"])
    return measure(settings.on("cuda"), CASES)


def measure(settings: Settings, cases: tuple[Case, ...]) -> Outcome:
    """Measure cases, one after the other; small ones run on a CPU too."""
    dynamo, outcomes = import_module("torch._dynamo"), []
    for case in cases:
        dynamo.reset()  # each case starts with the full number of recompilations
        with dynamo.config.patch(fail_on_recompile_limit_hit=True):  # otherwise it would silently run eagerly
            outcomes.append(_measure(case, settings))
    return Outcome(
        [table for outcome in outcomes for table in outcome.tables],
        [target for outcome in outcomes for target in outcome.targets],
    )


def _measure(case: Case, settings: Settings) -> Outcome:
    """One shape: its mask rates, and eager and streamed steps at the target's rate."""
    shape, device, precisions, target = case.shape, settings.device, settings.precisions, f"rate {case.target_rate}"
    variants: dict[str, tuple[float, dict[str, Any]]] = {f"rate {rate}": (rate, {}) for rate in case.rates}
    variants["eager"] = case.target_rate, {"compile": "off"}
    variants["streamed"] = case.target_rate, {"device_resident": False}
    tasks, steps, peaks = machine.ceilings(device, precisions), {}, dict[str, float | None]()
    for name, (rate, how) in variants.items():
        before = _start_counting_memory(device)
        how = {"device_resident": True, **how}
        steps[name] = make_steps(shape, settings, rate, num_images=2 * shape.batch_size, **how)
        steps[name].run(2)
        peaks[name] = None if before is None else (torch.cuda.max_memory_allocated() - before) / 2**30
        tasks[name] = Task(steps[name].run, LEAST_SECONDS)
    rounds, best = interleave(tasks, settings.rounds, f"gpu {shape.name}"), precisions[-1]
    rows: list[dict[str, Cell]] = [
        {
            "what": name if name.startswith("rate") else f"{target}, {name}",
            "tokens": own.num_visible,
            "ms": rounds.of(name, 1e3),
            "images/s": rounds.rate(name, shape.batch_size),
            "TFLOP/s": rounds.rate(name, own.flops / 1e12),
            "of the matmul rate": machine.share_of_ceiling(rounds, name, own.flops, best, device),
            f"time over {target}": rounds.ratio(name, target),
            "peak GiB": peaks[name],
        }
        for name, own in steps.items()
    ]
    title = f"{shape.name}: a training step on the GPU, batch {shape.batch_size}, {best}"
    limits: dict[str, Cell] = {**machine.ceiling_row(rounds, device, precisions)}
    tables = [Table(title, rows), Table(f"{shape.name}: the GPU in the same run", [limits])]
    what = f"{shape.name}, batch {shape.batch_size}, mask rate {case.target_rate}: share of the measured matmul rate"
    share = machine.share_of_ceiling(rounds, target, steps[target].flops, best, device).median
    return Outcome(tables, [Target(what, case.least_share, "at least", share)])


def _start_counting_memory(device: torch.device) -> int | None:
    """Reset the peak of allocated memory; the bytes allocated now, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
