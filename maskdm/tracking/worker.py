"""One thread that does all of a process's MLflow work, so that training never waits for it.

Importing mlflow takes seconds, and a write to SQLite can, while other arms write too.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from maskdm import paths
from maskdm.tracking.store import Store, open_store, shown, store_uri

WAIT_SECONDS = 120.0  # eight processes on a fresh database and two busy cores were seen to need 40


class Job(NamedTuple):
    """A piece of work for the thread."""

    what: str
    do: Callable[[Store], None]
    done: threading.Event


class Worker:
    """Does jobs on one store in order; after the first failure it says so once and does none any more.

    Args:
        uri: MLflow's tracking URI.
        root: the project's root: lock and artifacts lie there.
    """

    def __init__(self, uri: str, root: Path) -> None:
        self._uri, self._root = uri, root
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._gave_up = False
        self._warning = threading.Lock()
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def submit(self, what: str, do: Callable[[Store], None]) -> threading.Event:
        """Queue a job.

        Args:
            what: what is lost when it fails, for the warning.
            do: called in the thread, with the store.

        Returns:
            set once the job has been done or dropped.
        """
        job = Job(what, do, threading.Event())
        self._jobs.put(job)
        return job.done

    def wait(self, what: str, done: threading.Event, seconds: float = WAIT_SECONDS) -> None:
        """Wait for a job of `submit`, but not for ever: a store that hangs must not hold up a stage."""
        if not self._gave_up and not done.wait(seconds):
            self._give_up(what, f"no answer within {seconds:.0f} s")

    def _work(self) -> None:
        store: Store | None = None
        while True:
            job = self._jobs.get()
            try:
                if not self._gave_up:
                    store = store or open_store(self._uri, self._root)
                    job.do(store)
            except Exception as error:  # whatever mlflow raises, the stage must live
                self._give_up(job.what, f"{type(error).__name__}: {_first_line(error)}")
            finally:
                job.done.set()

    def _give_up(self, what: str, why: str) -> None:
        with self._warning:
            if self._gave_up:
                return
            self._gave_up = True
        print(
            f"warning: not logged to MLflow at {shown(self._uri)}: {what}, nor what follows ({why}). "
            "The results are complete without it; `maskdm report` publishes them to MLflow later.",
            file=sys.stderr,
            flush=True,
        )


def worker() -> Worker:
    """The worker of this process and project."""
    return _worker(store_uri(), paths.project_root())


@cache
def _worker(uri: str, root: Path) -> Worker:
    return Worker(uri, root)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
