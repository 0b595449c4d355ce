"""What the events of a spool do in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from maskdm.base.errors import UserError
from maskdm.tracking.dataset import add_dataset
from maskdm.tracking.publishing import publish
from maskdm.tracking.registry import publish_models
from maskdm.tracking.spool import (
    END,
    EXPERIMENT,
    FIGURE,
    METRICS,
    MODELS,
    PARAMS,
    PUBLISH,
    RUN,
    TAGS,
    Event,
    SpoolReader,
)
from maskdm.tracking.store import KEY, PARENT, SPOOL, ArmKey, Point, Store, TrialKey, shown, write_points

if TYPE_CHECKING:
    from mlflow.entities import Run

EVENTS_PER_BATCH = 1000
# Of an event or a file that is wrong in itself: it would be refused for ever, and everything behind it held up.
WRONG = (UserError, ValueError, TypeError, KeyError, FileNotFoundError)
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "ENDPOINT_NOT_FOUND",  # a server older than MLflow 3 knows no logged models
}


class Delivery:
    """Sends a spool; every event may be sent twice, since the sender may be killed before it has noted the first time.

    Args:
        store: where to.
        spool: the spool.
    """

    def __init__(self, store: Store, spool: SpoolReader) -> None:
        self._store, self._spool = store, spool
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            EXPERIMENT: self._experiment,
            RUN: self._start,
            PARAMS: self._params,
            TAGS: self._tags,
            FIGURE: self._figure,
            PUBLISH: lambda event: publish(store, event),
            MODELS: lambda event: publish_models(store, event),
            END: self._end,
        }

    def send(self) -> bool:
        """Send what there is.

        Returns:
            whether that was all that will ever be: the spool can go.

        Raises:
            Exception: whatever mlflow raises when it can't; what was sent until then is noted.
        """
        is_live = self._spool.is_live  # asked before reading: what is written until the end is then surely read
        for events in _batches(self._spool.unsent()):
            self._send(events)
            self._spool.mark(offset=events[-1].end, ended=events[-1].kind == END)
        if not is_live and not self._spool.progress.ended:
            killed = {"status": "KILLED", "time_ms": self._spool.changed_ms}
            self._send([Event(END, killed, self._spool.progress.offset)])
        return not is_live

    def _send(self, events: list[Event]) -> None:
        try:
            if events[0].kind == METRICS:
                self._metrics(events)
            elif (handler := self._handlers.get(events[0].kind)) is not None:
                handler(events[0].fields)
        except Exception as error:
            if not _is_refusal(error):
                raise
            line = f"{self._spool.folder.name}: left out {events[0].kind}: {shown(str(error))}"
            print(line, file=sys.stderr, flush=True)

    def _experiment(self, event: dict[str, Any]) -> None:
        with self._store.lock():
            self._store.tag_experiment(event["name"], event["tags"])

    def _start(self, event: dict[str, Any]) -> None:
        """Go on with the run of this piece of work, or create one; either takes the place of the stage's older ones."""
        key = event.get("key")
        with self._store.lock():
            name, tags, parent = self._identify(event)
            earlier = self._store.earlier_runs(event["experiment"], tags, deleted=key is not None)
            same = next((run for run in earlier if key is not None and run.data.tags.get(KEY) == key), None)
            for run in earlier:
                if run is not same and _is_active_in(run, parent.get(PARENT)):
                    self._store.client.delete_run(run.info.run_id)
            tags |= parent | ({} if key is None else {KEY: key, SPOOL: self._spool.folder.name})
            if same is None:
                run_id = self._store.new_run(event["experiment"], name, tags, event["time_ms"])
            else:
                run_id = self._store.continue_run(same, tags)
            self._spool.mark(run_id=run_id, is_continued=same is not None)
        if event.get("dataset") is not None:
            add_dataset(self._store, self._store.client.get_run(run_id), event["dataset"])

    def _identify(self, event: dict[str, Any]) -> tuple[str, dict[str, str], dict[str, str]]:
        """Name and tags of the run that a stage wants, and the tag of the arm run that it is part of, if it is."""
        tags = {"maskdm.kind": "stage", "maskdm.stage": event["stage"]}
        if event.get("trial") is not None:
            trial = TrialKey(**event["trial"])
            return trial.run_name, tags | trial.tags, {}
        if event["arm"] is None:
            return event["stage"], tags, {}
        arm = ArmKey(**event["arm"])
        parent = self._store.arm_run(arm, event["time_ms"])
        self._store.client.update_run(parent, status="RUNNING")  # the arm's status is its latest stage's
        return event["stage"], tags | {"maskdm.arm": arm.arm, "maskdm.seed": str(arm.seed)}, {PARENT: parent}

    @property
    def _run_id(self) -> str:
        if self._spool.progress.run_id is None:
            raise ValueError("there is no run")
        return self._spool.progress.run_id

    def _metrics(self, events: list[Event]) -> None:
        fields = [event.fields for event in events]
        points = [Point(key, value, e["time_ms"], e["step"]) for e in fields for key, value in e["values"].items()]
        if not self._spool.progress.is_continued:
            write_points(self._store, self._run_id, points)
            return
        run = self._store.continued(self._run_id)
        missing = run.missing_points(points)
        write_points(self._store, self._run_id, missing)
        run.add(points=missing)

    def _params(self, event: dict[str, Any]) -> None:
        if not self._spool.progress.is_continued:
            self._store.set_params(self._run_id, event["values"])
            return
        run = self._store.continued(self._run_id)
        missing = run.missing_params(event["values"])
        self._store.set_params(self._run_id, missing)
        run.add(params=missing)

    def _tags(self, event: dict[str, Any]) -> None:
        self._store.set_tags(self._run_id, event["values"])

    def _figure(self, event: dict[str, Any]) -> None:
        self._store.client.log_artifact(self._run_id, str(self._spool.folder / event["file"]))

    def _end(self, event: dict[str, Any]) -> None:
        """End the run and its arm's, which may have been superseded since the run was created.

        Where another process has gone on with the run, its end is the one that counts.
        """
        if self._spool.progress.run_id is None:  # an arm was published, or the stage was killed at its start
            return
        client, status, time_ms = self._store.client, event["status"], event["time_ms"]
        run = client.get_run(self._run_id)
        if run.data.tags.get(SPOOL, self._spool.folder.name) != self._spool.folder.name:
            return
        self._store.end_run(run, status, time_ms)
        if (parent := run.data.tags.get(PARENT)) is not None:
            self._store.end_run(client.get_run(parent), status, time_ms)


def _batches(events: Iterator[Event]) -> Iterator[list[Event]]:
    """Metrics that follow each other together, as transactions are what costs; others one by one."""
    for is_metrics, group in groupby(events, key=lambda event: event.kind == METRICS):
        while batch := list(islice(group, EVENTS_PER_BATCH if is_metrics else 1)):
            yield batch


def _is_active_in(run: Run, parent: str | None) -> bool:
    """Whether a run of a stage is not deleted, and part of that arm run, or of none."""
    return run.info.lifecycle_stage == "active" and run.data.tags.get(PARENT) == parent


def _is_refusal(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, WRONG) or (isinstance(error, MlflowException) and error.error_code in REFUSALS)
