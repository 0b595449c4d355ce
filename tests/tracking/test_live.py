"""What a long stage logs while it works, and that MLflow's faults never reach it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from maskdm.base import publishing
from maskdm.base.progress import Log
from maskdm.config import paths
from maskdm.config.jobs import Job, Jobs
from maskdm.tracking import live
from maskdm.tracking.live import live_log
from maskdm.tracking.store import Store, sqlite_uri
from tests.tracking.tracked import (
    ARM,
    PARAMS,
    SlowProxy,
    arm_run,
    free_port,
    history,
    mlflow_server,
    params_with,
    publish,
    run_track,
    runs_of,
    stamp,
    wait_until,
    without_root_rights,
    write_record,
    write_results,
)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
ONE_SEED = params_with(seeds=[0])
WORK = "pretrain-patch-m50-0-1"  # the id that `write_record` gives


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage is a long one, and logs every few milliseconds."""
    monkeypatch.setattr(live, "BEGINS_AFTER_SECONDS", 0.01)
    monkeypatch.setattr(live, "LOGS_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(live, "MAX_WAIT_SECONDS", 60.0)


def pretraining() -> Job:
    return Jobs(ONE_SEED).find("pretrain", ARM, 0)


def pretrain_run(store: Store) -> Any:
    (run,) = runs_of(store, kind="stage", stage="pretrain")
    return run


def logged(store: Store) -> list[tuple[int, float]]:
    """The points of pretraining's loss in MLflow."""
    return history(store, pretrain_run(store), "loss") if runs_of(store, kind="stage", stage="pretrain") else []


def add_rows(log: Log, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.add(step, {"loss": float(step), "lr": 0.1})


def finish_pretraining() -> None:
    """What the stage leaves: its output and its record."""
    rows = "\n".join(f"{step},{step},0.1,{step},{step},{step}" for step in range(1, 21))
    file = paths.pretrain(ARM, 0) / "curve.csv"
    publishing.publish_text(file, f"step,loss,lr,images_seen,tokens_seen,flops\n{rows}\n")
    write_record("pretrain", rows=0)
    stamp(ONE_SEED)


def test_a_running_arm_shows_its_strategy_and_rate_and_its_curve(store: Store) -> None:
    with live_log(pretraining(), WORK) as log:
        add_rows(log, 1, 10)
        wait_until(lambda: len(logged(store)) == 10)
        arm = arm_run(store)
        assert arm.info.status == "RUNNING"
        assert (arm.data.params["strategy"], arm.data.params["mask_rate"]) == ("patch", "0.5")
        assert pretrain_run(store).info.status == "RUNNING"
        add_rows(log, 11, 20)
        finish_pretraining()
    run = pretrain_run(store)
    assert history(store, run, "loss") == [(step, float(step)) for step in range(1, 21)]
    assert (run.info.status, run.data.metrics["wall_seconds"]) == ("FINISHED", 10.0)
    assert arm_run(store).info.run_id == arm.info.run_id and len(history(store, arm_run(store), "pretrain/loss")) == 20
    assert publish(ONE_SEED).runs and len(history(store, pretrain_run(store), "loss")) == 20


@pytest.mark.parametrize(("error", "status"), [(ValueError("loss is nan"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_resumed_stage_goes_on_in_its_run_with_every_step_once(
    store: Store, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), live_log(pretraining(), WORK) as log:
        add_rows(log, 1, 9)
        wait_until(lambda: len(logged(store)) == 9)
        add_rows(log, 10, 10)
        raise error
    assert (pretrain_run(store).info.status, arm_run(store).info.status) == (status, status)
    with live_log(pretraining(), WORK) as log:
        wait_until(lambda: pretrain_run(store).info.status == "RUNNING")
        add_rows(log, 6, 20)  # from the state that was saved at step 5
        finish_pretraining()
    run = pretrain_run(store)
    assert history(store, run, "loss") == [(step, float(step)) for step in range(1, 21)]
    assert (run.info.status, arm_run(store).info.status) == ("FINISHED", "SCHEDULED")


def test_a_trial_and_a_stage_of_the_whole_experiment_log_too(store: Store) -> None:
    tuned = params_with(tuning={"seed": 1000, "budget_fraction": 0.3, "trials": {"a": {}, "b": {"finetune.lr": 1e-3}}})
    with live_log(Jobs(tuned).find("tune", ARM, trial="b"), "t") as log:
        log.add(1, {"pretrain/loss": 1.0})
        wait_until(lambda: bool(runs_of(store, kind="trial")))
    (run,) = runs_of(store, kind="trial")
    assert (run.data.params["finetune.lr"], run.data.metrics["pretrain/loss"]) == ("0.001", 1.0)
    with live_log(Jobs(PARAMS).find("features"), "f"):
        wait_until(lambda: bool(runs_of(store, stage="features")))


def test_a_short_stage_logs_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEGINS_AFTER_SECONDS", 60.0)
    with live_log(pretraining(), WORK) as log:
        add_rows(log, 1, 10)
    assert not store._search("")


def test_other_arms_are_published_with_the_one_that_ends(store: Store) -> None:
    write_results("scratch")
    with live_log(pretraining(), WORK):
        finish_pretraining()
    assert arm_run(store, "scratch").data.metrics["fid"] == 20.0


def seconds_of_a_stage(rows: int = 200) -> float:
    """How long a stage takes that logs rows for a while and leaves nothing."""
    started = time.monotonic()
    with live_log(pretraining(), WORK) as log:
        add_rows(log, 1, rows)
        time.sleep(0.5)
    return time.monotonic() - started


@pytest.fixture
def server(project: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Path]:
    """The port and the database of a server that is not running yet."""
    port, database = free_port(), project / "server" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    return port, database


@pytest.mark.workflow
def test_a_dead_server_costs_a_stage_seconds_and_one_warning(
    server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "MAX_WAIT_SECONDS", 5.0)
    assert seconds_of_a_stage() < 15
    said = capfd.readouterr().err
    assert said.count("warning: tracking: MLflow at http://127.0.0.1:") == 1
    assert "(ConnectionRefusedError" in said and "`maskdm track` publishes them later" in said

    finish_pretraining()
    code, _, err = run_track()
    assert code == 1 and "Traceback" not in err
    assert f"MLflow at http://127.0.0.1:{server[0]} could not be reached or written (ConnectionRefusedError" in err


@pytest.mark.workflow
def test_a_server_killed_midway_gets_everything_once_when_it_is_back(
    server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, database = server
    monkeypatch.setattr(live, "MAX_WAIT_SECONDS", 5.0)

    with live_log(pretraining(), WORK) as log:
        with mlflow_server(database, port):
            add_rows(log, 1, 10)
            wait_until(lambda: len(logged(Store(PARAMS.name))) == 10)
        add_rows(log, 11, 20)
        time.sleep(0.5)
        finish_pretraining()
    with mlflow_server(database, port):
        assert run_track()[0] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(database))
    store = Store(PARAMS.name)
    assert history(store, pretrain_run(store), "loss") == [(step, float(step)) for step in range(1, 21)]
    assert pretrain_run(store).info.status == "FINISHED"


@pytest.mark.workflow
def test_a_slow_server_does_not_slow_a_stage(server: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    port, database = server
    monkeypatch.setattr(live, "MAX_WAIT_SECONDS", 1.0)
    with mlflow_server(database, port), SlowProxy(port, delay_seconds=2.0) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")
        assert seconds_of_a_stage() < 5
        wait_until(lambda: proxy.num_delays > 0)
        finish_pretraining()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert run_track()[0] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(database))
    store = Store(PARAMS.name)
    assert pretrain_run(store).info.status == "FINISHED" and len(history(store, arm_run(store), "pretrain/loss")) == 20


@pytest.mark.workflow
@pytest.mark.parametrize("what", ["database", "folder"])
def test_a_read_only_database_is_reported(store: Store, project: Path, what: str) -> None:
    database = project / "mlflow.db"
    write_results()
    stamp(ONE_SEED)
    locked, mode = (database, 0o444) if what == "database" else (project, 0o555)
    before = locked.stat().st_mode
    locked.chmod(mode)
    try:
        code, _, err = run_track(before=without_root_rights)
    finally:
        locked.chmod(before)
    assert code == 1 and "Traceback" not in err
    assert f"{database} could not be reached or written (" in err


@pytest.mark.workflow
def test_a_database_that_cannot_be_opened_is_reported_soon(project: Path) -> None:
    (project / "mlflow.db").mkdir()  # MLflow itself would try for two minutes
    started = time.monotonic()
    code, _, err = run_track()
    assert code == 1 and "Traceback" not in err
    assert "mlflow.db could not be reached or written (OperationalError: unable to open database file)" in err
    assert time.monotonic() - started < 60
