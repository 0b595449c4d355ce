"""`maskdm doctor`: each thing that a crash can leave, made for real, is found, explained and mended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from maskdm import paths
from maskdm.doctor import processes, room
from maskdm.tracking.background import ERROR
from maskdm.tracking.spool import Spool, spools, tracking_folder
from maskdm.work import Work
from tests.conftest import Experiment, Outcome
from tests.tracked import stop_sender

BIN = Path(sys.executable).parent
WHAT = "pretrain patch-m50 seed 0"
OUTPUT = paths.pretrain("patch-m50", 0)
LOCK = paths.lock("pretrain", "patch-m50", 0)
HOLDER = f"""\
import sys, time
from pathlib import Path
from maskdm.publishing import one_writer, publish_folder
with one_writer(Path({str(LOCK)!r}), {WHAT!r}), publish_folder(Path({str(OUTPUT)!r})) as folder:
    (folder / "half").write_bytes(bytes(2048))
    Path("ready").touch()
    time.sleep(300)
"""
FORKED = f"""\
import os, time
from pathlib import Path
from maskdm.publishing import one_writer
with one_writer(Path({str(LOCK)!r}), {WHAT!r}):
    if child := os.fork():
        Path("ready").write_text(str(child))
        os._exit(0)
    time.sleep(300)
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def project(tiny: Experiment) -> Experiment:
    """The tiny experiment at the root of a project."""
    tiny.path(".dvc", "tmp").mkdir(parents=True)
    return tiny


@pytest.fixture
def start(project: Experiment) -> Iterator[Start]:
    """Start processes in the project, in sessions of their own; what is left of them is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(words, cwd=project.folder, start_new_session=True, **QUIET))
        return started[-1]

    yield start
    for process in started:
        kill_session(process.pid)
        process.wait(timeout=10)


QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def kill_session(leader: int) -> None:
    """End the processes that were started with a leader, itself too."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                process.kill()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def line_of(outcome: Outcome, *words: str) -> str:
    """The one finding that has these words, its lines joined."""
    findings: list[str] = []
    for line in outcome.out.splitlines():
        if line.startswith("    "):
            findings[-1] += f" {line.strip()}"
        elif line.startswith("  "):
            findings.append(" ".join(line.split()))
    found = [finding for finding in findings if all(word in finding for word in words)]
    assert len(found) == 1, outcome.out
    return found[0]


def hold(project: Experiment, start: Start, *arguments: str, script: str = HOLDER) -> subprocess.Popen[bytes]:
    """A process at work on the stage."""
    process = start(sys.executable, "-c", script, *arguments)
    wait_for(project.path("ready").exists)
    return process


def write_rwlock(project: Experiment, pid: int, cmd: str = "/usr/bin/dvc repro") -> Path:
    """What a DVC of this pid leaves when it is killed while it runs a stage."""
    entry = {"pid": pid, "cmd": cmd}
    file = project.path(".dvc", "tmp", "rwlock")
    file.write_text(json.dumps({"write": {"/x/out": entry}, "read": {"/x/in": [entry]}}))
    return file


def claim(project: Experiment, **inputs: Any) -> Path:
    """A work folder with two states."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        folder = project.folder / Work.claim(OUTPUT, WHAT, inputs).folder
    for step in (500, 1000):
        (folder / f"state-{step:010d}.safetensors").write_bytes(bytes(4096))
    return folder


def everything(project: Experiment) -> dict[str, tuple[int, bytes | None]]:
    """Every path in the project with its time and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in project.folder.rglob("*")
    }


def test_nothing_to_find(project: Experiment) -> None:
    outcome = project.succeed("doctor")
    assert " problem " not in outcome.out and " info " not in outcome.out
    assert outcome.out.splitlines()[-1] == "no problem"
    assert "experiment tiny" in line_of(outcome, "params.yaml is valid")


def test_imports_nothing_heavy_and_is_quick(project: Experiment) -> None:
    script = (
        "import sys; from maskdm.cli import main; code = main(['doctor']); "
        "print(code, *{'torch', 'dvc', 'mlflow', 'numpy', 'snakemake'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project.folder, capture_output=True, text=True)
    assert done.stderr.split() == ["0"]


def test_changes_nothing_unless_told(project: Experiment) -> None:
    claim(project, lr=1).joinpath("state-0000001000.safetensors.damaged").touch()
    claim(project, lr=2)
    write_rwlock(project, os.getppid())
    project.path(paths.building(OUTPUT)).mkdir(parents=True)
    future = project.path("results", "x")
    future.touch()
    os.utime(future, (time.time() + 9000,) * 2)
    before = everything(project)
    outcome = project.run("doctor")
    assert outcome.code == 1
    assert outcome.out.count(" problem ") == 3
    assert "`maskdm doctor --fix` mends them" in outcome.out.splitlines()[-1]
    assert everything(project) == before


@pytest.fixture
def dvc_project(project: Experiment) -> Experiment:
    """A project with real DVC and one stage, which is at work until it is killed or `go` is there."""
    shutil.rmtree(project.path(".dvc"))
    run_dvc(project, "init", "-q", "--no-scm")
    project.path(".dvc", "config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
    project.path("holder.py").write_text(HOLDER)
    command = f"if [ -e go ]; then mkdir -p out; else {sys.executable} holder.py --stage-version 1; fi"
    project.path("dvc.yaml").write_text(json.dumps({"stages": {"a": {"cmd": command, "outs": ["out"]}}}))
    return project


def run_dvc(project: Experiment, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(BIN / "dvc"), *words], cwd=project.folder, capture_output=True, text=True)


def test_real_dvc_refuses_a_stale_lock_and_works_after_fix(dvc_project: Experiment, start: Start) -> None:
    engine = start(str(BIN / "dvc"), "repro")
    wait_for(dvc_project.path("ready").exists)
    outcome = dvc_project.succeed("doctor")
    assert f"info DVC is at work: process {engine.pid} (dvc repro)" in line_of(outcome, "DVC is at work")
    assert "run by dvc repro" in line_of(outcome, WHAT)

    kill_session(engine.pid)
    engine.wait()
    assert "nothing stands in the way" in dvc_project.succeed("doctor").out, "DVC drops the entry of a dead process"

    rwlock, other = dvc_project.path(".dvc", "tmp", "rwlock"), start("sleep", "300")
    rwlock.write_text(rwlock.read_text().replace(f'"pid": {engine.pid}', f'"pid": {other.pid}'))
    dvc_project.path("go").touch()
    refused = run_dvc(dvc_project, "repro")
    assert refused.returncode != 0 and "is busy, it is being blocked by" in refused.stderr

    outcome = dvc_project.run("doctor")
    assert outcome.code == 1
    assert f"process {other.pid} (dvc repro) is at work; that process is now sleep 300" in line_of(outcome, "blocked")
    assert f"took process {other.pid} out of" in line_of(dvc_project.succeed("doctor", "--fix"), "fixed", "rwlock")
    assert run_dvc(dvc_project, "repro").returncode == 0
    assert other.poll() is None


@pytest.mark.parametrize("command", ["dvc repro", "snakemake --cores 1"])
def test_an_orphan_of_a_real_engine_is_stopped(dvc_project: Experiment, start: Start, command: str) -> None:
    shell = f"{sys.executable} holder.py --stage-version 1"
    dvc_project.path("Snakefile").write_text(f"rule a:\n    output: 'out'\n    shell: '{shell}'\n")
    engine = start(*f"{BIN}/{command}".split())
    wait_for(dvc_project.path("ready").exists)
    assert f"run by {command} (process {engine.pid})" in line_of(dvc_project.succeed("doctor"), WHAT)
    engine.kill()
    engine.wait()
    outcome = dvc_project.run("doctor")
    assert outcome.code == 1
    assert "an orphan: the engine that started it is gone" in line_of(outcome, "problem", WHAT)

    pid = json.loads(dvc_project.path(LOCK).read_text())["pid"]
    outcome = dvc_project.succeed("doctor", "--fix")
    assert f"stopped process {pid}" in line_of(outcome, "fixed", WHAT)
    assert processes.find(pid) is None


def test_a_dead_process_that_nobody_buried_blocks_dvc(project: Experiment) -> None:
    with subprocess.Popen(["true"]) as zombie:
        wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
        rwlock = write_rwlock(project, zombie.pid)
        assert "is dead, though its parent has not noticed" in line_of(project.run("doctor"), "problem", "rwlock")
        project.succeed("doctor", "--fix")
        assert json.loads(rwlock.read_text()) == {"write": {}, "read": {}}


def test_only_the_stale_entries_go(project: Experiment, start: Start) -> None:
    rwlock = write_rwlock(project, start("sleep", "300").pid)
    content = json.loads(rwlock.read_text())
    gone = {"pid": 2**22 + 1, "cmd": "dvc status"}  # above every pid
    content["read"]["/x/in"].append(gone)
    rwlock.write_text(json.dumps(content))
    project.succeed("doctor", "--fix")
    assert json.loads(rwlock.read_text()) == {"write": {}, "read": {"/x/in": [gone]}}


def test_another_dvc_of_the_same_pid(project: Experiment, start: Start) -> None:
    project.path("dvc").write_text("import time; time.sleep(300)")
    pid = start(sys.executable, "dvc", "status").pid
    write_rwlock(project, pid, cmd="/elsewhere/dvc/__main__.py status")
    assert f"process {pid} (__main__.py status)" in line_of(project.succeed("doctor"), "info", "DVC is at work")
    write_rwlock(project, pid)
    assert "is now dvc status" in line_of(project.run("doctor"), "problem", "(dvc repro)")


@pytest.mark.parametrize("content", [b"", b'{"write": {', b"\xff\xfe", b"[]", b'{"write": {"a": {"pid": "1"}}}'])
def test_a_damaged_rwlock(project: Experiment, content: bytes) -> None:
    rwlock = project.path(".dvc", "tmp", "rwlock")
    rwlock.write_bytes(content)
    outcome = project.run("doctor")
    assert outcome.code == 1 and "is damaged" in line_of(outcome, "problem", "rwlock")
    assert "removed .dvc/tmp/rwlock" in line_of(project.succeed("doctor", "--fix"), "fixed")
    assert not rwlock.exists()


def test_a_damaged_rwlock_stays_while_dvc_is_at_work(dvc_project: Experiment, start: Start) -> None:
    start(str(BIN / "dvc"), "repro")
    wait_for(dvc_project.path("ready").exists)
    rwlock = dvc_project.path(".dvc", "tmp", "rwlock")
    rwlock.write_text("{")
    outcome = dvc_project.run("doctor", "--fix")
    assert outcome.code == 1 and "could not be mended: DVC is at work here" in line_of(outcome, "is damaged")
    assert rwlock.read_text() == "{"


def test_hardlink_lock_of_a_dead_dvc(project: Experiment) -> None:
    lock = project.path(".dvc", "tmp", "lock")
    lock.touch()
    assert "nothing stands in the way" in project.succeed("doctor").out, "through the kernel, the file means nothing"
    project.path(".dvc", "config").write_text("[core]\n    analytics = false\n    hardlink_lock = true\n")
    assert "core.hardlink_lock" in line_of(project.run("doctor"), "problem", ".dvc/tmp/lock")
    project.succeed("doctor", "--fix")
    assert not lock.exists()


def test_a_stage_started_by_hand_is_no_orphan(project: Experiment, start: Start) -> None:
    process = hold(project, start)
    outcome = project.succeed("doctor", "--fix")
    assert "started by hand" in line_of(outcome, "info", WHAT)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert "stages at work\n  ok       none" in project.succeed("doctor").out, "a lock's file alone means nothing"


def test_an_engines_command_typed_in_a_terminal_is_no_orphan(project: Experiment) -> None:
    project.path("holder.py").write_text(HOLDER)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.folder)
        os.execv("/bin/bash", ["bash", "-c", f"{sys.executable} holder.py --stage-version 1; true"])
    try:
        wait_for(project.path("ready").exists)
        with project.start("doctor") as doctor:  # a process of its own: psutil lists the terminals once
            outcome = Outcome(0, *doctor.communicate())
        assert "started by hand" in line_of(outcome, "info", WHAT)
    finally:
        kill_session(pid)
        os.waitpid(pid, 0)
        os.close(terminal)


def test_a_suspended_stage(project: Experiment, start: Start) -> None:
    process = hold(project, start)
    process.send_signal(signal.SIGSTOP)
    outcome = project.run("doctor")
    assert outcome.code == 1 and f"kill -CONT {process.pid}" in line_of(outcome, "problem", "suspended")


def test_a_stage_on_another_machine(project: Experiment) -> None:
    lock = project.path(LOCK)
    lock.parent.mkdir(parents=True)
    holder = {"pid": os.getpid(), "host": "node7", "what": WHAT, "started": "2026-11-22T23:58:49+00:00", "done": None}
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(holder) + "\n")
        file.flush()
        assert "on node7" in line_of(project.succeed("doctor", "--fix"), "info", WHAT)


def test_a_lock_that_a_child_of_the_dead_keeps(project: Experiment, start: Start) -> None:
    parent = start(sys.executable, "-c", FORKED)
    parent.wait()
    child = int(project.path("ready").read_text())
    assert f"kill {child}" in line_of(project.run("doctor"), "problem", WHAT, f"process {parent.pid}, which is gone")


def test_unfinished_work(project: Experiment) -> None:
    folder = claim(project, lr=0.002)
    finding = line_of(project.succeed("doctor"), "info", WHAT)
    assert "step 1,000, saved" in finding and "goes on from there" in finding
    assert "8." in finding and "KiB" in finding
    (folder / "owner.json").write_text("{")
    assert "can't be read" in line_of(project.run("doctor"), "problem", "owner.json")
    assert folder.is_dir()


def test_a_trial_and_pieces(project: Experiment) -> None:
    folder = claim(project, lr=0.002)
    for phase, step in (("pretrain", 300), ("finetune", 20)):
        (folder / phase).mkdir()
        (folder / phase / f"state-{step:010d}.safetensors").touch()
    assert "finetune step 20" in line_of(project.succeed("doctor"), WHAT)
    for state in folder.rglob("state-*"):
        state.rename(state.with_name(f"{state.stat().st_ino}.safetensors"))
    assert "4 parts finished" in line_of(project.succeed("doctor"), WHAT)


def test_finished_work_is_one_line(project: Experiment) -> None:
    file = project.path(OUTPUT, "final.safetensors")
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(10_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        Work.claim(OUTPUT, WHAT, {}).keep([OUTPUT])
    finding = line_of(project.succeed("doctor"), "1 finished stage")
    assert finding.startswith("ok") and "KiB" not in finding, "the weights are the results' own"


def test_a_damaged_state(project: Experiment) -> None:
    folder = claim(project, lr=0.002)
    damaged = folder / "state-0000002000.safetensors.damaged"
    damaged.write_bytes(b"x")
    outcome = project.run("doctor")
    assert outcome.code == 1
    assert "goes on from the state before it (step 1,000)" in line_of(outcome, "problem", damaged.name)
    assert "removed it" in line_of(project.succeed("doctor", "--fix"), "fixed", damaged.name)
    assert not damaged.exists() and len(list(folder.glob("state-*"))) == 2


def test_set_aside_work(project: Experiment) -> None:
    claim(project, pretrain={"lr": 0.002, "batch_size": 64}, seed=0)
    claim(project, pretrain={"lr": 0.004, "batch_size": 64}, seed=0)
    (aside,) = project.path(".work", "set-aside", OUTPUT).iterdir()
    finding = line_of(project.succeed("doctor", "--fix"), "set aside")
    assert f"info {WHAT}, step 1,000" in finding and "pretrain.lr was 0.002, is 0.004" in finding
    assert "taken up again when the inputs are those again" in finding
    assert f"rm -r {aside.relative_to(project.folder)}" in finding
    assert len(list(aside.glob("state-*"))) == 2, "unfinished work is never deleted"


def test_what_a_killed_stage_had_built(project: Experiment, start: Start) -> None:
    building, torn = project.path(paths.building(OUTPUT)), claim(project) / "state-0000002000.safetensors.building"
    torn.touch()
    process = hold(project, start)
    assert "half-built outputs\n  ok       none" in project.succeed("doctor", "--fix").out, "it is at work"
    assert (building / "half").exists() and torn.exists()
    process.kill()
    process.wait()
    assert "2 KiB" in line_of(project.succeed("doctor"), "info", str(building.relative_to(project.folder)))
    assert "removed it" in line_of(project.succeed("doctor", "--fix"), "fixed", building.name)
    assert not building.exists() and not torn.exists()


def test_files_from_the_future(project: Experiment) -> None:
    file = project.path("results", "data", "manifest.json")
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (time.time() + 7200,) * 2)
    os.utime(file.parent, (time.time() + 3600,) * 2)
    outcome = project.run("doctor")
    assert outcome.code == 1
    assert "2 files and folders" in line_of(outcome, "problem", "results/data/manifest.json, by 2 h")
    project.succeed("doctor", "--fix")
    assert file.stat().st_mtime == file.parent.stat().st_mtime <= time.time()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.fixture
def small_disk(project: Experiment) -> Iterator[Path]:
    """A results folder on a disk of 1 MiB."""
    folder = project.path("results")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk could be mounted: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@needs_root
def test_a_full_disk(project: Experiment, small_disk: Path) -> None:
    claim(project, lr=1)
    claim(project, lr=2)
    with pytest.raises(OSError) as full, (small_disk / "large").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert full.value.errno == errno.ENOSPC
    outcome = project.run("doctor", "--fix")
    assert outcome.code == 1
    assert "could not be written" in line_of(outcome, "problem", "the disk is full", "make room")
    assert "at least 100 MiB should be" in line_of(outcome, "problem", "results: 0 B free")


@needs_root
def test_a_read_only_disk(project: Experiment, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "mount it writable" in line_of(project.run("doctor"), "problem", "it is read-only")


@needs_root
def test_a_disk_without_inodes(project: Experiment, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m,nr_inodes=500", small_disk], check=True)
    assert "inodes" in line_of(project.run("doctor"), "problem", "more files only")


def test_room_for_three_of_the_largest_state(project: Experiment) -> None:
    state = claim(project, lr=1) / "state-0000001000.safetensors"
    with state.open("wb") as file:  # a hole: it takes no room here
        file.truncate(shutil.disk_usage(project.folder).free // 2)
    finding = line_of(project.run("doctor"), "problem", "3 times the largest saved state")
    assert "May go" not in finding and "can go: remove something else" in finding


def test_what_may_go_is_named(project: Experiment) -> None:
    state = claim(project, lr=1) / "state-0000001000.safetensors"
    with state.open("wb") as file:
        file.truncate(shutil.disk_usage(project.folder).free // 2)
    claim(project, lr=2)
    project.path(".dvc", "cache", "files").mkdir(parents=True)
    project.path(".dvc", "cache", "files", "x").write_bytes(bytes(5000))
    finding = line_of(project.run("doctor"), "problem", "May go")
    assert finding.index("rm -r .work/set-aside") < finding.index("4.88 KiB with dvc gc")


def test_dvcs_cache_may_be_elsewhere(project: Experiment, tmp_path: Path) -> None:
    project.path(".dvc", "config").write_text("[core]\n    analytics = false\n['remote \"x\"']\n    url = s3://b/%x\n")
    project.path(".dvc", "config.local").write_text("[cache]\n    dir = ../../shared\n")
    settings = room.config(project.folder)
    assert room.cache_folder(project.folder, settings).resolve() == tmp_path.parent / "shared"


def test_a_limit_on_the_size_of_files(project: Experiment) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maskdm", "doctor"],
        cwd=project.folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 1 and "ulimit -f" in done.stdout and "Traceback" not in done.stderr


def test_a_folder_that_belongs_to_somebody_else(project: Experiment) -> None:
    folder = project.path("results", "pretrain")
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    obeying = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if obeying and shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and without setpriv that can't be switched off")
    command = [*obeying, sys.executable, "-m", "maskdm", "doctor"]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.code == 1 and "chown" in line_of(outcome, "problem", "may not write to results/pretrain")


def test_a_folder_that_cannot_be_looked_at_is_a_finding(project: Experiment) -> None:
    project.path(".work").write_text("a file in its place")
    outcome = project.run("doctor")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "a file is in its place" in line_of(outcome, "problem", ".work:")


def leave_a_spool(project: Experiment) -> None:
    """What a stage has logged, by a process that has ended."""
    spool = Spool(project.folder, "pretrain-patch-m50-0", f"sqlite:///{project.path('mlflow.db')}")
    spool.append("experiment", name="tiny")
    spool.close()


def test_what_mlflow_has_not_got(project: Experiment) -> None:
    leave_a_spool(project)
    outcome = project.run("doctor")
    assert outcome.code == 1 and "1 run is kept" in line_of(outcome, "problem", "nobody is sending it: maskdm sync")
    (tracking_folder(project.folder) / ERROR).write_text("MLflow at http://h:5000 could not be reached (refused)")
    assert "http://h:5000 could not be reached" in line_of(project.run("doctor"), "problem", "maskdm sync")


@pytest.mark.workflow
def test_what_mlflow_has_not_got_is_sent(project: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    leave_a_spool(project)
    try:
        assert "everything is in MLflow" in line_of(project.succeed("doctor", "--fix"), "fixed", "1 run")
        assert not spools(project.folder) and project.path("mlflow.db").exists()
    finally:
        stop_sender(project.folder)


def test_broken_or_missing_params_are_one_finding(project: Experiment) -> None:
    claim(project, lr=1)
    project.change(seeds="none")
    outcome = project.run("doctor")
    assert outcome.code == 1 and "seeds" in line_of(outcome, "problem", "params.yaml")
    assert WHAT in outcome.out, "the rest is looked at nevertheless"
    project.file.unlink()
    assert "no params.yaml in" in line_of(project.run("doctor"), "problem")


def test_other_versions_than_the_tested_ones(project: Experiment) -> None:
    project.path("requirements.lock").write_text("# pins\ndvc==0.1\nsnakemake==0.2\n")
    finding = line_of(project.succeed("doctor"), "info", "requirements.lock")
    assert "(tested: 0.1)" in finding and "(tested: 0.2)" in finding


def test_help_teaches(project: Experiment) -> None:
    outcome = project.succeed("doctor", "--help")
    assert "examples:" in outcome.out and "--fix" in outcome.out and "exit codes" in outcome.out
