"""MLflow under faults: a killed stage goes on in its run, and neither servers, disks nor clocks take a stage down."""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from maskdm import tracking
from maskdm.base import publishing
from maskdm.config import paths, resolve
from maskdm.tracking import background, spool, stage_runs
from maskdm.tracking.sender import Sender
from maskdm.tracking.spool import SpoolReader, spools
from maskdm.tracking.store import Store, open_store
from tests.tracking.tracked import (
    ARM,
    CONTENT,
    PARAMS,
    RUN,
    SEED,
    SlowProxy,
    all_runs,
    arm_runs,
    free_port,
    history,
    log_run,
    mlflow_server,
    params_with,
    publish,
    run_python,
    run_sync,
    send,
    sender_pid,
    stop_sender,
    wait_until,
    without_root_rights,
    write_results,
)

pytest_plugins = ["tests.tracking.tracked_project"]
# SQLAlchemy's pool closes its connections only when the process ends; Python 3.13 notices.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")

KEY = "0123456789abcdef" * 2
KILLED_AT, RESUMED_AT, END = 100, 80, 150  # the last state that was saved is older than the last row
HOUR_NS = 3600 * 10**9


def run_killed_stage(key: str = KEY) -> None:
    """A stage that logs its first rows and is killed."""
    code = """
        import time
        from maskdm.tracking import background, stage_run
        background.start_sender = lambda root: False
        with stage_run(params, "finetune", resolve(params, "patch-m50", 0), key=sys.argv[2]) as run:
            run.params(lr=0.002, threads=4)
            for step in range(int(sys.argv[3])):
                run.log(step, loss=float(step), images_per_second=100.0)
            print("logged", flush=True)
            time.sleep(60)
    """
    process = run_python(code, key, str(KILLED_AT))
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    process.kill()
    process.communicate()


def resume_stage(params: Any = PARAMS, key: str = KEY, first: int = RESUMED_AT, look: Callable[[], None] = int) -> None:
    """The same stage again, from an older state to its end, on a machine that is twice as fast."""
    with tracking.stage_run(params, "finetune", resolve(params, ARM, SEED), key=key) as run:
        run.params(lr=0.002, threads=2, seed=0)
        for step in range(first, END):
            run.log(step, loss=float(step), images_per_second=200.0)
            if step % 10 == 0:
                look()
        run.log(0, wall_seconds=1.0)


def the_child(store: Store) -> Any:
    """The only stage of the only arm run."""
    (arm_run,) = arm_runs(store)
    (child,) = store.stages_of(PARAMS.name, arm_run.info.run_id)
    return child


def assert_whole(store: Store) -> None:
    """The run is over, and has every step once: the first that was logged."""
    child = the_child(store)
    assert [child.info.status, arm_runs(store)[0].info.status] == ["FINISHED", "FINISHED"]
    assert sorted(history(store, child, "loss")) == [(step, float(step)) for step in range(END)]
    speeds = [(step, 100.0 if step < KILLED_AT else 200.0) for step in range(END)]
    assert sorted(history(store, child, "images_per_second")) == speeds
    assert history(store, child, "wall_seconds") == [(0, 1.0)]
    assert child.data.params == {"lr": "0.002", "threads": "4", "seed": "0"}


@pytest.mark.parametrize("sent_before", [True, False])
def test_a_resumed_stage_goes_on_in_its_run(
    store: Store, project: Path, capfd: pytest.CaptureFixture[str], sent_before: bool
) -> None:
    run_killed_stage()
    if sent_before:
        send()
        assert (the_child(store).info.status, arm_runs(store)[0].info.status) == ("KILLED", "KILLED")
    resume_stage()
    send()
    assert_whole(store)
    assert spools(project) == []
    assert "left out" not in capfd.readouterr().err


def test_a_stage_resumed_twice_while_mlflow_is_away_arrives_in_order(store: Store) -> None:
    for _ in range(2):
        run_killed_stage()
    resume_stage()
    send()
    assert_whole(store)


def test_senders_that_look_in_between_log_every_step_once(store: Store) -> None:
    run_killed_stage()
    resume_stage(look=send)  # every time as a new process would
    send()
    assert_whole(store)


def test_another_piece_of_work_has_a_run_of_its_own(store: Store) -> None:
    run_killed_stage()
    resume_stage(key="f" * 32, first=0)
    send()
    child = the_child(store)
    assert child.data.params["threads"] == "2"
    assert history(store, child, "images_per_second") == [(step, 200.0) for step in range(END)]


def test_work_that_is_taken_up_after_other_params_finds_its_run_again(store: Store) -> None:
    run_killed_stage()
    other = params_with(arms={**CONTENT["arms"], ARM: {"strategy": "patch", "mask_rate": 0.75}})
    log_run("finetune", ARM, SEED, other)
    assert the_child(store).data.metrics == {}
    resume_stage()
    send()
    assert_whole(store)


def test_the_end_of_the_killed_process_does_not_end_the_run_of_the_one_that_goes_on(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.stage_run(PARAMS, "finetune", RUN, key=KEY) as run:
        run.params(lr=0.002, threads=4)
        for step in range(KILLED_AT):
            run.log(step, loss=float(step), images_per_second=100.0)
        send()
        resume_stage()
        send()
        raise KeyboardInterrupt
    send()
    assert_whole(store)


class CountingClient:
    """An mlflow client that counts what is asked of it."""

    def __init__(self, client: Any) -> None:
        self._client, self.calls = client, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._client, name)


@pytest.fixture
def counting(store: Store, project: Path) -> tuple[Sender, Counter[str]]:
    """A sender, and how often it has asked mlflow for what."""
    worker = Sender(project)
    client = CountingClient(store.client)
    worker._store(tracking.store_uri()).client = client  # type: ignore[assignment]
    return worker, client.calls


def test_a_key_costs_a_fresh_run_no_request(counting: tuple[Sender, Counter[str]]) -> None:
    worker, calls = counting
    asked = []
    for key in (None, None, KEY):  # the first makes the experiment and the arm run, too
        calls.clear()
        with tracking.stage_run(PARAMS, "finetune", RUN, key=key) as run:
            run.params(lr=0.002)
            run.log(1, loss=1.0)
        worker.send()
        asked.append(dict(calls))
    assert asked[2] == asked[1]


def test_a_continued_run_is_read_once(counting: tuple[Sender, Counter[str]], store: Store) -> None:
    worker, calls = counting
    run_killed_stage()
    worker.send()
    calls.clear()
    resume_stage(look=lambda: worker.send() and None)
    worker.send()
    assert calls["get_metric_history"] == 2  # loss and images_per_second; it had no wall_seconds
    assert calls["log_batch"] <= 12  # one a look, with new points, and for tags and params
    assert_whole(store)


def test_a_sender_is_woken_during_a_long_stage(senders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tracking.stage_run(PARAMS, "prepare") as run:
        first = sender_pid(senders)
        stop_sender(senders)
        run.log(1, loss=1.0)
        assert sender_pid(senders) is None  # looked after now and then only
        monkeypatch.setattr(stage_runs, "WAKE_EVERY_SECONDS", 0.0)
        run.log(2, loss=1.0)
        wait_until(lambda: sender_pid(senders) not in (None, first))


@pytest.mark.workflow
def test_a_server_killed_midway_gets_everything_once_when_it_is_back(
    senders: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, database = free_port(), senders / "server" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with tracking.stage_run(PARAMS, "finetune", RUN, key=KEY) as run:
        with mlflow_server(database, port):
            for step in range(100):
                run.log(step, loss=float(step))
            wait_until(lambda: SpoolReader(spools(senders)[0]).is_sent)
        started = time.monotonic()
        for step in range(100, 200):
            run.log(step, loss=float(step))
    assert time.monotonic() - started < 1.0
    code, _, err = run_sync()
    assert (code, "Traceback" in err) == (1, False)
    assert f"MLflow at http://127.0.0.1:{port} could not be reached or written (ConnectionRefusedError" in err
    assert "1 run is kept in .work/tracking and sent by the next stage or by `maskdm sync`" in err

    with mlflow_server(database, port):
        assert run_sync() == (0, "everything is in MLflow\n", "")
    store = open_store(f"sqlite:///{database}", senders)
    assert history(store, the_child(store), "loss") == [(step, float(step)) for step in range(200)]
    assert the_child(store).info.status == "FINISHED"


@pytest.mark.workflow
def test_a_slow_server_does_not_slow_a_stage(
    senders: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, database = free_port(), senders / "server" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    with mlflow_server(database, port), SlowProxy(port, delay_seconds=0.3) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")
        run_killed_stage()
        background.start_sender(senders)
        wait_until(lambda: proxy.num_delays > 0)
        started = time.monotonic()
        resume_stage()
        seconds = time.monotonic() - started
        assert tracking.flush(120)
        waited = 0.3 * proxy.num_delays
    assert seconds < 1.0
    assert waited > 3.0
    assert_whole(open_store(f"sqlite:///{database}", senders))


STAGE = """
    from pathlib import Path
    from maskdm.tracking import stage_run
    with stage_run(params, "prepare") as run:
        run.log(1, seconds=2.0)
    Path("result").write_text("complete")
"""


@pytest.mark.workflow
@pytest.mark.parametrize("what", ["database", "folder"])
def test_a_read_only_database_costs_a_stage_nothing(
    senders: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    database = senders / "store" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    locked, mode = (database, 0o444) if what == "database" else (database.parent, 0o555)
    before = locked.stat().st_mode
    locked.chmod(mode)
    assert run_python(STAGE, before=without_root_rights).communicate(timeout=60) == ("", "")
    assert Path("result").read_text() == "complete"
    code, _, err = run_sync(before=without_root_rights)
    assert (code, "Traceback" in err) == (1, False)
    assert f"{database} could not be reached or written (OperationalError: attempt to write a readonly database)" in err
    assert "1 run is kept in .work/tracking and sent by the next stage or by `maskdm sync`" in err

    locked.chmod(before)
    stop_sender(senders)
    assert run_sync(before=without_root_rights) == (0, "everything is in MLflow\n", "")
    store = open_store(tracking.store_uri(), senders)
    assert [history(store, run, "seconds") for run in all_runs(store)] == [[(1, 2.0)]]


@pytest.mark.workflow
def test_a_database_that_cannot_be_opened_is_told_soon(senders: Path) -> None:
    (senders / "mlflow.db").mkdir()  # mlflow itself would try for two minutes
    assert run_python(STAGE).communicate(timeout=60) == ("", "")
    started = time.monotonic()
    code, _, err = run_sync()
    assert (code, "Traceback" in err) == (1, False)
    assert "mlflow.db could not be reached or written (OperationalError: unable to open database file)" in err
    assert time.monotonic() - started < 40


def limit_files(size: int) -> Callable[[], None]:
    """Let no file grow beyond a size, as on a full disk: for `before` of `run_python`; Python ignores the signal."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("is_space_made", [True, False])
def test_a_disk_that_fills_up_while_a_stage_logs_costs_one_warning(
    store: Store, project: Path, is_space_made: bool
) -> None:
    code = """
        import resource
        from maskdm.base.publishing import publish_text
        from maskdm.tracking import background, stage_run
        from pathlib import Path
        background.start_sender = lambda root: False
        with stage_run(params, "finetune", resolve(params, "patch-m50", 0)) as run:
            for step in range(1000):
                run.log(step, loss=float(step))
            run.figure(Path("curve.png"))
            publish_text(Path("result.csv"), "complete")
            if sys.argv[2] == "True":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            run.log(1000, loss=1000.0)
    """
    (project / "curve.png").write_bytes(bytes(30_000))
    process = run_python(code, str(is_space_made), before=limit_files(20_000))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    (line,) = err.splitlines()
    (name,) = [folder.name for folder in spools(project)]
    assert line.startswith(
        f"warning: tracking: what finetune-{ARM}-0 logs can't be written to .work/tracking/{name} (File too large): "
        "what was written before is sent by the next stage or by `maskdm sync`"
    )
    assert (project / "result.csv").read_text() == "complete"

    send()
    child = the_child(store)
    losses = history(store, child, "loss")
    assert losses == [(step, float(step)) for step in range(len(losses))]
    assert len(losses) == 1001 if is_space_made else 50 < len(losses) < 1000
    assert child.info.status == ("FINISHED" if is_space_made else "KILLED")
    assert spools(project) == []


def test_a_disk_that_is_full_when_a_stage_starts_loses_nothing(
    store: Store, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as full:
        full.setattr("os.write", lambda descriptor, content: 0)
        stage = tracking.stage_run(PARAMS, "prepare")
        run = stage.__enter__()
        run.log(1, seconds=2.0)
    send()
    assert len(spools(project)) == 1  # nothing can be read of it yet
    stage.__exit__(None, None, None)
    send()
    assert [history(store, logged, "seconds") for logged in all_runs(store)] == [[(1, 2.0)]]
    (line,) = capfd.readouterr().err.splitlines()
    assert "(No space left on device)" in line


@pytest.mark.workflow
def test_sync_on_a_full_disk_says_so(store: Store, project: Path) -> None:
    with tracking.stage_run(PARAMS, "prepare") as run:
        run.log(1, seconds=2.0)
    code, _, err = run_sync(before=limit_files(0))
    assert (code, "Traceback" in err) == (1, False)
    assert "is the disk of .work/tracking full?; 1 run is kept in .work/tracking and sent by" in err

    (sender,) = [process for process in psutil.process_iter() if str(project) in _command_line(process)]
    sender.kill()  # it has the limit, too
    assert run_sync() == (0, "everything is in MLflow\n", "")
    assert [history(store, logged, "seconds") for logged in all_runs(store)] == [[(1, 2.0)]]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Set the clock this far from the right time, in nanoseconds."""
    right = time.time_ns
    yield lambda offset_ns: monkeypatch.setattr(time, "time_ns", lambda: right() + offset_ns)
    monkeypatch.undo()


@pytest.mark.parametrize("sent_before", [True, False])
def test_a_clock_that_jumps_back_between_two_processes(
    store: Store, set_clock: Callable[[int], None], sent_before: bool
) -> None:
    run_killed_stage()
    if sent_before:
        send()
    set_clock(-HOUR_NS)
    resume_stage()
    send()
    assert_whole(store)


def test_a_clock_that_starts_in_1970_is_the_clock_of_the_later_process(
    store: Store, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_killed_stage()
    monkeypatch.setattr(time, "time_ns", lambda: 5)  # and stands still
    resume_stage()
    for _ in range(3):
        spool.Spool(project, "prepare", tracking.store_uri()).close()
    assert len(spools(project)) == 5
    send()
    assert_whole(store)


def test_a_clock_that_jumps_back_within_a_stage(store: Store, set_clock: Callable[[int], None]) -> None:
    with tracking.stage_run(PARAMS, "finetune", RUN) as run:
        for step in range(100):
            run.log(step, loss=float(step))
        set_clock(-HOUR_NS)
        for step in range(100, 200):
            run.log(step, loss=float(step))
    send()
    child = the_child(store)
    assert child.info.status == "FINISHED"
    assert child.info.end_time >= child.info.start_time
    assert sorted(history(store, child, "loss")) == [(step, float(step)) for step in range(200)]
    assert child.data.metrics["loss"] == 199.0


def test_of_timings_the_newest_is_shown_though_the_clock_jumped_back(
    store: Store, set_clock: Callable[[int], None]
) -> None:
    write_results()
    publish()
    set_clock(-HOUR_NS)
    publishing.publish_json(paths.record("evaluate", ARM, SEED), {"wall_seconds": 7.0})
    publish()
    publish()
    (run,) = arm_runs(store)
    assert run.data.metrics["evaluate_seconds"] == 7.0
    assert sorted(history(store, run, "evaluate_seconds")) == [(0, 7.0), (0, 40.0)]
