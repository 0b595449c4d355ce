"""MLflow: nothing lost, nothing twice, nothing that takes a stage down."""

from __future__ import annotations

import shutil
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from maskdm import cli, tracking
from maskdm.base import publishing
from maskdm.base.errors import UserError
from maskdm.config import Params, parse_params, paths, resolve
from maskdm.tracking import background, sender, ui
from maskdm.tracking.sender import Sender
from maskdm.tracking.spool import EVENTS, Spool, SpoolReader, spools, tracking_folder
from maskdm.tracking.store import Store, arm_key, open_store, shown
from tests.tracking.tracked import (
    ARM,
    CONTENT,
    IMAGES,
    PARAMS,
    RUN,
    SEED,
    all_runs,
    arm_runs,
    free_port,
    history,
    log_run,
    params_with,
    publish,
    run_python,
    send,
    sender_pid,
    snapshot,
    stop_sender,
    wait_until,
    write_results,
)

pytest_plugins = ["tests.tracking.tracked_project"]
# SQLAlchemy's pool closes its connections only when the process ends; Python 3.13 notices.
START_SENDER = background.start_sender
pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")


@pytest.mark.workflow
def test_processes_on_a_fresh_database_lose_and_duplicate_nothing(senders: Path) -> None:
    code = """
        from maskdm.tracking import stage_run
        seed = int(sys.argv[2])
        with stage_run(params, sys.argv[3], resolve(params, "scratch", seed)) as run:
            for step in range(200):
                run.log(step, loss=1.0 / (step + 1))
    """
    stages = ["finetune", "sample", "evaluate", "pretrain"]
    processes = [run_python(code, str(seed), stage) for seed in (0, 1) for stage in stages]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert tracking.flush(60)
    assert spools(senders) == []

    assert [output for output in outputs if output != ("", "")] == []
    store = open_store(tracking.store_uri(), senders)
    assert sorted(run.info.run_name for run in arm_runs(store, "scratch")) == [
        "scratch-seed-0",
        "scratch-seed-1",
    ]
    children = [run for arm in arm_runs(store, "scratch") for run in store.stages_of(PARAMS.name, arm.info.run_id)]
    assert sorted(run.info.run_name for run in children) == sorted(2 * stages)
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    for run in children:
        assert history(store, run, "loss") == [(step, 1.0 / (step + 1)) for step in range(200)]


def test_an_arm_carries_its_curves_scores_timings_and_provenance(store: Store) -> None:
    write_results(losses=1500)  # more than fits one batch
    publish()

    (run,) = arm_runs(store)
    assert run.info.run_name == "patch-m50-seed-0"
    assert run.info.status == "FINISHED"
    expected = [(100 * i, float(f"{1 / i:.6f}")) for i in range(1, 1501)]
    assert history(store, run, "pretrain/loss") == history(store, run, "finetune/loss") == expected
    assert history(store, run, "fid") == [(50, 25.0), (100, 20.0)]
    assert run.data.metrics.items() >= {"fid": 20.0, "flops": 1e12, "fid_floor": 1.5, "fid_untrained": 300.0}.items()
    assert history(store, run, "flops") == [(50, 5e11), (100, 1e12)]  # the charts' abscissae of fid
    throughput = [(100 * i, IMAGES / 2.0) for i in range(2, 1501)]  # the first row holds the warm-up
    assert history(store, run, "finetune/images_per_second") == throughput
    timings = {
        "pretrain_seconds": 10.0,
        "evaluate_seconds": 40.0,
        "device_seconds": 30.0,
        "data_wait_share": 0.25,
        "peak_memory_gib": 0.25,
    }
    assert run.data.metrics.items() >= timings.items()
    own = {"strategy": "patch", "mask_rate": "0.5", "realised_mask_rate": "0.5", "num_visible": "8"}
    sections = {"model.dim": "64", "pretrain.lr": "0.002", "num_samples": "1000", "extractor": "classifier"}
    assert run.data.params.items() >= (own | sections).items()
    provenance = {"git_commit": "c0ffee", "data_sha256": "ab12", "version.torch": "2.7"}
    tags = {"maskdm.kind": "arm", "maskdm.fingerprint": arm_key(RUN).fingerprint}
    assert run.data.tags.items() >= (provenance | tags).items()
    (image,) = store.client.list_artifacts(run.info.run_id, "samples")
    assert image.path == "samples/grid-1.000.png"


def test_scratch_trains_without_pretraining(store: Store) -> None:
    write_results("scratch")
    publish(arm="scratch")

    (run,) = arm_runs(store, "scratch")
    assert run.data.metrics["device_seconds"] == 10.0
    assert run.data.params.items() >= {"strategy": "none", "mask_rate": "0.0", "pretrain.share": "0.0"}.items()
    assert not {"pretrain/loss", "pretrain_seconds"} & set(run.data.metrics)
    assert not {"pretrain.lr", "block_size"} & set(run.data.params)


def test_publishing_twice_changes_nothing(store: Store) -> None:
    write_results()
    publish()
    before = snapshot(store)
    publish()
    assert snapshot(store) == before


def test_only_missing_points_are_added(store: Store) -> None:
    write_results(losses=10)
    publish()
    (before,) = arm_runs(store)
    write_results(losses=20)
    publish()

    (after,) = arm_runs(store)
    assert after.info.run_id == before.info.run_id
    assert [step for step, _ in history(store, after, "finetune/loss")] == [100 * i for i in range(1, 21)]


def test_another_timing_is_no_contradiction(store: Store) -> None:
    write_results()
    publish()
    (before,) = arm_runs(store)
    for seconds in (7.0, 12.0, 7.0):
        publishing.publish_json(paths.record("evaluate", ARM, SEED), {"wall_seconds": seconds})
        publish()
        (after,) = arm_runs(store)
        assert after.info.run_id == before.info.run_id
        assert after.data.metrics["evaluate_seconds"] == seconds


@pytest.mark.parametrize("changed", [{"fid": 19.0}, {"losses": 20}])
def test_a_contradicting_result_supersedes_the_run_and_keeps_its_stages(store: Store, changed: dict[str, Any]) -> None:
    write_results()
    with tracking.stage_run(PARAMS, "evaluate", RUN):
        publish()
        (before,) = arm_runs(store)
        write_results(**changed)
        publish()
    send()

    (after,) = arm_runs(store)
    assert after.info.run_id != before.info.run_id
    assert after.data.metrics["fid"] == changed.get("fid", 20.0)
    assert len(history(store, after, "pretrain/loss")) == changed.get("losses", 30)
    assert [run.info.run_name for run in store.stages_of(PARAMS.name, after.info.run_id)] == ["evaluate"]
    assert len(all_runs(store)) == 2


def test_other_params_supersede_the_run_and_its_stages(store: Store) -> None:
    log_run("pretrain", ARM, SEED)
    write_results("scratch")
    publish(arm="scratch")
    (scratch,) = arm_runs(store, "scratch")
    changed = params_with(arms={**CONTENT["arms"], ARM: {"strategy": "patch", "mask_rate": 0.75}})
    log_run("pretrain", ARM, SEED, changed)

    (run,) = arm_runs(store)
    assert run.data.tags["maskdm.fingerprint"] == arm_key(resolve(changed, ARM, SEED)).fingerprint
    assert [child.info.run_name for child in store.stages_of(PARAMS.name, run.info.run_id)] == ["pretrain"]
    assert [other.info.run_id for other in arm_runs(store, "scratch")] == [scratch.info.run_id]
    assert len(all_runs(store)) == 3


def test_the_fingerprint_is_of_what_the_arm_does() -> None:
    def fingerprint(params: Params = PARAMS, arm: str = ARM, seed: int = SEED) -> str:
        return arm_key(resolve(params, arm, seed)).fingerprint

    fewer = params_with(name="other", seeds=[0], arms={ARM: CONTENT["arms"][ARM]}, tracking={"enabled": False})
    assert fingerprint(fewer) == fingerprint()
    slower = params_with(pretrain={**CONTENT["pretrain"], "lr": 1e-3})
    assert fingerprint(slower) != fingerprint()
    assert fingerprint(slower, "scratch") == fingerprint(PARAMS, "scratch")
    assert fingerprint(seed=1) != fingerprint()
    assert fingerprint(with_compute(threads=2, compile="default", devices=4)) == fingerprint()  # rounding alone
    assert fingerprint(with_compute(precision="bf16")) != fingerprint()


def with_compute(**changes: Any) -> Params:
    return params_with(compute={**CONTENT["compute"], **changes})


def test_how_it_is_computed_is_no_contradiction(store: Store) -> None:
    write_results()
    publish()
    before = snapshot(store)
    publish(with_compute(threads=2, attention="fused", activation_checkpointing=True))
    assert snapshot(store) == before
    (run,) = arm_runs(store)
    assert {key for key in run.data.params if key.startswith("compute.")} == {"compute.device", "compute.precision"}


def test_a_stage_does_not_publish_what_later_stages_left_of_an_older_run(store: Store) -> None:
    write_results()
    publish(through="finetune")
    (run,) = arm_runs(store)
    assert {"pretrain/loss", "finetune/loss", "device_seconds"} <= set(run.data.metrics)
    assert not {"fid", "evaluate_seconds"} & set(run.data.metrics)
    assert store.client.list_artifacts(run.info.run_id) == []


def test_nothing_to_publish_makes_no_run(store: Store) -> None:
    publish()
    assert all_runs(store) == []


def test_a_stage_logs_params_tags_and_a_figure_that_moves_at_once(store: Store, project: Path) -> None:
    figure = project / "curve.png"
    figure.write_bytes(b"PNG")
    with tracking.stage_run(PARAMS, "report") as run:
        run.params(arms=2)
        run.tags(git_commit="c0ffee")
        run.figure(figure)
        figure.unlink()
        run.log(3, seconds=1.5)
    send()
    (logged,) = all_runs(store)
    assert (logged.info.run_name, logged.info.status) == ("report", "FINISHED")
    assert logged.data.params == {"arms": "2"}
    assert logged.data.tags.items() >= {"maskdm.kind": "stage", "git_commit": "c0ffee"}.items()
    assert history(store, logged, "seconds") == [(3, 1.5)]
    assert [file.path for file in store.client.list_artifacts(logged.info.run_id)] == ["curve.png"]


def test_a_rerun_of_a_stage_takes_the_place_of_the_older(store: Store) -> None:
    for arm, seed in ((ARM, SEED), (None, None)):
        for stage in ("pretrain", "finetune", "pretrain"):
            log_run(stage, arm, seed)
    (arm_run,) = arm_runs(store)
    children = store.stages_of(PARAMS.name, arm_run.info.run_id)
    assert sorted(run.info.run_name for run in children) == ["finetune", "pretrain"]
    assert len(all_runs(store)) == 5


@pytest.mark.parametrize(("error", "status"), [(ValueError("loss is nan"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_failing_stage_is_marked_and_its_exception_is_unchanged(
    store: Store, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)) as raised, tracking.stage_run(PARAMS, "finetune", RUN) as run:
        run.log(100, loss=2.0)
        raise error
    assert raised.value is error
    send()
    (arm_run,) = arm_runs(store)
    (child,) = store.stages_of(PARAMS.name, arm_run.info.run_id)
    assert (child.info.status, arm_run.info.status) == (status, status)
    assert history(store, child, "loss") == [(100, 2.0)]


def test_a_killed_stage_keeps_what_it_logged(store: Store, project: Path) -> None:
    code = """
        import time
        from maskdm.tracking import background, stage_run
        background.start_sender = lambda root: False
        with stage_run(params, "finetune", resolve(params, "patch-m50", 0)) as run:
            for step in range(100):
                run.log(step, loss=float(step))
            print("logged", flush=True)
            time.sleep(60)
    """
    process = run_python(code)
    assert process.stdout is not None
    process.stdout.readline()
    send()
    (arm_run,) = arm_runs(store)
    (child,) = store.stages_of(PARAMS.name, arm_run.info.run_id)
    assert (child.info.status, arm_run.info.status) == ("RUNNING", "RUNNING")
    assert len(history(store, child, "loss")) == 100
    assert tracking.flush(0.2)  # a stage at work has nothing to send just now

    process.kill()
    process.communicate()
    (spool,) = spools(project)
    with (spool / EVENTS).open("ab") as events:
        events.write(b'{"event": "metrics", "step": 100, "val')  # a line that the kill has torn
    send()
    (child,) = store.stages_of(PARAMS.name, arm_run.info.run_id)
    assert (child.info.status, arm_runs(store)[0].info.status) == ("KILLED", "KILLED")
    assert history(store, child, "loss") == [(step, float(step)) for step in range(100)]
    assert spools(project) == []


@pytest.mark.workflow
def test_killed_senders_lose_and_duplicate_nothing(store: Store, senders: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(background, "start_sender", lambda root: False)
    for stage in ("pretrain", "finetune", "sample"):
        with tracking.stage_run(PARAMS, stage, RUN) as run:
            for step in range(3000):
                run.log(step, loss=float(step))
                if step % 100 == 0:
                    run.tags(step=step)  # ends a batch
    for _ in range(3):
        before = _sent_bytes(senders)
        assert START_SENDER(senders)
        wait_until(lambda before=before: _sent_bytes(senders) != before)
        stop_sender(senders)
    monkeypatch.setattr(background, "start_sender", START_SENDER)
    assert spools(senders)
    assert tracking.flush(120)

    (arm_run,) = arm_runs(store)
    children = store.stages_of(PARAMS.name, arm_run.info.run_id)
    assert sorted(child.info.run_name for child in children) == ["finetune", "pretrain", "sample"]
    for child in children:
        assert child.info.status == "FINISHED"
        points = store.client.get_metric_history(child.info.run_id, "loss")
        assert sorted((p.step, p.value) for p in points) == [(step, float(step)) for step in range(3000)]


def _sent_bytes(root: Path) -> list[tuple[str, int]]:
    return [(spool.name, SpoolReader(spool).progress.offset) for spool in spools(root)]


@pytest.mark.workflow
def test_a_stage_that_comes_while_the_sender_ends_is_sent(store: Store, senders: Path) -> None:
    code = """
        import fcntl, os
        from pathlib import Path
        from maskdm.tracking import background, sender, spool, stage_run

        def run(self):  # to the end, where a stage comes after the last look and finds the lock still held
            with stage_run(params, "prepare"):
                assert not background.start_sender(Path.cwd())
            return True

        sender.Sender.run = run
        spool.tracking_folder(Path.cwd()).mkdir(parents=True)
        lock = os.open(spool.tracking_folder(Path.cwd()) / background.LOCK, os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        sys.argv[1:] = [str(Path.cwd()), str(lock)]
        sender.main()
    """
    assert run_python(code).communicate(timeout=60) == ("", "")
    wait_until(lambda: spools(senders) == [])
    assert [run.info.run_name for run in all_runs(store)] == ["prepare"]


def test_processes_that_start_together_get_one_sender(senders: Path) -> None:
    with tracking.stage_run(PARAMS, "prepare"):
        first = sender_pid(senders)
        assert first is not None
        assert not START_SENDER(senders)
    assert sender_pid(senders) == first


def test_a_sender_ends_when_there_is_nothing_to_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(sender, "LOOK_EVERY_SECONDS", 0.01)
    assert Sender(project).run()


def test_a_replaced_database_is_opened_anew(store: Store, project: Path) -> None:
    log_run()
    worker = Sender(project)
    worker._store(tracking.store_uri())
    assert not worker._is_outdated()
    (project / "mlflow.db").unlink()
    assert worker._is_outdated()
    assert worker.run()  # at once: main lets another sender open the new one


@pytest.mark.workflow
def test_a_sender_whose_folder_was_cleaned_away_leaves(senders: Path) -> None:
    with tracking.stage_run(PARAMS, "prepare"):
        pass
    first = sender_pid(senders)
    assert first is not None
    shutil.rmtree(senders / ".work")
    with tracking.stage_run(PARAMS, "prepare"):
        pass
    second = sender_pid(senders)
    assert second is not None and second != first
    wait_until(lambda: psutil.Process(first).status() == psutil.STATUS_ZOMBIE)
    assert sender_pid(senders) == second
    assert tracking.flush(60)
    assert len(all_runs(open_store(tracking.store_uri(), senders))) == 1


def test_a_run_that_the_user_deletes_holds_up_nothing(store: Store, project: Path) -> None:
    with tracking.stage_run(PARAMS, "prepare") as run:
        run.log(1, seconds=2.0)
        send()
        (logged,) = all_runs(store)
        store.client.delete_run(logged.info.run_id)
        run.log(2, seconds=2.0)
    send()
    assert spools(project) == []


def test_an_unreachable_server_costs_no_time_and_is_told_once_by_the_next_stage(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    write_results()
    started = time.monotonic()
    with tracking.stage_run(PARAMS, "finetune", RUN) as run:
        run.log(1, loss=1.0)
    tracking.publish_arm(RUN)
    assert time.monotonic() - started < 0.5
    assert capfd.readouterr().err == ""

    monkeypatch.setattr(sender, "GIVE_UP_SECONDS", 0.1)
    monkeypatch.setattr(sender, "LOOK_EVERY_SECONDS", 0.05)
    assert not Sender(project).run()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("MLflow at http://127.0.0.1:")
    assert len(spools(project)) == 2

    with tracking.stage_run(PARAMS, "sample", RUN):
        pass
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: tracking: MLflow at http://127.0.0.1:") and "could not be reached" in line
    assert "1 run is kept in .work/tracking and sent by the next stage or by `maskdm sync`" in line
    assert "secret" not in line
    with pytest.raises(UserError, match="cannot read the MLflow store"):
        tracking.compare_url(PARAMS)


@pytest.mark.workflow
def test_what_could_not_be_sent_is_sent_by_sync(
    senders: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///there/mlflow.db")
    (senders / "there").touch()  # a file, where the database needs a folder
    with tracking.stage_run(PARAMS, "prepare") as run:
        run.log(1, seconds=2.0)
    assert cli.main(["sync"]) == 1
    assert "1 run is kept in .work/tracking" in capfd.readouterr().err
    assert len(spools(senders)) == 1

    (senders / "there").unlink()
    (senders / "there").mkdir()
    assert cli.main(["sync"]) == 0
    assert "everything is in MLflow" in capfd.readouterr().out
    assert spools(senders) == []
    assert not (tracking_folder(senders) / background.ERROR).exists()
    store = open_store(tracking.store_uri(), senders)
    assert [history(store, run, "seconds") for run in all_runs(store)] == [[(1, 2.0)]]


def test_every_store_gets_what_is_meant_for_it(
    store: Store, project: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_run()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with tracking.stage_run(PARAMS, "features"):
        pass
    (project / "sub").mkdir()
    shutil.copy(empty_database, project / "sub" / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")  # of the stage's folder
    monkeypatch.chdir(project / "sub")
    with tracking.stage_run(PARAMS, "report"):
        pass
    other = open_store(tracking.store_uri(), project)
    Sender(project).send()

    assert [run.info.run_name for run in all_runs(store)] == ["prepare"]
    assert [run.info.run_name for run in all_runs(other)] == ["report"]
    assert [spool.name.split("-")[2] for spool in spools(project)] == ["features"]


def test_a_wrong_event_holds_up_nothing(store: Store, project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_results()
    (paths.finetune(ARM, SEED) / "curve.csv").write_text("step,loss\nten,1.0\n")
    with tracking.stage_run(PARAMS, "prepare") as run:
        run.params(seed=1)
        run.params(seed=2)  # MLflow refuses it
        run.log(1, seconds=2.0)
    publish()
    (logged,) = all_runs(store)
    assert (logged.info.status, logged.data.params, logged.data.metrics) == ("FINISHED", {"seed": "1"}, {"seconds": 2})
    assert spools(project) == []
    assert [line.split(": ")[1] for line in capfd.readouterr().err.splitlines() if ": left out" in line] == [
        "left out params",
        "left out publish",
    ]


def test_results_of_another_folder_are_published(store: Store, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = project / "experiments" / "one"
    experiment.mkdir(parents=True)
    monkeypatch.chdir(experiment)
    write_results()
    tracking.publish_arm(RUN)
    monkeypatch.chdir(project)
    send()
    (run,) = arm_runs(store)
    assert run.data.metrics["fid"] == 20.0


def test_the_sender_sees_the_params_of_the_stage(project: Path) -> None:
    params = params_with(arms={**CONTENT["arms"], ARM: {"strategy": "patch", "mask_rate": 0.5, "pretrain": {"lr": 1}}})
    tracking.publish_arm(resolve(params, ARM, SEED))
    (spool,) = spools(project)
    event = next(event for event in SpoolReader(spool).unsent() if event.kind == "publish")
    assert parse_params(event.fields["params"]) == params
    assert list(arm_key(resolve(parse_params(event.fields["params"]), ARM, SEED))) == list(event.fields["arm"].values())


def test_a_place_that_cannot_be_written_costs_one_warning(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "curve.png").write_bytes(b"PNG")
    (project / ".work").touch()
    with tracking.stage_run(PARAMS, "prepare") as run:
        run.log(1, seconds=2.0)
        run.figure(project / "curve.png")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: tracking: nothing that prepare logs can be kept for MLflow (Not a directory)")


def test_a_figure_that_is_missing_costs_only_itself(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    with tracking.stage_run(PARAMS, "prepare") as run:
        run.figure(Path("missing.png"))
        run.log(2, seconds=2.0)
    assert "missing.png of prepare" in capfd.readouterr().err
    send()
    (logged,) = all_runs(store)
    assert (logged.info.status, logged.data.metrics) == ("FINISHED", {"seconds": 2.0})


def test_an_unreadable_spool_is_removed(store: Store, project: Path) -> None:
    Spool(project, "prepare", tracking.store_uri()).close()
    (spool,) = spools(project)
    (spool / EVENTS).write_bytes(b"\0\0\0")  # what a power cut can leave
    send()
    assert spools(project) == []


def test_a_stage_imports_no_mlflow_and_spends_next_to_nothing(project: Path) -> None:
    code = """
        import time
        from maskdm.tracking import background, publish_arm, stage_run
        background.start_sender = lambda root: False
        started = time.process_time()
        with stage_run(params, "finetune", resolve(params, "patch-m50", 0)) as run:
            for step in range(1000):
                run.log(step, loss=1.0, lr=0.1)
        publish_arm(resolve(params, "patch-m50", 0))
        print(time.process_time() - started < 0.2)
        print([name for name in ("mlflow", "torch", "sqlalchemy") if name in sys.modules])
    """
    assert run_python(code).communicate(timeout=60) == ("True\n[]\n", "")


@pytest.mark.workflow
def test_no_stage_imports_mlflow(project: Path) -> None:
    code = """
        from importlib import import_module
        from pathlib import Path
        from maskdm import cli
        for stage in cli.STAGES:
            import_module(f"maskdm.stages.{stage}")
        assert cli.main(["prepare"]) == 0
        print([name for name in sys.modules if name.split(".")[0] in ("mlflow", "sqlalchemy", "alembic")])
    """
    shutil.copy(Path(__file__).parents[2] / "experiments" / "tiny" / "params.yaml", project)
    assert run_python(code).communicate(timeout=60) == ("[]\n", "")
    assert [spool.name.split("-")[2] for spool in spools(project)] == ["prepare"]


def test_a_password_in_the_uri_is_not_printed() -> None:
    assert shown("https://me:secret@host:80/path") == "https://host:80/path"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_disabled_tracking_imports_no_mlflow_and_writes_nothing(project: Path) -> None:
    code = """
        from pathlib import Path
        from maskdm.tracking import publish_arm, stage_run
        off = params.model_copy(update={"tracking": params.tracking.model_copy(update={"enabled": False})})
        with stage_run(off, "finetune", resolve(off, "scratch", 0)) as run:
            run.log(1, loss=1.0)
            run.params(a=1)
            run.tags(b=2)
            run.figure(Path("missing.png"))
        publish_arm(resolve(off, "scratch", 0))
        print([name for name in ("mlflow", "torch", "sqlalchemy") if name in sys.modules])
    """
    assert run_python(code).communicate(timeout=60) == ("[]\n", "")
    assert [file.name for file in project.iterdir()] == [".dvc"]


def test_a_deleted_experiment_comes_back(store: Store) -> None:
    store.client.delete_experiment(store.experiment(PARAMS.name))
    log_run()
    assert [run.info.run_name for run in all_runs(store)] == ["prepare"]


def test_the_ui_says_what_is_missing(project: Path) -> None:
    with pytest.raises(UserError, match="dvc repro"):
        ui.open_ui(PARAMS)
    (project / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            ui.open_ui(PARAMS, taken.getsockname()[1])


@pytest.mark.workflow
def test_the_ui_answers_and_leaves_no_process(store: Store) -> None:
    log_run()
    port = free_port()
    process = run_python("from maskdm.tracking.ui import open_ui\nopen_ui(params, int(sys.argv[2]))", str(port))
    assert process.stdout is not None
    assert f"127.0.0.1:{port}/#/experiments/1/runs?viewStateShareKey=arms&" in process.stdout.readline()
    assert [process.stdout.readline() for _ in range(2)][-1] == "Ctrl-C stops it.\n"
    server = psutil.Process(process.pid).children(recursive=True)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        assert answer.status == 200
    process.terminate()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 143
    assert server and not any(helper.is_running() for helper in server)
