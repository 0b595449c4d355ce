"""The final models in MLflow's registry: one version for every arm, and the best one's alias."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from maskdm.base.tensors import save_tensors
from maskdm.config import Params, load_params, paths
from maskdm.config.jobs import Jobs
from maskdm.tracking.logged_model import save_model
from maskdm.tracking.publishing import track
from maskdm.tracking.store import Store, store_uri
from tests.conftest import Experiment
from tests.factories import tiny_model
from tests.tracking.tracked import (
    ARM,
    CONTENT,
    PARAMS,
    SEED,
    arm_run,
    params_with,
    publish,
    snapshot,
    write_metrics,
    write_record,
    write_results,
)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
ONE_SEED = params_with(seeds=[0])


def write_weights(arm: str = ARM, params: Params = ONE_SEED, seed: int = 0) -> None:
    """What `finetune` leaves at the last milestone, from a network drawn from `seed`."""
    folder = paths.finetune(arm, SEED)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "milestone-1.000.safetensors", params, seed)


def save_checkpoint(file: Path, params: Params = ONE_SEED, seed: int = 0) -> None:
    """Raw and averaged weights, as stages write them."""
    states = {which: dict(tiny_model(params, seed).state_dict()) for which in ("raw", "ema")}
    save_tensors(file, states, {"architecture": params.architecture(10)})


def versions(store: Store) -> dict[int, str]:
    """The versions' arms."""
    found = store.client.search_model_versions(f"name = '{PARAMS.name}'")
    return {int(version.version): version.tags["arm"] for version in found}


def aliases(store: Store) -> dict[str, int]:
    """Alias → version."""
    found = store.client.get_registered_model(PARAMS.name).aliases
    return {alias: int(version) for alias, version in found.items()}


def test_every_arm_has_a_version_and_the_best_its_alias(store: Store) -> None:
    for arm, fid in (("scratch", 20.0), (ARM, 18.0)):
        write_results(arm, fid=fid)
        write_weights(arm)
    publish(ONE_SEED)
    assert versions(store) == {1: "scratch", 2: ARM}
    assert aliases(store) == {"scratch": 1, ARM: 2, "best": 2}
    found, run = store.client.get_model_version(PARAMS.name, "2"), arm_run(store)
    assert found.tags.items() >= {"seed": "0", "fid": "18", "mean_fid": "18"}.items()
    assert found.run_id == run.info.run_id
    assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [found.source]

    before = snapshot(store)
    publish(ONE_SEED)
    assert (versions(store), snapshot(store)) == ({1: "scratch", 2: ARM}, before)
    assert len(store.client.search_logged_models([store.experiment_id])) == 2


def test_other_weights_are_a_new_version_and_move_the_aliases(store: Store) -> None:
    for work, (seed, fid) in enumerate([(0, 20.0), (1, 17.0), (0, 16.0)]):
        write_results(fid=fid, work=str(work))
        write_weights(seed=seed)
        publish(ONE_SEED)
        assert aliases(store) == {ARM: 1 + seed, "best": 1 + seed}
    assert versions(store) == {1: ARM, 2: ARM}
    assert store.client.get_model_version(PARAMS.name, "1").tags["fid"] == "16"


def test_the_best_arm_is_the_best_over_all_seeds(store: Store) -> None:
    for arm, of_seeds in {"scratch": (20.0, 20.0), ARM: (18.0, 24.0)}.items():
        write_weights(arm)
        for seed, fid in enumerate(of_seeds):
            write_results(arm, seed, fid)
    publish(PARAMS)
    assert aliases(store)["best"] == aliases(store)["scratch"]
    assert store.client.get_model_version_by_alias(PARAMS.name, ARM).tags["mean_fid"] == "21"

    (paths.finetune("scratch", 1) / "curve.csv").unlink()  # an arm with a seed missing is not compared
    track(Jobs(PARAMS))
    assert aliases(store)["best"] == aliases(store)[ARM]


def test_the_best_arm_of_points_has_the_smallest_distance(store: Store) -> None:
    for arm, fid, sliced in (("scratch", 18.0, 0.4), (ARM, 20.0, 0.2)):
        write_results(arm)
        write_metrics(arm, fid=fid, sliced=sliced)
        write_weights(arm)
    publish(ONE_SEED)
    assert aliases(store)["best"] == aliases(store)[ARM]
    key = "distance_sliced_wasserstein"
    tags = store.client.get_model_version_by_alias(PARAMS.name, ARM).tags
    assert tags.items() >= {key: "0.2", f"mean_{key}": "0.2"}.items()


def test_an_arm_that_was_removed_loses_its_alias_and_a_reserved_name_gets_none(store: Store) -> None:
    arms = {"latest": {"strategy": "none"}, "v1": {"strategy": "none"}, ARM: CONTENT["arms"][ARM]}
    for arm in arms:
        write_results(arm, fid=20.0 if arm == "latest" else 25.0)
        write_weights(arm)
    publish(params_with(seeds=[0], arms=arms))
    assert aliases(store) == {ARM: 3, "best": 1}
    store.client.set_registered_model_alias(PARAMS.name, "champion", "2")
    publish(params_with(seeds=[0], arms={"latest": arms["latest"]}))
    assert aliases(store) == {"best": 1, "champion": 2}, "an alias that somebody else has set stays"


@pytest.mark.parametrize("method", ["log_model_artifacts", "create_model_version"])
def test_a_model_that_a_killed_process_left_half_is_not_used(
    store: Store, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    write_results()
    write_weights()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(f"mlflow.MlflowClient.{method}", killed)
        publish(ONE_SEED)
    publish(ONE_SEED)
    (logged,) = store.client.search_logged_models([store.experiment_id])
    assert store.client.get_model_version(PARAMS.name, "1").source == f"models:/{logged.model_id}"
    assert versions(store) == {1: ARM}


def test_a_changed_record_makes_no_new_model(store: Store) -> None:
    write_results()
    write_weights()
    publish(ONE_SEED)
    write_record("finetune", work="2")
    publish(ONE_SEED)
    assert versions(store) == {1: ARM}


@pytest.mark.workflow
def test_the_best_model_draws_what_the_stage_sample_drew(finished: Experiment, store: Store, project: Path) -> None:
    assert project == finished.folder  # both are in tmp_path
    finished.rewrite({**finished.content, "tracking": {"enabled": True}})
    track(Jobs(load_params()))
    code = """
        import hashlib, sys, mlflow, pandas as pd
        mlflow.set_tracking_uri(sys.argv[1])
        model = mlflow.pyfunc.load_model("models:/tiny@best")
        rows = pd.DataFrame({"seed": [0, 5], "num_images": [64, 3]})
        images = model.predict(rows)
        print(images.shape, images.dtype, hashlib.sha256(images[:64].tobytes()).hexdigest())
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), store_uri()],
        capture_output=True,
        text=True,
        check=False,
        cwd=project.parent,
    )
    arm = store.client.get_model_version_by_alias("tiny", "best").tags["arm"]
    drawn = np.load(paths.samples(arm, 0) / "milestone-1.000.npy")
    expected = f"(67, 8, 8, 1) uint8 {hashlib.sha256(drawn.tobytes()).hexdigest()}\n"
    assert done.stdout == expected, done.stderr


def test_a_model_holds_no_pickle_and_only_the_averaged_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_checkpoint(file)
    (tmp_path / "made").mkdir()
    folder = save_model(tmp_path / "made", ONE_SEED, file)
    plain = {".py", ".safetensors", ".json", ".md", ".yaml", ".txt", ""}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= plain
    with safe_open(folder / "artifacts" / "weights.safetensors", framework="np") as held:
        assert {key.split("/")[0] for key in held.keys()} == {"ema"}  # noqa: SIM118  (no mapping)
