"""The MLflow store: opened once, and its runs found or created under a lock.

One **arm run** per (experiment, arm, seed) carries what is compared; each of its stages is a child run. A trial of an
arm's hyperparameters is a run of its own.
Without the lock, processes that start together on a fresh database crash in its migration or make runs twice.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from maskdm import config
from maskdm.config import paths
from maskdm.tracking.continued import ContinuedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
KEY = "maskdm.key"  # of the piece of work: a run with it is gone on with
SPOOL = "maskdm.spool"  # the one of the process that works on the run now
POINTS_PER_BATCH = 1000  # mlflow's limit
ENTRIES_PER_BATCH = 100  # mlflow's limit for params and for tags
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# Only where the user set nothing: mlflow's own retries of a refused connection take minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class ArmKey(NamedTuple):
    """What identifies an arm run: another fingerprint is another run, since MLflow's params can't change."""

    experiment: str
    arm: str
    seed: int
    fingerprint: str

    @property
    def run_name(self) -> str:
        """The name that MLflow shows."""
        return f"{self.arm}-seed-{self.seed}"


class TrialKey(NamedTuple):
    """What identifies the run of an arm's trial: the newest is the one."""

    experiment: str
    arm: str
    trial: str

    @property
    def run_name(self) -> str:
        """The name that MLflow shows."""
        return f"{self.arm}-{self.trial}"

    @property
    def tags(self) -> dict[str, str]:
        """The tags that such a run is found by."""
        return {"maskdm.kind": "trial", "maskdm.arm": self.arm, "maskdm.trial": self.trial}


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


def arm_key(run: config.Run) -> ArmKey:
    """The key of an arm's run."""
    return ArmKey(run.params.name, run.arm, run.seed, run.fingerprint())


def store_uri() -> str:
    """MLflow's tracking URI: MLFLOW_TRACKING_URI, else a database at the project's root.

    A relative SQLite path is of this folder: the sender works in another one.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.project_root() / 'mlflow.db'}"
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.absolute()}"


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for other stores."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None


def shown(text: str) -> str:
    """A tracking URI, or a message that may hold it, as it may be printed: without user and password."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def artifacts_folder(root: Path) -> Path:
    """Where the artifacts of a local database go."""
    return root / "mlartifacts"


def open_store(uri: str, root: Path) -> Store:
    """Import mlflow and open the store, creating or migrating its database.

    Raises:
        Exception: whatever mlflow raises when it can't.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # our warning is enough
    if uri.startswith(DATABASES):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # mlflow would try for minutes, and nobody could be told why; the sender tries again
    lock = root / paths.WORK / "mlflow.lock"
    with locked(lock):
        return Store(MlflowClient(tracking_uri=uri), uri, root, lock)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it when the process dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Store:
    """An open store. Methods that find or create expect `lock` to be held.

    Args:
        client: mlflow's client of `uri`.
        uri: the tracking URI.
        root: the project's root.
        lock: the lock file.
    """

    def __init__(self, client: MlflowClient, uri: str, root: Path, lock: Path) -> None:
        self.client, self._uri, self._root, self._lock = client, uri, root, lock
        self._experiments: dict[str, str] = {}
        self._continued: dict[str, ContinuedRun] = {}

    def continued(self, run_id: str) -> ContinuedRun:
        """What a run that is gone on with carries; read when it is first asked for."""
        if run_id not in self._continued:
            self._continued[run_id] = ContinuedRun(self.client, run_id)
        return self._continued[run_id]

    def lock(self) -> AbstractContextManager[None]:
        """The lock around find-or-create; not reentrant."""
        return locked(self._lock)

    def experiment(self, name: str) -> str:
        """The id of the experiment of that name, created or restored where need be."""
        if name not in self._experiments:
            self._experiments[name] = self._ensure_experiment(name)
        return self._experiments[name]

    def find_experiment(self, name: str) -> str | None:
        """The id of the experiment of that name, if there is one."""
        found = self.client.get_experiment_by_name(name)
        return None if found is None else str(found.experiment_id)

    def tag_experiment(self, name: str, tags: dict[str, str]) -> None:
        """Make an experiment carry tags."""
        experiment_id = self.experiment(name)
        known = self.client.get_experiment(experiment_id).tags
        for key, value in tags.items():
            if known.get(key) != value:
                self.client.set_experiment_tag(experiment_id, key, value)

    def _ensure_experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            return str(self.client.create_experiment(name, self._artifact_location()))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        """Beside a local database: mlflow's own default is the folder where a stage happens to run."""
        return artifacts_folder(self._root).as_uri() if self._uri.startswith(DATABASES) else None

    def run_of(self, key: ArmKey | TrialKey, start_ms: int) -> str:
        """The id of the run of an arm or a trial, created where need be."""
        return self.arm_run(key, start_ms) if isinstance(key, ArmKey) else self._trial_run(key, start_ms)

    def replace_run(self, key: ArmKey | TrialKey, old: str) -> str:
        """Supersede the run of an arm or a trial, whose points are wrong, by an empty one.

        That of an arm takes over its stages.
        """
        start_ms = self.client.get_run(old).info.start_time + 1  # newer: kept if we are killed before the end
        if isinstance(key, ArmKey):
            new = self.new_arm_run(key, start_ms)
            self._adopt_stages(key, old, new)
        else:
            new = self._new_trial_run(key, start_ms)
        self.client.delete_run(old)
        return new

    def arm_run(self, key: ArmKey, start_ms: int) -> str:
        """The id of the arm's run, created where need be; runs of other params go, stages and all."""
        tags = {"maskdm.kind": "arm", "maskdm.arm": key.arm, "maskdm.seed": str(key.seed)}
        runs = self._search(key.experiment, tags)
        current = [run for run in runs if run.data.tags.get("maskdm.fingerprint") == key.fingerprint]
        kept = current[0].info.run_id if current else self.new_arm_run(key, start_ms)
        for twin in current[1:]:  # replace_run was killed half-way
            self._adopt_stages(key, twin.info.run_id, kept)
        for run in runs:
            if run.info.run_id != kept:
                self._delete_with_stages(key.experiment, run.info.run_id)
        return kept

    def new_arm_run(self, key: ArmKey, start_ms: int) -> str:
        """Create an arm run."""
        tags = {"maskdm.arm": key.arm, "maskdm.seed": str(key.seed), "maskdm.fingerprint": key.fingerprint}
        return self.new_run(key.experiment, key.run_name, {"maskdm.kind": "arm", **tags}, start_ms)

    def new_run(self, experiment: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        """Create a run."""
        run = self.client.create_run(self.experiment(experiment), start_time=start_ms, tags=tags, run_name=name)
        return str(run.info.run_id)

    def continue_run(self, run: Run, tags: dict[str, str]) -> str:
        """Take up a run again, also one that was deleted with the arm run that it belonged to; its id."""
        run_id = str(run.info.run_id)
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run_id)
        self.set_tags(run_id, {key: value for key, value in tags.items() if run.data.tags.get(key) != value})
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Tag a run, in as few transactions as mlflow allows."""
        from mlflow.entities import RunTag

        for chunk in _chunks([RunTag(key, value) for key, value in tags.items()], ENTRIES_PER_BATCH):
            self.client.log_batch(run_id, tags=chunk)

    def set_params(self, run_id: str, params: dict[str, str]) -> None:
        """Log params, in as few transactions as mlflow allows."""
        from mlflow.entities import Param

        for chunk in _chunks([Param(key, value) for key, value in params.items()], ENTRIES_PER_BATCH):
            self.client.log_batch(run_id, params=chunk)

    def end_run(self, run: Run, status: str, end_ms: int) -> None:
        """End a run, or end it again."""
        self._continued.pop(run.info.run_id, None)
        self.client.set_terminated(run.info.run_id, status, max(end_ms, run.info.start_time))

    def stages_of(self, experiment: str, arm_run: str) -> list[Run]:
        """The stage runs of an arm run."""
        return self._search(experiment, {"maskdm.kind": "stage", PARENT: arm_run})

    def earlier_runs(self, experiment: str, tags: dict[str, str], deleted: bool) -> list[Run]:
        """The runs with these tags, the newest first, those that are not deleted before those that are.

        Args:
            experiment: its name.
            tags: names and values.
            deleted: whether deleted ones are asked for, too.
        """
        runs = self._search(experiment, tags, deleted)
        return sorted(runs, key=lambda run: run.info.lifecycle_stage == "deleted")

    def _trial_run(self, key: TrialKey, start_ms: int) -> str:
        runs = [run.info.run_id for run in self._search(key.experiment, key.tags)]
        for older in runs[1:]:
            self.client.delete_run(older)
        return str(runs[0]) if runs else self._new_trial_run(key, start_ms)

    def _new_trial_run(self, key: TrialKey, start_ms: int) -> str:
        return self.new_run(key.experiment, key.run_name, {**key.tags, "maskdm.stage": "tune"}, start_ms)

    def _search(self, experiment: str, tags: dict[str, str], deleted: bool = False) -> list[Run]:
        """Runs with those tags, the newest first."""
        from mlflow.entities import ViewType

        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self.client.search_runs(
            [self.experiment(experiment)],
            query,
            run_view_type=ViewType.ALL if deleted else ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time DESC"],
            max_results=1000,
        )
        return list(found)

    def _adopt_stages(self, key: ArmKey, old: str, new: str) -> None:
        for stage in self.stages_of(key.experiment, old):
            self.client.set_tag(stage.info.run_id, PARENT, new)

    def _delete_with_stages(self, experiment: str, arm_run: str) -> None:
        for stage in self.stages_of(experiment, arm_run):
            self.client.delete_run(stage.info.run_id)
        self.client.delete_run(arm_run)


def write_points(store: Store, run_id: str, points: list[Point]) -> None:
    """Log metrics in as few transactions as mlflow allows."""
    from mlflow.entities import Metric

    metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in points]
    for chunk in _chunks(metrics, POINTS_PER_BATCH):
        store.client.log_batch(run_id, metrics=chunk)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
