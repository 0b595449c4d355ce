"""Fair timing on a noisy machine: tasks take turns (A, B, C, C, B, A, …), and what is compared is of the same round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from maskdm.base.progress import Progress

MOST_REPETITIONS = 1000
SURELY_LONG_ENOUGH = 5  # a first run of so many times the wanted seconds: warming up is not that slow

Repeated = Callable[[int], float]  # do it so many times → seconds in all


@dataclass(frozen=True)
class Spread:
    """What repeated measurements gave.

    Attributes:
        raw: every one of them, in order.
    """

    raw: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.raw)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of them lie."""
        if len(self.raw) == 1:
            return self.raw[0], self.raw[0]
        low, _, high = quantiles(self.raw, n=4, method="inclusive")
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """For records: median, quartiles and every measurement."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "raw": list(self.raw)}


class Task:
    """Something that is timed, repeated within a measurement until that is long enough to be read.

    Args:
        run: does it n times; seconds in all.
        least_seconds: of a measurement.
    """

    def __init__(self, run: Repeated, least_seconds: float = 0.0) -> None:
        self._run, self._least_seconds = run, least_seconds
        self.repetitions = 1

    def warm_up(self) -> None:
        """Run it once untimed, and once more to see how often it is to be repeated, unless it is long enough anyway."""
        first = self._run(1)
        if first < SURELY_LONG_ENOUGH * self._least_seconds:
            wanted = math.ceil(self._least_seconds / max(self._run(1), 1e-9))
            self.repetitions = min(max(1, wanted), MOST_REPETITIONS)

    def measure(self) -> float:
        """Seconds of one."""
        return self._run(self.repetitions) / self.repetitions


def looped(call: Callable[[], object], wait: Callable[[], object] = lambda: None) -> Repeated:
    """A plain call as something that can be repeated.

    Args:
        call: what is timed.
        wait: for a device that works on when the call has returned.
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
        """Seconds of a task.

        Args:
            name: of the task.
            times: another unit, or how many of them are meant.
        """
        return Spread(tuple(times * value for value in self.seconds[name]))

    def rate(self, name: str, work: float) -> Spread:
        """Work per second.

        Args:
            name: of the task.
            work: in one run of it.
        """
        return Spread(tuple(work / value for value in self.seconds[name]))

    def ratio(self, name: str, base: str, times: float = 1.0) -> Spread:
        """Seconds of one task over those of another, round by round: what slows both down cancels.

        Args:
            name: above the line.
            base: below it.
            times: multiplies every ratio.
        """
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread(tuple(times * value / of for value, of in pairs))


def interleave(tasks: Mapping[str, Task], num_rounds: int, title: str) -> Rounds:
    """Warm every task up, then let them take turns; every second round goes backwards.

    A task finds caches and memory as the one before left them, which is good for some percents: so none may always come
    before the one that it is compared with.

    Args:
        tasks: by name, in the order of a round.
        num_rounds: measurements of each.
        title: for the progress display.
    """
    bar = Progress((num_rounds + 1) * len(tasks), title, "measurements")
    for name, task in tasks.items():
        task.warm_up()
        bar.update(note=f"warming up: {name}")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(1, num_rounds + 1):
        turns = list(tasks.items())
        for name, task in reversed(turns) if number % 2 == 0 else turns:
            seconds[name].append(task.measure())
            bar.update(note=f"round {number} of {num_rounds}: {name}")
    bar.close()
    return Rounds(seconds)
