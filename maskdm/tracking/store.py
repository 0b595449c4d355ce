"""The MLflow store: opened, and its runs made to carry what they should.

One `flock` is held around opening and migrating a database, and around finding, creating and changing a run: without
it, processes that start together on a fresh database crash in its migration, or make runs twice.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm.config import paths
from maskdm.tracking.content import ENDED, Content

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PREFIX = "maskdm."  # of our tags
PARENT = "mlflow.parentRunId"
DIGEST, FILES, SUPERSEDED, EXPERIMENT_RUN = "maskdm.content", "maskdm.files", "maskdm.superseded", "maskdm.exp"
WORKSPACE = "workspace"  # the value of EXPERIMENT_RUN outside of `dvc exp run`
POINTS_PER_BATCH, ENTRIES_PER_BATCH = 1000, 100  # MLflow's limits
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# Only where the user has set nothing: by itself MLflow tries for minutes to reach a server that is dead.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def store_root() -> Path:
    """The folder of the local store: the project's root. `dvc exp run --temp` works in a copy, which it deletes."""
    root = Path(os.environ.get("DVC_ROOT", ""))
    return root if root.is_absolute() and (root / ".dvc").is_dir() else paths.project_root()


def store_uri() -> str:
    """MLflow's tracking URI: MLFLOW_TRACKING_URI, else a database at the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(store_root() / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """The URI of an SQLite database. In it, `?` begins the options, and can't be escaped: such paths are relative."""
    return f"sqlite:///{os.path.relpath(file) if '?' in str(file) else file}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).partition("?")[0]) if uri.startswith(prefix) else None


def shown(text: str) -> str:
    """A tracking URI, or a message that may hold it, as it may be printed: without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def artifacts_folder() -> Path:
    """Where the artifacts of a local database go."""
    return store_root() / "mlartifacts"


class Store:
    """An open store, and one experiment in it.

    Args:
        experiment: its name; it is created where it does not exist, and restored where it was deleted.

    Attributes:
        client: MLflow's.
        experiment_id: MLflow's.

    Raises:
        Exception: whatever mlflow raises when it can't open the store.
    """

    def __init__(self, experiment: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.uri = store_uri()
        self.client = _open_client(self.uri)
        with self.locked():
            self.experiment_id = self._find_experiment(experiment)
        self._published: dict[str, Run] | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; it is not reentrant. The kernel releases it when the process dies."""
        with _locked():
            yield

    def tag_experiment(self, tags: dict[str, str]) -> None:
        """Make the experiment carry tags."""
        known = self.client.get_experiment(self.experiment_id).tags
        for key, value in tags.items():
            if known.get(key) != value:
                self.client.set_experiment_tag(self.experiment_id, key, value)

    def publish(self, content: Content, parent: str | None = None) -> tuple[str, bool]:
        """Make the run of a piece of work carry its content; it is created where it does not exist.

        Other runs of its slot are tagged as superseded.

        Args:
            content: what it carries.
            parent: the id of the run that it belongs to.

        Returns:
            its id, and whether anything had to be written.
        """
        digest = content.digest
        run = self._listed(digest)
        if run is not None and (run.info.status, run.data.tags.get(PARENT)) == (content.status, parent):
            return run.info.run_id, False
        with self.locked():
            run = self._find_or_create(content, parent)
            self._write(run, content, digest)
            if content.status in ENDED:
                end_ms = max(content.end_ms or _now_ms(), run.info.start_time)
                self.client.set_terminated(run.info.run_id, content.status, end_ms)
            elif run.info.status != content.status:
                self.client.update_run(run.info.run_id, status=content.status)
        return run.info.run_id, True

    def last_steps(self, run: Run, keys: Sequence[str]) -> dict[str, int]:
        """The last step of each metric of a run: points are only ever added beyond it, as MLflow keeps both of two."""
        known = [key for key in keys if key in run.data.metrics]
        histories = {key: self.client.get_metric_history(run.info.run_id, key) for key in known}
        return {key: max(point.step for point in history) for key, history in histories.items() if history}

    def log_points(self, run_id: str, points: Sequence[tuple[str, int, float, int]]) -> None:
        """Log points (metric, step, value, time in milliseconds) in as few requests as MLflow allows."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, at_ms, step) for key, step, value, at_ms in points]
        for chunk in _chunks(metrics, POINTS_PER_BATCH):
            self.client.log_batch(run_id, metrics=chunk)

    def _find_experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:  # MLflow's own place for artifacts is the folder where a stage happens to run
            place = artifacts_folder().as_uri() if self.uri.startswith(DATABASES) else None
            return str(self.client.create_experiment(name, place))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _listed(self, digest: str) -> Run | None:
        """The run that carries a digest, of the runs that were there at the first call: one request for all."""
        if self._published is None:
            runs = self._search(f"tags.`{SUPERSEDED}` = 'false'")
            self._published = {run.data.tags[DIGEST]: run for run in runs if DIGEST in run.data.tags}
        return self._published.get(digest)

    def _find_or_create(self, content: Content, parent: str | None) -> Run:
        """The run of a piece of work; other runs of its slot are superseded, those of other `dvc exp` aside."""
        slot, own = _tags(content.slot), os.environ.get("DVC_EXP_NAME") or WORKSPACE
        runs = self._search(" and ".join(f"tags.`{key}` = '{value}'" for key, value in slot.items()))
        found = next((run for run in runs if _is_of(run, content)), None)
        for other in runs:
            of_others = other.data.tags.get(EXPERIMENT_RUN) != own or other.data.tags.get(SUPERSEDED) == "true"
            if other is not found and not of_others:
                self.client.set_tag(other.info.run_id, SUPERSEDED, "true")
        tags = {**slot, **_tags(content.identity), SUPERSEDED: "false"} | ({} if parent is None else {PARENT: parent})
        if found is None:
            name = content.name if own == WORKSPACE else f"{content.name} ({own})"
            start_ms, tags = content.start_ms or _now_ms(), {**tags, EXPERIMENT_RUN: own}
            return self.client.create_run(self.experiment_id, start_ms, tags, run_name=name)
        self._set_tags(found, tags)
        return found

    def _write(self, run: Run, content: Content, digest: str) -> None:
        """Add what the run lacks. The digest comes last: where this is interrupted, the next one completes it."""
        from mlflow.entities import Param

        run_id, data, now = run.info.run_id, run.data, _now_ms()
        params = [Param(key, value) for key, value in content.params.items() if key not in data.params]
        for chunk in _chunks(params, ENTRIES_PER_BATCH):
            self.client.log_batch(run_id, params=chunk)
        last = self.last_steps(run, sorted({key for key, _ in content.points}))
        points = [(key, step, v, now) for (key, step), v in content.points.items() if step > last.get(key, -1)]
        for key, value in content.values.items():
            is_there, is_wanted = key in data.metrics, value == value  # NaN is wanted only to withdraw a value
            if is_wanted if not is_there else str(data.metrics[key]) != str(value):
                points.append((key, 0, value, now))
        self.log_points(run_id, points)
        if content.dataset is not None:
            self._add_dataset(run, content.dataset)
        files = {FILES: content.files_digest} if content.files else {}
        if files and data.tags.get(FILES) != files[FILES]:
            for file in content.files:
                self.client.log_artifact(run_id, str(file), content.folder)
        if "failed" in data.tags and "failed" not in content.tags:  # the stage was resumed
            self.client.delete_tag(run_id, "failed")
        self._set_tags(run, {**content.tags, **files})
        self._set_tags(run, {DIGEST: digest})

    def _set_tags(self, run: Run, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        for chunk in _chunks(changed, ENTRIES_PER_BATCH):
            self.client.log_batch(run.info.run_id, tags=chunk)

    def _add_dataset(self, run: Run, dataset: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = [] if run.inputs is None else [entry.dataset.digest for entry in run.inputs.dataset_inputs]
        if dataset["digest"] not in known:
            inputs = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "training")])
            self.client.log_inputs(run.info.run_id, [inputs])

    def _search(self, query: str) -> list[Run]:
        """All runs of the experiment that a query finds, the newest first; without those that were deleted."""
        found: list[Run] = []
        token, order = None, ["attributes.start_time DESC"]
        while True:
            page = self.client.search_runs([self.experiment_id], query, order_by=order, page_token=token)
            found += page
            if not (token := page.token):
                return found


def _tags(names: dict[str, str]) -> dict[str, str]:
    return {PREFIX + name: value for name, value in names.items()}


def _is_of(run: Run, content: Content) -> bool:
    """Whether a run is of the same piece of work: no part of its identity differs, as far as both know it."""
    return all(run.data.tags.get(key, value) == value for key, value in _tags(content.identity).items())


def _open_client(uri: str) -> MlflowClient:
    """Import mlflow and open its client, which creates or migrates a database."""
    import mlflow

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs a traceback of what our one line says
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # our warning is enough
    if uri.startswith(DATABASES):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # MLflow would try for minutes
    mlflow.set_tracking_uri(uri)  # some of the client's methods go by it, and would make a second database
    with _locked():
        return mlflow.MlflowClient(uri)


@contextmanager
def _locked() -> Iterator[None]:
    file = store_root() / paths.WORK / "mlflow.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
