"""What a stage logs of itself: a run with its progress and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskdm import paths
from maskdm.config import Params
from maskdm.tracking.background import wake_sender, warn_if_unsent
from maskdm.tracking.spool import END, METRICS, PARAMS, RUN, TAGS, Spool
from maskdm.tracking.store import ArmKey, arm_key, store_uri


class StageRun:
    """The run of a stage, as the stage sees it; this one does nothing: `tracking.enabled` is false."""

    def log(self, step: int, **metrics: float) -> None:
        """Log metrics; costs microseconds.

        Args:
            step: the optimizer's updates done, or what else the stage counts.
            metrics: plain numbers by name (`loss`, `lr`, `images_per_second`).
        """

    def params(self, **params: object) -> None:
        """Log what the stage was given; MLflow forbids another value later."""

    def tags(self, **tags: object) -> None:
        """Tag the run."""

    def figure(self, file: Path) -> None:
        """Attach a file; it is copied now, so the caller may move it afterwards."""


class SpooledStageRun(StageRun):
    """The run of a stage whose events go to a spool.

    Args:
        root: the project's root.
        stage: the stage's name.
        experiment: MLflow's experiment.
        arm: the arm run that this run belongs to, if any.
    """

    def __init__(self, root: Path, stage: str, experiment: str, arm: ArmKey | None) -> None:
        self._root = root
        name = stage if arm is None else f"{stage}-{arm.arm}-{arm.seed}"
        self._spool = Spool(root, name, store_uri())
        self._spool.append(RUN, experiment=experiment, stage=stage, arm=arm and arm._asdict())
        wake_sender(root, self._spool)  # after the spool is there: a sender that ends just now sees it

    def log(self, step: int, **metrics: float) -> None:  # noqa: D102
        self._spool.append(METRICS, step=step, values={key: float(value) for key, value in metrics.items()})

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
        wake_sender(self._root, self._spool)  # the first may have been killed, or have given up, in the meantime


@contextmanager
def stage_run(params: Params, stage: str, arm: str | None = None, seed: int | None = None) -> Iterator[StageRun]:
    """Track a stage's run around its work; MLflow's failures never reach the stage.

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
    root, key = paths.project_root(), None if arm is None or seed is None else arm_key(params, arm, seed)
    warn_if_unsent(root)
    run = SpooledStageRun(root, stage, params.name, key)
    try:
        yield run
    except BaseException as error:
        run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.finish("FINISHED")
