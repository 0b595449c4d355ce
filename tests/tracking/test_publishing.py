"""What MLflow says of results/: every arm, stage and trial once, with what its files say."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskdm.base import publishing
from maskdm.base.errors import UserError
from maskdm.config import paths, resolve
from maskdm.config.jobs import Jobs
from maskdm.tracking.content import trial_params
from maskdm.tracking.publishing import track
from maskdm.tracking.store import PARENT, Store, shown, store_uri
from tests.factories import protocol
from tests.tracking.tracked import (
    ARM,
    CONTENT,
    PARAMS,
    ROOT,
    all_runs,
    arm_run,
    history,
    params_with,
    publish,
    run_python,
    run_track,
    runs_of,
    snapshot,
    stamp,
    write_data,
    write_metrics,
    write_record,
    write_results,
    write_verdicts,
)

# SQLAlchemy's pool closes its connections only when the process ends; Python 3.13 notices.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
ONE_SEED = params_with(seeds=[0])
TRIALS = {"given": {}, "low": {"pretrain.lr": 1e-3, "finetune.batch_size": 64}}
TUNED = params_with(tuning={**CONTENT["tuning"], "trials": TRIALS})


def write_trial(trial: str = "low", arm: str = ARM, kid: float | None = 0.02, **changes: Any) -> None:
    """What `tune` leaves of a trial; no KID stands for one that has failed."""
    scores = {"fid": 30.0, "kid": kid, "kid_std": 0.001, "precision": 0.5, "recall": 0.5, "num_samples": 400}
    result = {"arm": arm, "trial": trial, "values": TRIALS[trial], "seed": 1000, "budget_fraction": 0.3}
    known = {**dict.fromkeys(scores), "failed": "the loss is not finite"} if kid is None else {**scores, "failed": None}
    publishing.publish_description(paths.trial(arm, trial), {**result, **known, **changes})
    record = {"id": f"tune-{arm}-{trial}", "started": "2026-11-30T12:00:00+00:00", "wall_seconds": 12.0}
    facts = {"device_seconds": 9.0, "timings": [{"step": 1}]}
    publishing.publish_description(
        paths.record("tune", arm, trial=trial), {**record, "finetune": facts, "versions": {"torch": "2.7"}}
    )


def test_an_arm_carries_its_curves_scores_times_and_provenance(store: Store) -> None:
    write_results()
    publish(ONE_SEED)
    run = arm_run(store)
    assert (run.info.run_name, run.info.status) == (f"{ARM}-seed-0", "FINISHED")
    given = {"strategy": "patch", "mask_rate": "0.5", "num_visible": "8", "model.dim": "64", "pretrain.lr": "0.002"}
    assert run.data.params.items() >= {**given, "extractor": "classifier", "num_samples": "1000"}.items()
    assert history(store, run, "pretrain/loss") == [(100 * i, pytest.approx(1 / i, abs=1e-6)) for i in range(1, 31)]
    assert history(store, run, "finetune/images_per_second") == [(100 * i, 6400.0) for i in range(2, 31)]
    assert history(store, run, "fid") == [(50, 25.0), (100, 20.0)]
    assert history(store, run, "flops") == [(50, 5e11), (100, 1e12)]
    metrics = run.data.metrics
    assert metrics.items() >= {"fid_floor": 1.5, "kid_untrained": 0.5, "peak_memory_gib": 0.25}.items()
    assert metrics.items() >= {"pretrain_seconds": 10, "finetune_seconds": 20, "device_seconds": 30}.items()
    assert metrics["data_wait_share"] == pytest.approx(0.25)
    assert run.data.tags.items() >= {"git_commit": "c0ffee", "version.torch": "2.7", "device": "cpu"}.items()
    assert [file.path for file in store.client.list_artifacts(run.info.run_id, "samples")] == ["samples/grid-1.000.png"]


def test_the_stages_of_an_arm_are_its_children(store: Store) -> None:
    write_results()
    write_record("prepare", None, None, num_images=20)
    publish(ONE_SEED)
    arm = arm_run(store)
    stages = {run.info.run_name: run for run in runs_of(store, kind="stage", arm=ARM)}
    assert set(stages) == {"pretrain", "finetune", "sample", "evaluate"}
    assert {run.data.tags[PARENT] for run in stages.values()} == {arm.info.run_id}
    finetune = stages["finetune"]
    assert history(store, finetune, "loss")[-1] == (3000, pytest.approx(1 / 30, abs=1e-6))
    assert finetune.data.params["finetune.lr"] == "0.002" and finetune.data.metrics["wall_seconds"] == 20.0
    assert finetune.info.end_time - finetune.info.start_time == 20_000
    assert history(store, stages["evaluate"], "fid") == [(50, 25.0), (100, 20.0)]
    (prepare,) = runs_of(store, kind="stage", stage="prepare")
    assert prepare.data.metrics["num_images"] == 20 and PARENT not in prepare.data.tags


def test_a_record_never_adds_a_point_to_a_curve(store: Store) -> None:
    write_results()
    write_record("finetune", flops=7.0, loss=3.0)
    publish(ONE_SEED)
    (run,) = runs_of(store, kind="stage", stage="finetune")
    assert min(step for step, _ in history(store, run, "flops")) == 100


def test_publishing_twice_changes_nothing(store: Store) -> None:
    for arm in PARAMS.arms:
        write_results(arm)
    write_verdicts(scratch=1.0, patch_m50=0.61)
    first = publish(ONE_SEED)
    assert first.written == first.runs == 11  # two arms with four stages each, and the report
    before = snapshot(store)
    assert track(Jobs(ONE_SEED)).written == 0
    assert snapshot(store) == before


def test_a_clone_finds_the_runs_of_the_original(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_results()
    publish(ONE_SEED)
    before = snapshot(store)
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree("results", clone / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store.uri)
        patch.chdir(clone)
        assert track(Jobs(ONE_SEED)).written == 0
    assert snapshot(store) == before


def test_an_empty_store_is_filled(project: Path) -> None:
    write_results()
    published = publish(ONE_SEED)
    assert published.written == published.runs == 5
    assert arm_run(Store(PARAMS.name)).data.metrics["fid"] == 20.0


def test_an_arm_with_other_values_is_another_run_and_the_old_one_stays(store: Store) -> None:
    write_results()
    publish(ONE_SEED)
    old = arm_run(store)
    other = params_with(seeds=[0], finetune={"lr": 1e-3, "batch_size": 128})
    write_results(work="2")
    publish(other)
    new = arm_run(store)
    assert new.data.params["finetune.lr"] == "0.001" and new.info.run_id != old.info.run_id
    old = store.client.get_run(old.info.run_id)
    assert old.data.tags["maskdm.superseded"] == "true" and old.info.lifecycle_stage == "active"
    assert len(runs_of(store, kind="stage", stage="finetune")) == 1

    write_results(work="1")  # back to the values of before: the runner brings the old output back with its record
    publish(ONE_SEED)
    assert arm_run(store).info.run_id == old.info.run_id
    assert store.client.get_run(new.info.run_id).data.tags["maskdm.superseded"] == "true"


def test_a_stage_done_again_with_the_same_values_is_another_run(store: Store) -> None:
    write_results()
    publish(ONE_SEED)
    old = arm_run(store)
    write_record("evaluate", work="2")
    write_metrics(fid=19.0)
    publish(ONE_SEED)
    assert history(store, arm_run(store), "fid") == [(50, 24.0), (100, 19.0)]
    assert arm_run(store).info.run_id != old.info.run_id


def test_stages_that_follow_belong_to_the_same_arm_run(store: Store) -> None:
    write_results()
    for stage in ("sample", "evaluate"):
        paths.record(stage, ARM, 0).unlink()
    stamp(ONE_SEED)
    for stage in ("sample", "evaluate"):
        paths.record(stage, ARM, 0).unlink()
    track(Jobs(ONE_SEED))
    first = arm_run(store)
    assert first.info.status == "SCHEDULED" and "fid" not in first.data.metrics
    for stage in ("sample", "evaluate"):
        write_record(stage)
    publish(ONE_SEED)
    assert arm_run(store).info.run_id == first.info.run_id
    assert arm_run(store).data.metrics["fid"] == 20.0 and arm_run(store).info.status == "FINISHED"


def test_what_is_out_of_date_is_left_out(store: Store) -> None:
    write_results()
    publish(params_with(seeds=[0], finetune={"lr": 5e-3, "batch_size": 128}), made_with=ONE_SEED)
    (stage,) = runs_of(store, kind="stage", arm=ARM)
    assert stage.info.run_name == "pretrain" and "fid" not in arm_run(store).data.metrics


def test_an_arm_carries_what_the_report_says_of_it_until_it_says_so_no_longer(store: Store) -> None:
    for arm in PARAMS.arms:
        write_results(arm)
    write_verdicts(scratch=1.0, patch_m50=0.61)
    publish(ONE_SEED)
    said = {"compute_ratio": 0.61, "flops_at_equal_fid": 0.61e12, "delta_fid": -1.5}
    assert arm_run(store).data.metrics.items() >= said.items()
    assert arm_run(store).data.tags["verdict"] == "as told"
    assert "delta_distance_sliced_wasserstein" not in arm_run(store).data.metrics

    write_verdicts(scratch=1.0, patch_m50=None)
    publish(ONE_SEED)
    assert math.isnan(arm_run(store).data.metrics["compute_ratio"]) and arm_run(store).data.metrics["delta_fid"] == 2.5
    assert arm_run(store).data.tags["verdict"] == "no better"
    assert track(Jobs(ONE_SEED)).written == 0


def test_runs_say_what_their_scores_are_of(store: Store) -> None:
    write_results()
    write_metrics(protocol=protocol().as_dict(), flip=0.5)
    write_trial("low", protocol=protocol().as_dict())
    write_trial("given", kid=None, protocol=protocol().as_dict())
    publish(params_with(seeds=[0], tuning=TUNED.tuning.model_dump()))
    trials = {run.data.params["trial"]: run for run in runs_of(store, kind="trial", arm=ARM)}
    assert trials["low"].data.tags["protocol"] == protocol().text
    assert "protocol" not in trials["given"].data.tags, "it failed, and has no scores"

    write_metrics(protocol={**protocol().as_dict(), "images": "x"})
    write_record("evaluate", work="2")
    publish(ONE_SEED)
    assert "protocol" not in arm_run(store).data.tags and arm_run(store).data.metrics["fid"] == 20.0


def test_an_arm_of_points_carries_their_distances(store: Store) -> None:
    write_results()
    write_metrics(sliced=0.4)
    publish(ONE_SEED)
    run = arm_run(store)
    assert history(store, run, "distance_sliced_wasserstein") == [(50, 0.5), (100, 0.4)]
    assert run.data.metrics["distance_marginal_0"] == 0.02


def test_trials_carry_what_they_ran_with_and_their_scores(store: Store) -> None:
    for arm in TUNED.arms:
        write_trial("given", arm)
        write_trial("low", arm, kid=None)
    publish(TUNED)
    trials = {run.data.params["trial"]: run for run in runs_of(store, kind="trial", arm=ARM)}
    low, given = trials["low"], trials["given"]
    assert (low.info.run_name, given.info.run_name) == (f"{ARM}-low", f"{ARM}-given")
    tried = {"pretrain.lr": "0.001", "finetune.batch_size": "64", "budget_fraction": "0.3"}
    assert low.data.params.items() >= {"arm": ARM, "trial": "low", **tried}.items()
    assert history(store, given, "kid") == [(100, 0.02)] and given.data.metrics["wall_seconds"] == 12.0
    assert (given.info.status, low.info.status) == ("FINISHED", "FAILED")
    assert low.data.tags["failed"] == "the loss is not finite"
    assert PARENT not in low.data.tags
    assert "pretrain.lr" not in trial_params(TUNED, "scratch", "low"), "scratch does not pretrain"


@pytest.mark.parametrize(("failure", "status"), [("the loss is not finite", "FAILED"), (None, "KILLED")])
def test_a_stage_that_failed_or_was_killed_is_shown(store: Store, failure: str | None, status: str) -> None:
    write_results()
    stamp(ONE_SEED)
    job = Jobs(ONE_SEED).find("evaluate", ARM, 0)
    work = paths.work(job.output) / job.wanted().key
    publishing.publish_json(work / "begun.json", {"id": "w", "starts": 1, "time": "2026-11-30T12:00:00+00:00"})
    if failure is not None:
        publishing.publish_json(work / "failed.json", {"reason": failure, "time": "2026-11-30T12:00:09+00:00"})
    job.output.unlink()
    track(Jobs(ONE_SEED))
    (run,) = runs_of(store, kind="stage", stage="evaluate")
    assert (run.info.status, run.data.tags.get("failed")) == (status, failure)
    assert arm_run(store).info.status == status

    write_metrics()
    write_record("evaluate", id="w")  # the same command again: the work has one id
    publish(ONE_SEED)
    (again,) = runs_of(store, kind="stage", stage="evaluate")
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert "failed" not in again.data.tags
    assert arm_run(store).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("root", "source"),
    [(None, ("code", {"tags": {"mlflow.source.name": "digits"}})), ("/data/x", ("local", {"uri": "/data/x"}))],
)
def test_arms_and_training_stages_name_the_data(store: Store, root: str | None, source: tuple[str, Any]) -> None:
    write_data(root=root)
    write_results()
    publish(ONE_SEED)
    runs = {run.info.run_name: run for run in all_runs(store)}
    for name in (f"{ARM}-seed-0", "pretrain", "finetune"):
        (entry,) = runs[name].inputs.dataset_inputs
        assert (entry.dataset.source_type, json.loads(entry.dataset.source)) == source
        assert json.loads(entry.dataset.profile) == {"num_rows": 20, "num_classes": 2, "num_skipped": 0}
    assert not runs["evaluate"].inputs.dataset_inputs


def test_a_damaged_record_costs_only_its_run(store: Store) -> None:
    write_results()
    stamp(ONE_SEED)
    paths.record("sample", ARM, 0).write_text("{")
    track(Jobs(ONE_SEED))
    assert {run.info.run_name for run in runs_of(store, kind="stage", arm=ARM)} == {"pretrain", "finetune", "evaluate"}


def test_a_publication_that_takes_too_long_ends(store: Store) -> None:
    write_results()
    stamp(ONE_SEED)
    with pytest.raises(UserError, match=r"only 0 of 5 runs are in MLflow after -?0 s"):
        track(Jobs(ONE_SEED), seconds=-1e-9)
    assert track(Jobs(ONE_SEED)).runs == 5


def test_a_damaged_curve_costs_only_its_arm(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    write_results()
    write_results("scratch")
    stamp(ONE_SEED)
    file = paths.finetune("scratch", 0) / "curve.csv"
    file.write_text(file.read_text().replace("100,1.000000", "1x0,1.000000"))  # of the same size
    assert track(Jobs(ONE_SEED)).runs == 5
    assert "left out scratch with seed 0, its files can't be read" in capsys.readouterr().err
    assert arm_run(store).data.metrics["fid"] == 20.0


def test_nothing_to_publish_makes_no_run(store: Store) -> None:
    assert track(Jobs(PARAMS)).runs == 0
    assert not all_runs(store)


def test_a_run_that_the_user_deletes_is_made_again(store: Store) -> None:
    write_results()
    publish(ONE_SEED)
    store.client.delete_run(arm_run(store).info.run_id)
    publish(ONE_SEED)
    assert arm_run(store).data.metrics["fid"] == 20.0


def test_a_deleted_experiment_comes_back(store: Store) -> None:
    write_results()
    publish(ONE_SEED)
    store.client.delete_experiment(store.experiment_id)
    assert publish(ONE_SEED).runs == 5
    assert arm_run(store).data.metrics["fid"] == 20.0


def test_a_run_that_mlflow_refuses_does_not_hold_up_the_others(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results("scratch")
    write_results()
    stamp(ONE_SEED)
    metrics = json.loads(paths.metrics("scratch", 0).read_text())
    monkeypatch.setattr(
        "maskdm.tracking.content.arm_params",
        lambda run: {"arm": run.arm, **({"not a name: %": "1"} if run.arm == "scratch" else {})},
    )
    assert metrics and track(Jobs(ONE_SEED)).runs > 5
    assert "left out scratch-seed-0" in capsys.readouterr().err
    assert not [run for run in runs_of(store, kind="stage", arm="scratch") if PARENT in run.data.tags]
    assert arm_run(store).data.metrics["fid"] == 20.0


class Interrupting:
    """`Store.log_points`, until so many calls were made: the process is interrupted after the last one."""

    def __init__(self, calls: int) -> None:
        self._left, self._log_points = calls, Store.log_points

    def __call__(self, *arguments: Any) -> None:
        self._log_points(*arguments)
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_publication_is_completed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results()
    stamp(ONE_SEED)
    for _ in range(4):
        interrupting = Interrupting(2)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Store, "log_points", lambda *arguments, log=interrupting: log(*arguments))
            track(Jobs(ONE_SEED))
    track(Jobs(ONE_SEED))
    assert history(store, arm_run(store), "fid") == [(50, 25.0), (100, 20.0)]
    assert len(history(store, arm_run(store), "finetune/loss")) == 30
    assert len(all_runs(store)) == 5


def test_a_dvc_experiment_has_runs_of_its_own_and_supersedes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results()
    publish(ONE_SEED)
    monkeypatch.setenv("DVC_EXP_NAME", "puny-name")
    write_results(work="2")
    publish(params_with(seeds=[0], finetune={"lr": 1e-3, "batch_size": 128}))
    runs = {run.info.run_name: run for run in runs_of(store, kind="arm", arm=ARM)}
    assert set(runs) == {f"{ARM}-seed-0", f"{ARM}-seed-0 (puny-name)"}
    assert runs[f"{ARM}-seed-0 (puny-name)"].data.tags["maskdm.exp"] == "puny-name"


def test_the_store_of_a_temporary_experiment_is_that_of_its_project(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path_factory.mktemp("exp")
    (copy / ".dvc").mkdir()
    monkeypatch.chdir(copy)
    assert store_uri() == f"sqlite:///{copy}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert store_uri() == f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", "/nowhere")
    assert store_uri() == f"sqlite:///{copy}/mlflow.db"


def test_a_password_in_the_uri_is_not_printed() -> None:
    assert shown("https://me:secret@host:80/path") == "https://host:80/path"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_seed_and_an_arm_have_a_fingerprint_of_their_own() -> None:
    prints = {resolve(PARAMS, arm, seed).fingerprint() for arm in PARAMS.arms for seed in PARAMS.seeds}
    assert len(prints) == 4
    threads = params_with(compute={"device": "cpu", "precision": "fp32", "threads": 3})
    assert resolve(threads, ARM, 0).fingerprint() == resolve(PARAMS, ARM, 0).fingerprint()


@pytest.mark.workflow
def test_processes_on_a_fresh_database_lose_and_duplicate_nothing(project: Path) -> None:
    write_results()
    stamp(ONE_SEED)
    (project / "params.yaml").write_text(json.dumps({**CONTENT, "seeds": [0]}))
    code = 'from maskdm.cli import main\nsys.exit(main(["track"]))'
    processes = [run_python(code) for _ in range(3)]
    outcomes = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outcomes
    store = Store(PARAMS.name)
    assert sorted(run.info.run_name for run in all_runs(store)) == sorted(
        [f"{ARM}-seed-0", "pretrain", "finetune", "sample", "evaluate"]
    )
    assert history(store, arm_run(store), "fid") == [(50, 25.0), (100, 20.0)]
    assert len(history(store, arm_run(store), "finetune/loss")) == 30


@pytest.mark.workflow
@pytest.mark.parametrize(("name", "is_relative"), [("a b ö#1%20", True), ("what?", False)])
def test_a_folder_of_any_name_has_its_database_and_models(
    project: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path, name: str, is_relative: bool
) -> None:
    from tests.tracking.test_registry import write_weights

    folder = project / name
    (folder / ".dvc").mkdir(parents=True)
    shutil.copy("params.yaml", folder)
    monkeypatch.chdir(folder)
    shutil.copy(empty_database, folder / ("own.db" if is_relative else "mlflow.db"))
    if is_relative:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    write_results()
    write_results(seed=1)
    write_weights()
    stamp(PARAMS)
    code, out, err = run_track()
    assert code == 0, err
    assert "10 runs of experiment 'tracking-test'; 10 of them were written now" in out
    store = Store(PARAMS.name)
    (version,) = store.client.search_model_versions(f"name = '{PARAMS.name}'")
    assert version.tags["arm"] == ARM
    assert Path.cwd() == folder and not list(project.glob("*.db"))
    wanted = {".dvc", ".work", "mlartifacts", "params.yaml", "results", "own.db" if is_relative else "mlflow.db"}
    assert {file.name for file in folder.iterdir()} == wanted, "no stray database or folder"


@pytest.mark.workflow
def test_a_stage_that_is_not_tracked_imports_nothing_of_it(project: Path) -> None:
    content = yaml.safe_load((ROOT / "experiments" / "tiny" / "params.yaml").read_text(encoding="utf-8"))
    content["tracking"] = {"enabled": False}
    (project / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    code = """
        from maskdm.cli import main
        code = main(["prepare"])
        print(code, [name for name in sys.modules if name.split(".")[0] == "mlflow" or "tracking" in name])
    """
    out, err = run_python(code).communicate(timeout=60)
    assert out.endswith("0 []\n"), err


@pytest.mark.workflow
def test_no_stage_shorter_than_a_minute_imports_mlflow(project: Path) -> None:
    shutil.copy(ROOT / "experiments" / "tiny" / "params.yaml", project)
    code = "from maskdm.cli import main; import sys; main(['prepare']); sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=project)
    assert not (project / "mlflow.db").exists()
