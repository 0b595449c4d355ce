"""Make MLflow say what results/ says. results/ is the truth; doing this twice changes nothing."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from maskdm.base.errors import UserError
from maskdm.base.progress import Progress
from maskdm.config.jobs import Job, Jobs
from maskdm.tracking.content import Content, contents
from maskdm.tracking.registry import publish_models
from maskdm.tracking.saved_view import experiment_tags
from maskdm.tracking.store import Store, shown, store_uri

LATER = "the results are complete without it; `maskdm track` publishes them later"
# MLflow's answers where one run can't be written; any other error means that the store can't be reached.
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "ENDPOINT_NOT_FOUND",  # a server older than MLflow 3 knows no logged models
}


@dataclass
class Published:
    """How many runs of the experiment MLflow has now, and how many of them had to be written."""

    runs: int = 0
    written: int = 0


def track(jobs: Jobs, seconds: float = float("inf"), first: Job | None = None) -> Published:
    """Publish everything in results/ that is up to date, the stages that failed or were killed, and the final models.

    Args:
        jobs: of the experiment.
        seconds: no further run is begun after so long.
        first: the job whose arm is published before the others.

    Raises:
        UserError: the store can't be reached or written, or the time is over.
    """
    deadline, done = time.monotonic() + seconds, Published()
    found = sorted(contents(jobs), key=lambda content: first is None or not _is_of_arm(content, first))
    scored: list[tuple[Content, str]] = []
    total = sum(1 + len(content.children) for content in found)
    with explaining(), closing(Progress(total, "publish to MLflow", "run")) as bar:
        store = Store(jobs.params.name)
        store.tag_experiment(experiment_tags(jobs.params))
        for content in found:
            parent: str | None = None  # stays None if MLflow refuses the arm: its stages then belong to no run
            for one in (content, *content.children):
                if time.monotonic() > deadline:
                    raise UserError(f"only {done.runs} of {total} runs are in MLflow after {seconds:.0f} s")
                with leaving_out_refused(one.name):
                    run_id, is_written = store.publish(one, parent)
                    done = Published(done.runs + 1, done.written + is_written)
                    parent = run_id if one is content else parent
                bar.update()
            if parent is not None and content.slot["kind"] == "arm" and content.status == "FINISHED":
                scored.append((content, parent))
        with leaving_out_refused("the models"):
            publish_models(store, jobs, scored)
    return done


def _is_of_arm(content: Content, job: Job) -> bool:
    return (content.slot.get("arm"), content.slot.get("seed")) == (job.arm, str(job.seed))


@contextmanager
def explaining() -> Iterator[None]:
    """Turn whatever mlflow raises into one line for people.

    Raises:
        UserError: mlflow has raised something.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"MLflow at {shown(store_uri())} could not be reached or written ({_why(error)})"
        raise UserError(reason) from error


@contextmanager
def leaving_out_refused(name: str) -> Iterator[None]:
    """Go on without a run that MLflow refuses: it would refuse it every time, and others would wait behind it."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in REFUSALS:
            raise
        print(f"warning: tracking: left out {name}: {shown(str(error))}", file=sys.stderr, flush=True)


def _why(error: Exception) -> str:
    """The first line of what the system or SQLite said; of what mlflow says, where neither did."""
    origin: BaseException | None = error
    cause = error.__cause__ or error.__context__
    while cause is not None:
        origin = cause if isinstance(cause, OSError | sqlite3.Error) else origin
        cause = cause.__cause__ or cause.__context__
    lines = str(origin).strip().splitlines()
    return shown(f"{type(origin).__name__}: {lines[0][:200] if lines else 'no message'}")
