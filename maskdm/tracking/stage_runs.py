"""What a stage logs of itself: a run with its progress and how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskdm.base.progress import StageRun
from maskdm.config import Params, Run, paths
from maskdm.tracking.background import wake_sender, warn_if_unsent
from maskdm.tracking.dataset import read_dataset
from maskdm.tracking.saved_view import experiment_tags
from maskdm.tracking.spool import END, EXPERIMENT, METRICS, PARAMS, RUN, TAGS, Spool
from maskdm.tracking.store import TrialKey, arm_key, store_uri

TRAINING = ("tune", "pretrain", "finetune")  # the stages whose runs name the data
WAKE_EVERY_SECONDS = 600.0  # in a stage of days, a server may be away for hours, and its sender give up


class SpooledStageRun(StageRun):
    """The run of a stage whose events go to a spool.

    Args:
        root: the project's root.
        name: for the spool's folder.
        run: what the run is of: experiment and stage, the arm run that it belongs to or the trial that it is, the data,
            the key of the piece of work.
        tags: of the experiment.
    """

    def __init__(self, root: Path, name: str, run: dict[str, Any], tags: dict[str, str]) -> None:
        self._root = root
        self._spool = Spool(root, name, store_uri())
        self._spool.append(EXPERIMENT, name=run["experiment"], tags=tags)
        self._spool.append(RUN, **run)
        self._wake_sender()  # after the spool is there: a sender that ends just now sees it

    def log(self, step: int, **metrics: float) -> None:  # noqa: D102
        self._spool.append(METRICS, step=step, values={key: float(value) for key, value in metrics.items()})
        if time.monotonic() - self._woke > WAKE_EVERY_SECONDS:
            self._wake_sender()

    def params(self, **params: object) -> None:  # noqa: D102
        self._spool.append(PARAMS, values={key: str(value) for key, value in params.items()})

    def tags(self, **tags: object) -> None:  # noqa: D102
        self._spool.append(TAGS, values={key: str(value) for key, value in tags.items()})

    def figure(self, file: Path) -> None:  # noqa: D102
        self._spool.add_file(file)

    def finish(self, status: str) -> None:
        """End the run.

        Args:
            status: mlflow's: FINISHED, FAILED or KILLED.
        """
        self._spool.append(END, status=status)
        self._spool.close()
        self._wake_sender()

    def _wake_sender(self) -> None:
        """Have a sender at work: the one before may have been killed, or have given up, in the meantime."""
        self._woke = time.monotonic()
        wake_sender(self._root, self._spool)


@contextmanager
def stage_run(params: Params, stage: str, run: Run | None = None, key: str | None = None) -> Iterator[StageRun]:
    """Track a stage's run around its work; MLflow's failures never reach the stage.

    Args:
        params: `tracking.enabled` false makes it all a no-op.
        stage: the stage's name.
        run: the arm and seed that the stage works on, or the trial: a run of its own kind, not part of an arm run.
        key: names this piece of work, the same in every process that works on it: a later one goes on with the run of
            the earlier, and what both log at a step is there once. Without it, every process has a run of its own.

    Yields:
        what the stage logs to. The run ends FINISHED; FAILED or (Ctrl-C, exit) KILLED when the block raises.
    """
    if not params.tracking.enabled:
        yield StageRun()
        return
    root = paths.project_root()
    name, described = _describe(params, stage, run)
    described["key"] = key
    warn_if_unsent(root)
    tracked = SpooledStageRun(root, name, described, experiment_tags(params))
    try:
        yield tracked
    except BaseException as error:
        tracked.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracked.finish("FINISHED")


def _describe(params: Params, stage: str, run: Run | None) -> tuple[str, dict[str, Any]]:
    """A name for the spool, and what the run is of."""
    dataset = read_dataset() if stage in TRAINING else None
    of: dict[str, Any] = {"experiment": params.name, "stage": stage, "arm": None, "trial": None, "dataset": dataset}
    if run is None:
        return stage, of
    if run.trial is not None:
        return f"{stage}-{run.arm}-{run.trial}", {**of, "trial": TrialKey(params.name, run.arm, run.trial)._asdict()}
    return f"{stage}-{run.arm}-{run.seed}", {**of, "arm": arm_key(run)._asdict()}
