"""`gpu`: what a CUDA device adds: MFU, memory, compiled against eager, images on the device against streamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from benchmarks import machine
from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import BASE, CELEBA, Shape
from benchmarks.steps import StepMaker, Steps
from benchmarks.timing import Rounds, Task, interleave

LEAST_SECONDS = 1.0
CELEBA_BATCH = 256


@dataclass(frozen=True)
class Case:
    """Something to be measured on a GPU.

    Attributes:
        shape: with the batch that is promised of.
        rates: mask rates.
        promised_rate: the one that the target is about.
        least_share: of the matmul rate, at that mask rate.
    """

    shape: Shape
    rates: tuple[float, ...]
    promised_rate: float
    least_share: float


CASES = (
    Case(CELEBA.with_batch(CELEBA_BATCH), (0.0, 0.5, 0.9), 0.0, 0.40),
    Case(BASE, (0.9,), 0.9, 0.45),
)


def _target(case: Case) -> Target:
    shape = case.shape
    what = f"{shape.name}, batch {shape.batch_size}, mask rate {case.promised_rate}: share of the measured matmul rate"
    return Target(what, None, case.least_share, "at least")


TARGETS = {case.shape.name: _target(case) for case in CASES}


def run(settings: Settings) -> Outcome:
    """Measure on the CUDA device, if there is one."""
    if not torch.cuda.is_available():
        return Outcome(notes=["no CUDA device: not measured"])
    return measure(replace(settings, device=torch.device("cuda")), CASES)


def measure(settings: Settings, cases: tuple[Case, ...]) -> Outcome:
    """Measure cases, one after the other.

    Args:
        settings: with the device.
        cases: small ones run on a CPU too.
    """
    dynamo, outcomes = import_module("torch._dynamo"), []
    for case in cases:
        dynamo.reset()  # every mask rate and variant compiles anew, and a function may not do so often
        with dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it would run eagerly, silently
            outcomes.append(_CaseRun(case, settings).outcome())
    return Outcome(
        [table for outcome in outcomes for table in outcome.tables],
        [target for outcome in outcomes for target in outcome.targets],
    )


class _CaseRun:
    """One shape: its mask rates, and its variants at the rate that is promised of."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings, self.shape = case, settings, case.shape
        self.maker = StepMaker(case.shape, settings, num_images=2 * case.shape.batch_size)
        self.steps: dict[str, Steps] = {}
        self.peaks: dict[str, float | None] = {}

    def outcome(self) -> Outcome:
        """Everything in one interleaved run."""
        device, precisions, best = self.settings.device, self.settings.precisions, self.settings.precisions[-1]
        variants = self._variants()
        tasks = machine.ceilings(device, precisions)
        for name, variant in variants.items():
            self._start(name, *variant)
            tasks[name] = Task(self.steps[name].run, LEAST_SECONDS)
        rounds = interleave(tasks, self.settings.rounds, f"gpu {self.shape.name}")
        rows = [self._row(rounds, name, rate, best) for name, (rate, _, _) in variants.items()]
        title = f"{self.shape.name}: a training step on the GPU, batch {self.shape.batch_size}, {best}"
        row = machine.ceiling_row(rounds, device, precisions)
        tables = [Table(title, rows), Table(f"{self.shape.name}: the GPU in the same run", [dict(row)])]
        promised = f"rate {self.case.promised_rate}"
        share = machine.share_of_ceiling(rounds, promised, self.steps[promised].flops, best, device).median
        return Outcome(tables, [_target(self.case).measured(share)])

    def _variants(self) -> dict[str, tuple[float, dict[str, Any], bool]]:
        """Name → (mask rate, knobs of `compute`, whether the images are kept on the device)."""
        promised = self.case.promised_rate
        rates = {f"rate {rate}": (rate, dict[str, Any](), True) for rate in self.case.rates}
        eager: dict[str, Any] = {"compile": "off"}
        return {**rates, "eager": (promised, eager, True), "streamed": (promised, {}, False)}

    def _start(self, name: str, rate: float, compute: dict[str, Any], is_resident: bool) -> None:
        """Build a variant and make its first steps while no other one is at work, noting the peak memory."""
        on_gpu = self.settings.device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.steps[name] = self.maker.steps(rate, device_resident=is_resident, **compute)
        self.steps[name].run(2)
        self.peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None

    def _row(self, rounds: Rounds, name: str, rate: float, best: str) -> dict[str, Cell]:
        steps, promised = self.steps[name], f"rate {self.case.promised_rate}"
        return {
            "what": name if name.startswith("rate") else f"{promised}, {name}",
            "tokens": steps.num_visible,
            "ms": rounds.of(name, 1e3),
            "images/s": rounds.rate(name, self.shape.batch_size),
            "TFLOP/s": rounds.rate(name, steps.flops / 1e12),
            "of the matmul rate": machine.share_of_ceiling(rounds, name, steps.flops, best, self.settings.device),
            f"time over {promised}": rounds.ratio(name, promised),
            "peak GiB": self.peaks[name],
        }
