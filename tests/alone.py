"""A command on hostile input: in a process of its own, with bounded memory and so many seconds of work."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from tests.conftest import Experiment, Outcome

MEMORY = 3 * 2**29  # bytes of address space; the command line needs half of it
SECONDS = 20  # of work, not by the clock: other processes slow nothing down
WAITED_FOR = 300  # seconds by the clock until a process that waits without working is given up


def victim(folder: Path, *words: str, alone: bool = True, memory: int = MEMORY) -> Outcome:
    """Run a command; alone, it gets no more memory and time than honest input needs."""
    outcome = run_alone(folder, memory, *words) if alone else Experiment(folder).run(*words)
    assert "Traceback" not in outcome.err, outcome.err[-3000:]
    assert not [c for c in outcome.err if not c.isprintable() and c not in "\n\r"]
    return outcome


def run_alone(folder: Path, memory: int, *words: str) -> Outcome:
    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    done = subprocess.run(
        [sys.executable, "-m", "maskdm", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WAITED_FOR,
        errors="surrogateescape",
        preexec_fn=bounded,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def put(path: Path, content: bytes) -> None:
    """Write a file and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
