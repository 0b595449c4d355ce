"""Ctrl-C, SIGTERM and a lost terminal: the first signal may wait for a good moment, the second ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

# What pre-emption, Ctrl-C and a closed terminal send; one that was ignored from outside (nohup) stays so.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        number: of the signal.
        message: what became of the work.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number, self.message = signal.Signals(number), message

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


@dataclass
class Deferral:
    """Whether a signal has come while it was to wait: the first one."""

    requested: signal.Signals | None = None


_deferral: Deferral | None = None


def install() -> None:
    """Let the signals raise `Stopped` in the main thread, or wait where the work is `deferring`."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def deferring() -> Iterator[Deferral]:
    """Let the first signal wait until the block looks at it, at the latest until it ends; a second one does not.

    Raises:
        Stopped: a signal came and the block ended without looking.
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
        return  # shell and kernel may both send it
    if _deferral is None or _deferral.requested is not None:
        raise Stopped(number)
    _deferral.requested = signal.Signals(number)
    message = f"maskdm: {_deferral.requested.name}: saving after this step and stopping (once more: at once)\n"
    with suppress(OSError):  # the terminal, or the next command in a pipe, may have ended
        os.write(2, message.encode())
