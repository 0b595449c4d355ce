"""Ctrl-C, SIGTERM and a closed terminal: the first signal may wait until work is saved, the second ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

# Sent by pre-emption, Ctrl-C and a closed terminal. A signal that is ignored from outside (nohup) stays ignored.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        number: the number of the signal.
        message: what was saved, and how to resume.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number, self.message = signal.Signals(number), message

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as in the shell: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


@dataclass
class Deferral:
    """The first signal that came while signals were deferred; None if there was none."""

    requested: signal.Signals | None = None


_deferral: Deferral | None = None


def install() -> None:
    """Make the signals raise `Stopped` in the main thread, or wait while `deferring` is active."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def deferring() -> Iterator[Deferral]:
    """Defer the first signal until the block handles it, at the latest until it ends; a second one is not deferred.

    Raises:
        Stopped: a signal came, and the block ended without handling it.
    """
    global _deferral
    before, _deferral = _deferral, Deferral()
    own = _deferral
    try:
        yield own
    finally:
        _deferral = before
    if own.requested is not None:
        raise Stopped(own.requested)


def _handle(number: int, frame: FrameType | None) -> None:
    if _deferral is not None and _deferral.requested is signal.SIGHUP and number == signal.SIGHUP:
        return  # the shell and the kernel may both send it
    if _deferral is None or _deferral.requested is not None:
        raise Stopped(number)
    _deferral.requested = signal.Signals(number)
    message = (
        f"maskdm: {_deferral.requested.name}: saving after this step, then stopping (send it again to stop at once)\n"
    )
    with suppress(OSError):  # the terminal, or the other end of a pipe, may be closed
        os.write(2, message.encode())
