"""Fair timing on a noisy machine: tasks alternate (A, B, C, C, B, A, …), and ratios are taken within a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from maskdm.base.progress import Progress

MAX_REPETITIONS = 1000
LONG_ENOUGH = 5  # a first run of so many times the wanted seconds is not repeated: warming up is not that slow

Repeated = Callable[[int], float]  # number of repetitions → total seconds


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, in order.

    Attributes:
        raw: all measurements.
    """

    raw: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return median(self.raw)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile."""
        if len(self.raw) == 1:
            return self.raw[0], self.raw[0]
        low, _, high = quantiles(self.raw, n=4, method="inclusive")
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """Median, quartiles and every measurement, for records."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "raw": list(self.raw)}


class Task:
    """Something to time; short tasks are repeated within a measurement.

    Args:
        run: repeats the task n times and returns the total seconds.
        least_seconds: minimum duration of a measurement.
    """

    def __init__(self, run: Repeated, least_seconds: float = 0.0) -> None:
        self._run, self._least_seconds = run, least_seconds
        self.repetitions = 1

    def warm_up(self) -> None:
        """Run the task once untimed; if it is short, run it again to find the number of repetitions."""
        first = self._run(1)
        if first < LONG_ENOUGH * self._least_seconds:
            wanted = math.ceil(self._least_seconds / max(self._run(1), 1e-9))
            self.repetitions = min(max(1, wanted), MAX_REPETITIONS)

    def measure(self) -> float:
        """Seconds of one repetition."""
        return self._run(self.repetitions) / self.repetitions


def looped(call: Callable[[], object], wait: Callable[[], object] = lambda: None) -> Repeated:
    """Make a plain call repeatable.

    Args:
        call: what is timed.
        wait: waits for a device that is still working when the call has returned.
    """

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return time.perf_counter() - started

    return run


@dataclass(frozen=True)
class Rounds:
    """Seconds of every task in every round.

    Attributes:
        seconds: task → one number per round.
    """

    seconds: Mapping[str, list[float]]

    def of(self, name: str, times: float = 1.0) -> Spread:
        """Seconds of a task, multiplied by `times`."""
        return Spread(tuple(times * value for value in self.seconds[name]))

    def rate(self, name: str, work: float) -> Spread:
        """Work per second, where one run of the task does `work`."""
        return Spread(tuple(work / value for value in self.seconds[name]))

    def ratio(self, name: str, base: str, times: float = 1.0) -> Spread:
        """Seconds of `name` over seconds of `base`, round by round, multiplied by `times`."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread(tuple(times * value / of for value, of in pairs))

    def difference(self, name: str, base: str) -> Spread:
        """Seconds of `name` less seconds of `base`, round by round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread(tuple(value - of for value, of in pairs))


def interleave(tasks: Mapping[str, Task], num_rounds: int, title: str) -> Rounds:
    """Warm up every task, then measure each once per round; every second round runs in reverse order.

    A task runs some percent faster or slower after certain others, which leave caches and memory in another state. In
    alternating order no task always runs before the one that it is compared with.

    Args:
        tasks: by name, in the order of a round.
        num_rounds: measurements per task.
        title: for the progress display.
    """
    bar = Progress((num_rounds + 1) * len(tasks), title, "measurements")
    for name, task in tasks.items():
        task.warm_up()
        bar.update(note=f"warming up: {name}")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(1, num_rounds + 1):
        order = list(tasks.items())
        for name, task in reversed(order) if number % 2 == 0 else order:
            seconds[name].append(task.measure())
            bar.update(note=f"round {number} of {num_rounds}: {name}")
    bar.close()
    return Rounds(seconds)
