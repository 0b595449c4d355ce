"""Make the runs of arms and trials in MLflow carry what results/ holds; doing it twice changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm import paths
from maskdm.config import Params, parse_params
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


def publish_arm(params: Params, arm: str, seed: int, through: str = "evaluate") -> None:
    """Make the arm's run carry what is in results/: params, data, curves, scores, timings, provenance, images.

    A result that contradicts what the run carries supersedes the run.

    Args:
        params: as the arm was trained with them; `tracking.enabled` false makes it a no-op.
        arm: its key.
        seed: its seed.
        through: the last stage whose results are up to date; a stage passes its own name.

    Raises:
        ParamsError: there is no such arm.
    """
    if params.tracking.enabled:
        events = [(PUBLISH, _arm_event(params, arm, seed, through))]
        _leave(params, f"publish-{arm}-{seed}", events)


def publish_report(params: Params, of_arms: Mapping[str, Params]) -> None:
    """Make MLflow carry all of results/: every arm with its verdict, every trial, and the final models.

    A cached stage logs nothing, so the report publishes everything: after a clone it fills an empty MLflow.

    Args:
        params: the experiment; `tracking.enabled` false makes it a no-op.
        of_arms: of each arm that has run, the params that it was trained with: the experiment's with the chosen values.
    """
    if not params.tracking.enabled:
        return
    runs = [(arm, seed) for arm in of_arms for seed in params.seeds]
    trials = [(arm, trial) for arm in params.arms for trial in params.tuning.trials if params.tuning.enabled]
    events = [(PUBLISH, _arm_event(of_arms[arm], arm, seed, REPORT)) for arm, seed in runs]
    events += [(PUBLISH, _trial_event(params, arm, trial)) for arm, trial in trials]
    models = [_arm_event(of_arms[arm], arm, params.seeds[0], REPORT) for arm in of_arms]
    events.append((MODELS, {"experiment": params.name, "seeds": params.seeds, "models": models}))
    _leave(params, f"publish-{REPORT}", events)


def _arm_event(params: Params, arm: str, seed: int, through: str) -> dict[str, Any]:
    dump = params.model_dump(mode="json", exclude_unset=True)
    return {"arm": arm_key(params, arm, seed)._asdict(), "params": dump, "through": through}


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
    return arm, read_arm(parse_params(event["params"]), arm.arm, arm.seed, event["through"], base)


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
