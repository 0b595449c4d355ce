"""Make an arm's run in MLflow carry what results/ holds; doing it twice changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskdm import paths
from maskdm.config import Params, parse_params
from maskdm.tracking.arm_content import ArmContent, read_arm
from maskdm.tracking.background import wake_sender
from maskdm.tracking.spool import END, PUBLISH, Spool
from maskdm.tracking.store import ArmKey, Point, Store, arm_key, store_uri, write_points

if TYPE_CHECKING:
    from mlflow.entities import Run

ENTRIES_PER_BATCH = 100  # mlflow's limit for params and for tags
IMAGES_TAG = "maskdm.samples_sha256"
Points = dict[tuple[str, int], float]


def publish_arm(params: Params, arm: str, seed: int, through: str = "evaluate") -> None:
    """Make the arm's run carry what is in results/: params, curves, scores, timings, provenance, images.

    A cached stage logs nothing, so the report publishes every arm: a fresh clone fills an empty MLflow.
    A result that contradicts what the run carries supersedes the run.

    Args:
        params: `tracking.enabled` false makes it a no-op.
        arm: its key.
        seed: its seed.
        through: the last stage whose results are up to date; a stage passes its own name.

    Raises:
        ParamsError: there is no such arm.
    """
    if not params.tracking.enabled:
        return
    key, root = arm_key(params, arm, seed), paths.project_root()
    spool = Spool(root, f"publish-{arm}-{seed}", store_uri())
    dump = params.model_dump(mode="json", exclude_unset=True)
    spool.append(PUBLISH, params=dump, arm=key._asdict(), through=through, cwd=str(Path.cwd()))
    spool.append(END, status="FINISHED")
    spool.close()
    wake_sender(root, spool)


def publish(store: Store, event: dict[str, Any]) -> None:
    """What the sender does for `publish_arm`.

    Results that have changed since are taken as they are: what changed them publishes again.

    Args:
        store: where the arm run is or shall be.
        event: what `publish_arm` has written.

    Raises:
        ValueError: params or a file of the results can't be read.
    """
    params, key = parse_params(event["params"]), ArmKey(**event["arm"])
    content = read_arm(params, key.arm, key.seed, event["through"], Path(event["cwd"]))
    if content.has_results:
        with store.lock():
            _publish(store, key, content, event["time_ms"])


def _publish(store: Store, key: ArmKey, content: ArmContent, time_ms: int) -> None:
    run = store.client.get_run(store.arm_run(key, time_ms))
    known = _known_points(store, run, content)
    if _contradicts(run, content, known):
        run, known = store.client.get_run(store.replace_arm_run(key, run.info.run_id)), {}
    _add_params_and_tags(store, run, content)
    _add_points(store, run, content, known, time_ms)
    _add_images(store, run, content)
    if content.is_complete and run.info.status != "FINISHED":
        store.end_run(run, "FINISHED", time_ms)


def _known_points(store: Store, run: Run, content: ArmContent) -> Points:
    """What the run carries of the metrics that results/ speaks of."""
    keys = {key for key, _ in content.points} & set(run.data.metrics)
    histories = {key: store.client.get_metric_history(run.info.run_id, key) for key in sorted(keys)}
    return {(key, point.step): point.value for key, history in histories.items() for point in history}


def _contradicts(run: Run, content: ArmContent, known: Points) -> bool:
    """Whether the run carries a point or a param that results/ has otherwise, or has no more."""
    wrong_points = (not _equal(content.points.get(at), value) for at, value in known.items())
    wrong_params = (run.data.params.get(key, value) != value for key, value in content.params.items())
    return any(wrong_points) or any(wrong_params)


def _equal(wanted: float | None, known: float) -> bool:
    return wanted is not None and math.isclose(wanted, known, rel_tol=1e-9)


def _add_params_and_tags(store: Store, run: Run, content: ArmContent) -> None:
    from mlflow.entities import Param, RunTag

    params = [Param(key, value) for key, value in content.params.items() if key not in run.data.params]
    tags = [RunTag(key, value) for key, value in content.tags.items() if run.data.tags.get(key) != value]
    for start in range(0, max(len(params), len(tags)), ENTRIES_PER_BATCH):
        chunk = slice(start, start + ENTRIES_PER_BATCH)
        store.client.log_batch(run.info.run_id, params=params[chunk], tags=tags[chunk])


def _add_points(store: Store, run: Run, content: ArmContent, known: Points, time_ms: int) -> None:
    """Add the missing points, and the measures that changed: of several at a step mlflow shows the newest."""
    missing = {at: value for at, value in content.points.items() if at not in known}
    points = [Point(key, value, time_ms, step) for (key, step), value in missing.items()]
    measures = [
        Point(key, value, time_ms, 0)
        for key, value in content.measures.items()
        if key not in run.data.metrics or not _equal(value, run.data.metrics[key])
    ]
    write_points(store, run.info.run_id, points + measures)


def _add_images(store: Store, run: Run, content: ArmContent) -> None:
    if not content.images or run.data.tags.get(IMAGES_TAG) == content.images_sha256:
        return
    for image in content.images:
        store.client.log_artifact(run.info.run_id, str(image), "samples")
    store.client.set_tag(run.info.run_id, IMAGES_TAG, content.images_sha256)
