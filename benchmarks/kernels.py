"""Where the time of a training step goes, by kind of kernel: what makes up the difference to the FLOP ratio."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping

from torch.profiler import ProfilerActivity, profile

from benchmarks.outcome import Cell, Table
from benchmarks.shapes import Shape
from benchmarks.steps import Steps

LEAST_SECONDS, LEAST_STEPS, MOST_STEPS = 0.5, 2, 8
# The kind of an operator is that of the first of these words that its name holds.
KINDS = (
    ("adam", "optimizer"),
    ("lerp", "averaged weights"),
    ("layer_norm", "norms"),
    ("softmax", "softmax"),
    ("attention", "attention kernel"),
    ("gelu", "GELU"),
    ("bmm", "attention products"),
    ("baddbmm", "attention products"),
    ("mm", "linear layers"),
    ("linear", "linear layers"),
    ("copy_", "casts and copies"),
    ("::cat", "casts and copies"),
)
OTHER = "all else"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler talks on stderr


def kernel_table(shape: Shape, steps: Mapping[float, Steps]) -> Table:
    """Milliseconds of a step by kind of kernel, and how much more they are than the FLOP ratio asks for.

    Args:
        shape: that the steps are of.
        steps: by mask rate; rate 0 is what the others are compared with.
    """
    spent = {rate: kernel_seconds(of_rate) for rate, of_rate in steps.items()}
    kinds = sorted(spent[0.0], key=lambda kind: -spent[0.0][kind])
    rows = [_row(kind, spent, steps) for kind in kinds]
    note = (
        "ms by PyTorch's profiler, which costs time itself and does not see Python between operators; in brackets, the "
        "ms beyond the FLOP ratio times rate 0's"
    )
    return Table(f"{shape.name}: where a step's time goes", rows, note)


def _row(kind: str, spent: Mapping[float, Counter[str]], steps: Mapping[float, Steps]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"kind": kind}
    for rate, of_rate in steps.items():
        milliseconds = 1e3 * spent[rate][kind]
        over = milliseconds - 1e3 * spent[0.0][kind] * of_rate.flops / steps[0.0].flops
        row[f"rate {rate}"] = f"{milliseconds:.2f}" + (f" ({over:+.2f})" if rate else "")
    return row


def kernel_seconds(steps: Steps) -> Counter[str]:
    """Seconds of a step on a CPU by kind of kernel; what Python takes between operators is of none."""
    num_steps = min(MOST_STEPS, max(LEAST_STEPS, math.ceil(LEAST_SECONDS / steps.run(1))))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps.run(num_steps)
    seconds = Counter[str]()
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / num_steps
    return seconds


def kind_of(operator: str) -> str:
    """The kind of an operator, by its name."""
    name = operator.lower()
    return next((kind for word, kind in KINDS if word in name), OTHER)
