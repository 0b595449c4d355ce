"""Signals: the first may wait for a good moment, and the exit code says which one it was."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

CODE = """
import sys, time
from maskdm.base import interrupts

interrupts.install()
try:
    with interrupts.deferring() as deferral:
        print("ready", flush=True)
        while deferral.requested is None:
            time.sleep(0.01)
        print("saved", flush=True)
except interrupts.Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_waits_until_the_work_is_saved(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a background job ignores Ctrl-C
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "saved\n")
    assert err.startswith(f"maskdm: {number.name}: saving after this step")
