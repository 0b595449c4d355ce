"""Make the runs of arms and trials in MLflow carry what results/ holds; doing it twice changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm import config
from maskdm.base.errors import UserError
from maskdm.config import Params, parse_params, paths, resolve
from maskdm.config.jobs import ARM_STAGES, Jobs
from maskdm.tracking.arm_content import REPORT, read_arm
from maskdm.tracking.background import wake_sender
from maskdm.tracking.dataset import add_dataset, datasets_of, identity
from maskdm.tracking.run_content import Points, RunContent
from maskdm.tracking.saved_view import experiment_tags
from maskdm.tracking.spool import END, EXPERIMENT, MODELS, PUBLISH, Spool
from maskdm.tracking.store import ArmKey, Point, Store, TrialKey, arm_key, store_uri, write_points
from maskdm.tracking.trial_content import read_trial, trial_params

if TYPE_CHECKING:
    from mlflow.entities import Run

IMAGES_TAG = "maskdm.samples_sha256"


def publish_arm(run: config.Run, through: str = "evaluate") -> None:
    """Make the arm's run carry what is in results/: params, data, curves, scores, timings, provenance, images.

    A result that contradicts what the run carries supersedes the run.

    Args:
        run: the arm and seed; `tracking.enabled` false makes it a no-op.
        through: the last stage whose results are up to date; a stage passes its own name.
    """
    if run.params.tracking.enabled:
        _leave(run.params, f"publish-{run.arm}-{run.seed}", [(PUBLISH, _arm_event(run, through))])


def publish_report(jobs: Jobs) -> None:
    """Make MLflow carry all of results/: every arm with its verdict, every trial, and the final models.

    A cached stage logs nothing, so the report publishes everything: after a clone it fills an empty MLflow. What is
    out of date stays away: it was not made with today's params, under which it would stand there.

    Args:
        jobs: of the experiment; `tracking.enabled` false makes it a no-op.
    """
    params = jobs.params
    if not params.tracking.enabled:
        return
    runs = list(_current_runs(jobs))
    events = [(PUBLISH, _arm_event(run, through)) for run, through in runs]
    for arm, trial in product(params.arms, params.tuning.trials):
        if not jobs.find("tune", arm, trial=trial).why_outdated():
            events.append((PUBLISH, _trial_event(params, arm, trial)))
    scored = [run for run, through in runs if through == REPORT]
    seeds = {run.arm: [other.seed for other in scored if other.arm == run.arm] for run in scored}
    models = [{**_arm_event(run, REPORT), "seeds": seeds[run.arm]} for run in scored if run.seed == params.seeds[0]]
    events.append((MODELS, {"experiment": params.name, "num_seeds": len(params.seeds), "models": models}))
    _leave(params, f"publish-{REPORT}", events)


def _current_runs(jobs: Jobs) -> Iterator[tuple[config.Run, str]]:
    """Every arm and seed with results of today's params, and the last of its stages that has; the report is after all.

    Without those of which it is not known (yet) which values they run with.
    """
    for arm, seed in product(jobs.params.arms, jobs.params.seeds):
        with suppress(UserError):
            run = jobs.run_of(arm, seed)
            current = [stage for stage in ARM_STAGES if not jobs.find(stage, arm, seed).why_outdated()]
            if current:
                yield run, REPORT if current[-1] == ARM_STAGES[-1] else current[-1]


def _arm_event(run: config.Run, through: str) -> dict[str, Any]:
    dump = run.params.model_dump(mode="json", exclude_unset=True)
    return {"arm": arm_key(run)._asdict(), "params": dump, "through": through}


def _trial_event(params: Params, arm: str, trial: str) -> dict[str, Any]:
    return {"trial": TrialKey(params.name, arm, trial)._asdict(), "given": trial_params(params, arm, trial)}


def _leave(params: Params, name: str, events: list[tuple[str, dict[str, Any]]]) -> None:
    """Leave events for the sender."""
    root = paths.project_root()
    spool = Spool(root, name, store_uri())
    spool.append(EXPERIMENT, name=params.name, tags=experiment_tags(params))
    for kind, fields in events:
        spool.append(kind, **fields, cwd=str(Path.cwd()))
    spool.append(END, status="FINISHED")
    spool.close()
    wake_sender(root, spool)


def publish(store: Store, event: dict[str, Any]) -> None:
    """What the sender does for an arm or a trial.

    Results that have changed since are taken as they are: what changed them publishes again.

    Args:
        store: where the run is or shall be.
        event: what `publish_arm` or `publish_report` has written.

    Raises:
        ValueError: params or a file of the results can't be read.
    """
    key, content = _read(event)
    if content.has_results:
        with store.lock():
            _publish(store, key, content, event["time_ms"])


def _read(event: dict[str, Any]) -> tuple[ArmKey | TrialKey, RunContent]:
    base = Path(event["cwd"])
    if "trial" in event:
        trial = TrialKey(**event["trial"])
        return trial, read_trial(trial.arm, trial.trial, event["given"], base)
    arm = ArmKey(**event["arm"])
    return arm, read_arm(resolve(parse_params(event["params"]), arm.arm, arm.seed), event["through"], base)


def _publish(store: Store, key: ArmKey | TrialKey, content: RunContent, time_ms: int) -> None:
    run = store.client.get_run(store.run_of(key, time_ms))
    known = _known_points(store, run, content)
    if _contradicts(run, content, known):
        run, known = store.client.get_run(store.replace_run(key, run.info.run_id)), {}
    _add_params_and_tags(store, run, content)
    if content.dataset is not None:
        add_dataset(store, run, content.dataset)
    _add_points(store, run, content, known, time_ms)
    _add_images(store, run, content)
    if content.status not in (None, run.info.status):
        store.end_run(run, content.status, time_ms)


def _known_points(store: Store, run: Run, content: RunContent) -> Points:
    """What the run carries of the metrics that results/ speaks of."""
    keys = {key for key, _ in content.points} & set(run.data.metrics)
    histories = {key: store.client.get_metric_history(run.info.run_id, key) for key in sorted(keys)}
    return {(key, point.step): point.value for key, history in histories.items() for point in history}


def _contradicts(run: Run, content: RunContent, known: Points) -> bool:
    """Whether the run carries what results/ has otherwise, or has no more: nothing of it can be taken back."""
    wrong_points = (not _equal(content.points.get(at), value) for at, value in known.items())
    wrong_params = (run.data.params.get(key, value) != value for key, value in content.params.items())
    own_data = set() if content.dataset is None else {identity(content.dataset)}
    other_data = bool(own_data) and bool(datasets_of(run) - own_data)
    return any(wrong_points) or any(wrong_params) or other_data or bool(content.withdrawn & set(run.data.metrics))


def _equal(wanted: float | None, known: float) -> bool:
    return wanted is not None and math.isclose(wanted, known, rel_tol=1e-9)


def _add_params_and_tags(store: Store, run: Run, content: RunContent) -> None:
    params = {key: value for key, value in content.params.items() if key not in run.data.params}
    tags = {key: value for key, value in content.tags.items() if run.data.tags.get(key) != value}
    store.set_params(run.info.run_id, params)
    store.set_tags(run.info.run_id, tags)


def _add_points(store: Store, run: Run, content: RunContent, known: Points, time_ms: int) -> None:
    """Add the missing points, and the measures that changed: of several at a step mlflow shows the newest."""
    missing = {at: value for at, value in content.points.items() if at not in known}
    points = [Point(key, value, time_ms, step) for (key, step), value in missing.items()]
    measures = [
        Point(key, value, _newer(store, run, key, time_ms), 0)
        for key, value in content.measures.items()
        if key not in run.data.metrics or not _equal(value, run.data.metrics[key])
    ]
    write_points(store, run.info.run_id, points + measures)


def _newer(store: Store, run: Run, key: str, time_ms: int) -> int:
    """This time, but later than those of the metric's points: clocks jump back, and mlflow shows the latest."""
    history = store.client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
    return max([time_ms, *(point.timestamp + 1 for point in history)])


def _add_images(store: Store, run: Run, content: RunContent) -> None:
    if not content.images or run.data.tags.get(IMAGES_TAG) == content.images_sha256:
        return
    for image in content.images:
        store.client.log_artifact(run.info.run_id, str(image), "samples")
    store.client.set_tag(run.info.run_id, IMAGES_TAG, content.images_sha256)
