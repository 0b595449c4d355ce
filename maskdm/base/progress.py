"""Progress with an ETA: a live bar in a terminal, occasional lines in a log file; and what takes curves."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_EVERY_SECONDS = 15.0


class Progress:
    """Counts up to `total` and shows rate, ETA and a note.

    Args:
        total: the amount of work, in `unit`s.
        description: what is being done.
        unit: what is counted.
        initial: how much was done before this process (a resumed run).
    """

    def __init__(self, total: int, description: str, unit: str = "it", initial: int = 0) -> None:
        bar = {"total": total, "desc": description, "unit": unit, "initial": initial, "dynamic_ncols": True}
        self._bar = tqdm(**bar) if sys.stderr.isatty() else None
        self._total, self._description, self._unit = total, description, unit
        self._done = self._initial = initial
        self._start = self._last = time.monotonic()

    def update(self, done: int = 1, note: str = "") -> None:
        """Count `done` more; the note is shown beside the bar."""
        self._done += done
        with suppress(OSError):  # a closed terminal or pipe does not stop the work
            if self._bar is not None:
                if note:
                    self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(done)
            elif time.monotonic() - self._last >= LOG_EVERY_SECONDS or self._done >= self._total:
                self._print(note)

    def update_to(self, done: int, note: str = "") -> None:
        """Set how much is done in all."""
        self.update(done - self._done, note)

    def close(self) -> None:
        """Finish the bar."""
        with suppress(OSError):
            if self._bar is not None:
                self._bar.close()

    def _print(self, note: str) -> None:
        self._last = time.monotonic()
        rate = (self._done - self._initial) / max(self._last - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        tail = f", {note}" if note else ""
        print(
            f"{self._description}: {self._done}/{self._total} {self._unit}, "
            f"{rate:.1f} {self._unit}/s, {left:.0f} s left{tail}",
            file=sys.stderr,
            flush=True,
        )


def progress(items: Iterable[T], total: int, description: str, unit: str = "it") -> Iterator[T]:
    """Iterate with a progress display."""
    bar = Progress(total, description, unit)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()


class Log:
    """Takes the rows of a training curve while a stage works; this one drops them: `tracking.enabled` is false."""

    def add(self, step: int, values: dict[str, float]) -> None:
        """Log metrics; costs microseconds.

        Args:
            step: the optimizer's updates so far.
            values: plain numbers by name (`loss`, `lr`, `images_per_second`).
        """
