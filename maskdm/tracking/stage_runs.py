"""What a stage logs of itself: a run with its progress and how it ended."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from maskdm.config import Params
from maskdm.tracking.store import PARENT, ArmKey, Store, arm_key
from maskdm.tracking.worker import Worker, worker

POINTS_PER_BATCH = 1000  # mlflow's limit
WRITE_EVERY_SECONDS = 2.0


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


def write_points(store: Store, run_id: str, points: list[Point]) -> None:
    """Log metrics in as few transactions as mlflow allows."""
    from mlflow.entities import Metric

    metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in points]
    for start in range(0, len(metrics), POINTS_PER_BATCH):
        store.client.log_batch(run_id, metrics=metrics[start : start + POINTS_PER_BATCH])


class StageRun:
    """The run of a stage, as the stage sees it; this one does nothing: `tracking.enabled` is false."""

    def log(self, step: int, **metrics: float) -> None:
        """Log metrics without waiting.

        Args:
            step: the optimizer's updates done, or what else the stage counts.
            metrics: plain numbers by name (`loss`, `lr`, `images_per_second`).
        """

    def params(self, **params: object) -> None:
        """Log what the stage was given; MLflow forbids another value later."""

    def tags(self, **tags: object) -> None:
        """Tag the run."""

    def figure(self, file: Path) -> None:
        """Attach a file; it is read now, so the caller may move it afterwards."""


class TrackedStageRun(StageRun):
    """The run of a stage in MLflow: every call only queues work.

    Args:
        worker: does the work.
        stage: the stage's name.
        experiment: MLflow's experiment.
        arm: the arm run that this run belongs to, if any.
    """

    def __init__(self, worker: Worker, stage: str, experiment: str, arm: ArmKey | None) -> None:
        self._worker, self._stage, self._experiment, self._arm = worker, stage, experiment, arm
        self._what = f"stage {stage}" + (f" of {arm.run_name}" if arm else "")
        self._points: deque[Point] = deque()
        self._last_write = time.monotonic()
        self._run_id = ""  # set by the worker's thread, which alone reads it
        worker.submit(self._what, self._start)

    def log(self, step: int, **metrics: float) -> None:  # noqa: D102
        now = time.time_ns() // 1_000_000
        self._points.extend(Point(key, float(value), now, step) for key, value in metrics.items())
        if time.monotonic() - self._last_write >= WRITE_EVERY_SECONDS:
            self._last_write = time.monotonic()
            self._worker.submit(self._what, self._write)

    def params(self, **params: object) -> None:  # noqa: D102
        from_now = {key: str(value) for key, value in params.items()}

        def write(store: Store) -> None:
            for key, value in from_now.items():
                store.client.log_param(self._run_id, key, value)

        self._worker.submit(self._what, write)

    def tags(self, **tags: object) -> None:  # noqa: D102
        from_now = {key: str(value) for key, value in tags.items()}

        def write(store: Store) -> None:
            for key, value in from_now.items():
                store.client.set_tag(self._run_id, key, value)

        self._worker.submit(self._what, write)

    def figure(self, file: Path) -> None:  # noqa: D102
        name, content = file.name, file.read_bytes()

        def write(store: Store) -> None:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / name
                copy.write_bytes(content)
                store.client.log_artifact(self._run_id, str(copy))

        self._worker.submit(f"{name} of {self._what}", write)

    def finish(self, status: str) -> None:
        """Write what is left, end the run and wait for that.

        Args:
            status: mlflow's: FINISHED, FAILED or KILLED.
        """

        def end(store: Store) -> None:
            self._write(store)
            store.client.set_terminated(self._run_id, status)
            parent = store.client.get_run(self._run_id).data.tags.get(PARENT)  # may have been superseded
            if parent is not None:
                store.client.set_terminated(parent, status)

        self._worker.wait(self._what, self._worker.submit(self._what, end))

    def _start(self, store: Store) -> None:
        """Create the run in place of older ones of the stage; the arm's status is its latest stage's."""
        tags = {"maskdm.kind": "stage", "maskdm.stage": self._stage}
        with store.lock():
            if self._arm is None:
                older = store.top_level_stages(self._experiment, self._stage)
            else:
                parent = store.arm_run(self._arm)
                store.client.update_run(parent, status="RUNNING")
                older = store.stages_of(self._experiment, parent, self._stage)
                tags |= {PARENT: parent, "maskdm.arm": self._arm.arm, "maskdm.seed": str(self._arm.seed)}
            for run in older:
                store.client.delete_run(run.info.run_id)
            self._run_id = store.new_run(self._experiment, self._stage, tags)

    def _write(self, store: Store) -> None:
        points = [self._points.popleft() for _ in range(len(self._points))]
        write_points(store, self._run_id, points)


@contextmanager
def stage_run(params: Params, stage: str, arm: str | None = None, seed: int | None = None) -> Iterator[StageRun]:
    """Track a stage's run around its work; MLflow's failures never reach the stage.

    Call it after the heavy imports: the worker's thread imports mlflow meanwhile.

    Args:
        params: `tracking.enabled` false makes it all a no-op.
        stage: the stage's name.
        arm: the arm, where the stage belongs to one.
        seed: the arm's seed.

    Yields:
        what the stage logs to. The run ends FINISHED; FAILED or (Ctrl-C, exit) KILLED when the block raises.
    """
    if not params.tracking.enabled:
        yield StageRun()
        return
    key = None if arm is None or seed is None else arm_key(params, arm, seed)
    run = TrackedStageRun(worker(), stage, params.name, key)
    try:
        yield run
    except BaseException as error:
        run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.finish("FINISHED")
