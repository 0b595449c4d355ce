"""What a long stage logs while it works.

Importing and opening MLflow takes seconds of CPU time. Short stages do not spend them: they are published later. A
stage that works for more than a minute logs from a thread of its own, and publishes results/ at its end. Nothing that
happens in the thread fails the stage, or delays it by more than a few seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from maskdm.base.errors import UserError
from maskdm.base.progress import Log
from maskdm.config.jobs import ARM_STAGES, Job, Jobs
from maskdm.tracking.content import arm_contents, running_content

if TYPE_CHECKING:
    from maskdm.tracking.store import Store

BEGINS_AFTER_SECONDS = 60.0
LOGS_EVERY_SECONDS = 10.0
MAX_WAIT_SECONDS = 5.0  # at the end of the stage


class LiveLog(Log):
    """Logs a stage's rows to MLflow, once the stage has worked for a minute.

    Args:
        job: what the stage works on.
        work_id: the id of the work: a stage that is resumed logs to the same run.
    """

    def __init__(self, job: Job, work_id: str) -> None:
        self._job, self._work_id = job, work_id
        self._rows: list[tuple[int, dict[str, float], int]] = []
        self._status, self._has_ended, self._has_warned = "RUNNING", threading.Event(), False
        self._store: Store | None = None
        self._run_id, self._last_steps = "", dict[str, int]()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, step: int, values: dict[str, float]) -> None:  # noqa: D102
        self._rows.append((step, values, time.time_ns() // 1_000_000))

    def end(self, status: str) -> None:
        """Let the thread log the rest and publish, and wait for it a few seconds at most.

        Args:
            status: MLflow's: FINISHED, FAILED or KILLED.
        """
        self._status = status
        self._has_ended.set()
        self._thread.join(MAX_WAIT_SECONDS)

    def _work(self) -> None:
        if self._has_ended.wait(BEGINS_AFTER_SECONDS):
            return
        while not self._has_ended.is_set():
            self._try(self._send)
            self._has_ended.wait(LOGS_EVERY_SECONDS)
        self._try(self._send)
        self._try(self._publish)

    def _try(self, what: Callable[[], None]) -> None:
        """Do something with MLflow. Where it fails, warn once; rows are kept for the next time."""
        from maskdm.tracking.publishing import LATER, explaining

        try:
            with explaining():
                what()
        except UserError as error:
            self._store = None
            if not self._has_warned:
                print(f"warning: tracking: {error}; {LATER}", file=sys.stderr, flush=True)
            self._has_warned = True

    def _send(self) -> None:
        """Log the rows that are new; of a stage that was resumed, only those beyond the last step in MLflow."""
        from maskdm.tracking.store import Store

        if self._store is None:
            store = Store(self._job.params.name)
            self._run_id = self._publish_as(store, "RUNNING")
            run = store.client.get_run(self._run_id)
            self._last_steps = store.last_steps(run, list(run.data.metrics))
            self._store = store
        count, last = len(self._rows), self._last_steps
        rows = [(key, *row) for row in self._rows[:count] for key in row[1]]
        points = [(key, step, values[key], at) for key, step, values, at in rows if step > last.get(key, -1)]
        self._store.log_points(self._run_id, points)
        del self._rows[:count]

    def _publish(self) -> None:
        """After the end: all of results/, this arm first; of a stage that has not ended well, only how it ended."""
        from maskdm.tracking.publishing import track

        if self._status == "FINISHED":
            track(Jobs(self._job.params), first=self._job)
        elif self._store is not None:
            self._publish_as(self._store, self._status)

    def _publish_as(self, store: Store, status: str) -> str:
        """Make the runs of the stage and of its arm have a status; the id of the former."""
        job, parent = self._job, None
        content = running_content(job, self._work_id)
        if job.stage in ARM_STAGES and job.arm is not None and job.seed is not None:
            for arm in arm_contents(Jobs(job.params), job.arm, job.seed, job, self._work_id):
                content, arm.status = arm.children[-1], status
                parent, _ = store.publish(arm)
        content.status = status
        return store.publish(content, parent)[0]


@contextmanager
def live_log(job: Job, work_id: str) -> Iterator[Log]:
    """Log a stage's rows while the block works.

    Args:
        job: what the stage works on.
        work_id: the id of the work.
    """
    log = LiveLog(job, work_id)
    try:
        yield log
    except BaseException as error:
        log.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    log.end("FINISHED")
