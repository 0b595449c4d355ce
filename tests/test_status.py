"""`maskdm status` and `maskdm verify`: each state, made for real, is shown; each damaged file is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maskdm.config import load_params, paths
from maskdm.config.jobs import Job, Jobs
from tests.conftest import ARM, Experiment, Outcome

OF_ARM = ("--arm", ARM, "--seed", "0")
TRIALS = {"one": {"pretrain.lr": 1e30}, "two": {"pretrain.lr": 2e30}}
HOLDER = """\
import sys, time
from pathlib import Path
from maskdm.base.locks import one_writer
with one_writer(Path(sys.argv[1]), "pretrain"):
    Path("ready").touch()
    time.sleep(300)
"""
Start = Callable[..., subprocess.Popen[bytes]]
Stop = Callable[[subprocess.Popen[str], Callable[[], bool], signal.Signals], Outcome]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start processes in the experiment's folder; they are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def job_of(experiment: Experiment, stage: str, trial: str | None = None) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(experiment.folder)
        return Jobs(load_params()).find(stage, ARM, None if trial else 0, trial)


def work_folder(experiment: Experiment, stage: str, trial: str | None = None) -> Path:
    """Of what params.yaml asks for now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(experiment.folder)
        job = Jobs(load_params()).find(stage, ARM, None if trial else 0, trial)
        return experiment.folder / paths.work(job.output) / job.wanted().key


def states(experiment: Experiment, code: int = 0) -> dict[str, str]:
    """Stage → state, from `--json`; of a stage with several jobs, all states must be the same."""
    return {name: one["state"] for name, one in jobs(experiment, code).items()}


def jobs(experiment: Experiment, code: int = 0) -> dict[str, dict[str, Any]]:
    """Stage, and trial if there is one → what `--json` says."""
    outcome = experiment.run("status", "--json")
    assert outcome.code == code, outcome.err
    return {" ".join(filter(None, (one["stage"], one["trial"]))): one for one in json.loads(outcome.out)["jobs"]}


def text(experiment: Experiment, code: int = 0) -> str:
    outcome = experiment.run("status")
    assert outcome.code == code, outcome.err
    return outcome.out


def last_line(experiment: Experiment, code: int = 0) -> str:
    return text(experiment, code).splitlines()[-1]


def everything(experiment: Experiment) -> dict[str, tuple[int, bytes | None]]:
    """Every path with its time and content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in experiment.folder.rglob("*")
    }


# --- states


def test_missing_before_anything_has_run(tiny: Experiment) -> None:
    tiny.keep_arm(ARM).change(tuning={"trials": {}})
    assert last_line(tiny) == "9 missing; run the same command again, it resumes: snakemake --cores N, or dvc repro"
    assert [file.name for file in tiny.folder.iterdir()] == ["params.yaml"]


def test_done(whole: Experiment) -> None:
    before = everything(whole)
    tables, counts = text(whole).rsplit("\n\n", 1)
    assert counts == "9 done\n"
    assert [line.split() for line in tables.splitlines()] == [
        ["experiment", "prepare", "features", "scale", "choose", "report"],
        ["tiny", *["done"] * 5],
        [],
        ["arm", "seed", "pretrain", "finetune", "sample", "evaluate"],
        [ARM, "0", *["done"] * 4],
    ]
    assert everything(whole) == before


def test_a_failed_stage_with_its_reason_and_log_until_it_is_run_again(shared: Experiment) -> None:
    good = shared.content["pretrain"]["lr"]
    shared.change(pretrain={"lr": 1e30})
    log = shared.path("log")
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "maskdm", "pretrain", *OF_ARM], cwd=shared.folder, stdout=file, stderr=file
        )
    assert done.returncode == 1
    line = next(line for line in text(shared, 1).splitlines() if line.startswith(f"pretrain {ARM} seed 0: failed: "))
    assert "loss" in line and f"log: {log.resolve()}" in line
    found = jobs(shared, 1)["pretrain"]
    assert found["state"] == "failed" and found["details"]["time"].startswith("20")
    assert states(shared, 1)["finetune"] == "missing"
    shared.change(pretrain={"lr": good})
    assert states(shared)["pretrain"] == "missing", "the failure was of other values"


def test_a_running_stage_with_its_progress(shared: Experiment, start: Start) -> None:
    work = work_folder(shared, "pretrain")
    work.mkdir(parents=True)
    (work / "begun.json").write_text("{}")
    note = {"done": 120, "total": 700, "unit": "step", "seconds_left": 12.3}
    (work / "progress.json").write_text(json.dumps({**note, "time": "2020-01-01T00:00:00+00:00"}))
    process = start(sys.executable, "-c", HOLDER, str(job_of(shared, "pretrain").lock))
    wait_for(shared.path("ready").exists)
    details = jobs(shared)["pretrain"]["details"]
    assert details["pid"] == process.pid and "done" not in details, "the progress is of an earlier process"

    (work / "progress.json").write_text(json.dumps({**note, "time": details["since"]}))
    shown = text(shared)
    assert "running 17%" in shown
    assert f"pretrain {ARM} seed 0: running: at step 120 of 700; 12 s left; process {process.pid} on " in shown
    process.kill()
    process.wait()
    assert states(shared)["pretrain"] == "missing", "a lock file alone means nothing"


def wait_for(is_so: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_so():
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError


def test_a_terminated_training_is_resumable(shared: Experiment, stop_when: Stop) -> None:
    shared.change(budget={"unmasked_steps": 200_000}, saving={"every_seconds": 0.01})
    process = shared.start("pretrain", *OF_ARM)
    work = shared.path(".work/results/pretrain")
    outcome = stop_when(process, lambda: any(work.rglob("state-*.safetensors")), signal.SIGTERM)
    assert outcome.code == 143, outcome.err
    found = jobs(shared)["pretrain"]
    assert found["state"] == "resumable"
    done, total = found["details"]["done"], found["details"]["total"]
    assert f"step {done} of {total}" in outcome.err
    shown = text(shared)
    assert f"pretrain {ARM} seed 0: resumable: at step {done} of {total}\n" in shown
    assert f"step {done}/{total}" in shown and "1 resumable, " in shown.splitlines()[-1]


def test_a_trial_is_resumable_at_the_step_of_its_training_stage(shared: Experiment) -> None:
    shared.change(tuning={"trials": TRIALS})
    for name in ("pretrain/state-0000000009.safetensors", "finetune/state-0000000002.safetensors"):
        file = work_folder(shared, "tune", "one") / name
        file.parent.mkdir(parents=True)
        file.touch()
    assert f"tune {ARM} trial one: resumable: at finetune step 2 of " in text(shared)


def test_out_of_date_says_what_differs(whole: Experiment) -> None:
    whole.change(finetune={"lr": 0.004})
    shown = text(whole)
    output = paths.finetune(ARM, 0)
    named = ", ".join(f"{stage} {ARM} seed 0" for stage in ("finetune", "sample", "evaluate"))
    assert f"{named}: out of date: {output} is out of date: finetune.lr was 0.002, is 0.004\n" in shown
    assert shown.splitlines()[-1].startswith("5 done, 4 out of date; run the same command again, it resumes: ")
    found = jobs(whole)
    assert found["pretrain"]["state"] == "done"
    assert str(output) in found["evaluate"]["details"]["reason"]


def test_an_output_that_lacks_a_file_is_out_of_date(whole: Experiment) -> None:
    whole.path(str(paths.pretrain(ARM, 0)), "curve.csv").unlink()
    assert f"{paths.pretrain(ARM, 0) / 'curve.csv'} is missing" in text(whole)


def test_a_tuned_arm_before_choosing(shared: Experiment) -> None:
    shared.change(tuning={"trials": TRIALS})
    found = states(shared)
    assert found["tune one"] == "missing" and found["choose"] == "out of date"
    assert {found[stage] for stage in ("pretrain", "finetune", "sample", "evaluate")} == {"after tuning"}
    assert ["tune", "one", "two"] in [line.split() for line in text(shared).splitlines()]


def test_an_arm_whose_trials_have_all_failed(shared: Experiment) -> None:
    shared.change(tuning={"trials": TRIALS})
    for trial in TRIALS:
        shared.try_values(trial)
    shared.succeed("choose")
    found = states(shared, 1)
    assert found["tune one"] == "done" and found["pretrain"] == "failed" and found["finetune"] == "missing"
    assert f"every trial of arm {ARM} has failed" in text(shared, 1)


def test_a_damaged_choice(shared: Experiment) -> None:
    shared.change(tuning={"trials": TRIALS})
    for trial in TRIALS:
        shared.try_values(trial)
    shared.succeed("choose")
    flip(shared.path(str(paths.chosen(ARM))))
    assert "the checksum differs" in text(shared, 1)


# --- problems


def rwlock(experiment: Experiment, content: str) -> Path:
    file = experiment.path(".dvc", "tmp", "rwlock")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    return file


def entries(pid: int) -> str:
    entry = {"pid": pid, "cmd": "/usr/bin/dvc repro"}
    return json.dumps({"write": {"/x/out": entry}, "read": {"/x/in": [entry]}})


def test_a_lock_of_dvcs_whose_pid_is_another_process_by_now(tiny: Experiment, start: Start) -> None:
    pid = start("sleep", "300").pid
    rwlock(tiny, entries(pid))
    line = next(line for line in text(tiny, 1).splitlines() if line.startswith("problem: "))
    assert f"names process {pid}, which is not DVC, so" in line and line.endswith(": rm .dvc/tmp/rwlock")


def test_a_lock_of_dvcs_whose_process_is_a_zombie(tiny: Experiment) -> None:
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        rwlock(tiny, entries(zombie.pid))
        assert f"names process {zombie.pid}, which is not DVC" in text(tiny, 1)


def test_a_lock_of_dvcs_that_is_no_problem(tiny: Experiment, start: Start) -> None:
    file = rwlock(tiny, entries(2**22 + 1))  # above every pid: DVC drops it by itself
    assert "problem: " not in text(tiny)
    file.write_text(json.dumps({"write": {}, "read": {}}))
    assert "problem: " not in text(tiny)
    tiny.path("dvc").write_text("import time; time.sleep(300)")
    file.write_text(entries(start(sys.executable, "dvc", "repro").pid))
    assert "problem: " not in text(tiny)


@pytest.mark.parametrize("content", ["", '{"write": {'])
def test_a_torn_lock_of_dvcs_is_seen_from_below_the_project(tiny: Experiment, content: str) -> None:
    file = rwlock(tiny, content)
    folder = tiny.path("experiments", "mine")
    folder.mkdir(parents=True)
    tiny.path("Snakefile").touch()
    shutil.copyfile(tiny.file, folder / "params.yaml")
    shown = text(Experiment(folder), 1)
    assert "problem: ../../.dvc/tmp/rwlock is incomplete" in shown and ": rm ../../.dvc/tmp/rwlock\n" in shown
    assert "snakemake -s ../../Snakefile --cores N" in shown
    file.unlink()
    assert "problem: " not in text(Experiment(folder))


def test_damaged_files_and_a_full_disk(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(".work/results/pretrain/x/state-0000000001.safetensors.damaged")
    tiny.path(str(file)).parent.mkdir(parents=True)
    tiny.path(str(file)).touch()
    assert f"to remove it: rm {file}\n" in text(tiny, 1)
    tiny.path(str(file)).unlink()
    usage = shutil.disk_usage("/")._replace(free=2**29)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    outcome = tiny.run("status", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["problems"] == ["the disk is nearly full: 512 MiB are free; remove files"]


# --- the command


def test_json(shared: Experiment) -> None:
    content = json.loads(shared.succeed("status", "--json").out)
    assert content["experiment"] == "tiny" and content["problems"] == []
    expected: dict[str, Any] = {
        "stage": "prepare",
        "arm": None,
        "seed": None,
        "trial": None,
        "state": "done",
        "details": {},
    }
    assert content["jobs"][0] == expected
    assert {**expected, "stage": "sample", "arm": ARM, "seed": 0, "state": "missing"} in content["jobs"]


def test_watch_shows_it_again_until_ctrl_c(tiny: Experiment, stop_when: Stop) -> None:
    shown: list[str] = []
    process = tiny.start("status", "--watch", "0.05")
    assert process.stdout is not None

    def is_shown_twice() -> bool:
        assert process.stdout is not None
        shown.append(process.stdout.readline())
        return sum("missing; run the same command" in line for line in shown) == 2

    outcome = stop_when(process, is_shown_twice, signal.SIGINT)
    assert outcome.code == 0 and outcome.err == ""


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf"])
def test_watch_refuses_other_than_positive_seconds(tiny: Experiment, seconds: str) -> None:
    outcome = tiny.run("status", f"--watch={seconds}")
    assert outcome.code == 2 and "expected seconds above 0" in outcome.err


@pytest.mark.parametrize("command", ["status", "verify"])
def test_bad_params(tiny: Experiment, command: str) -> None:
    tiny.change(model={"depth": 4})
    outcome = tiny.run(command)
    assert outcome.code == 2 and "depth 4 is even" in outcome.err


# --- verify


def flip(file: Path) -> None:
    """Change a byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_verify_of_intact_outputs(whole: Experiment) -> None:
    outcome = whole.succeed("verify")
    outputs, files = (int(word) for word in outcome.out.split() if word.isdigit())
    assert outcome.out == f"{outputs} outputs, {files} files: all are intact\n"
    assert outputs == 9 and files > 20
    whole.change(finetune={"lr": 0.004})
    assert whole.succeed("verify").out == outcome.out, "out of date, but whole"


@pytest.mark.parametrize(
    ("stage", "name", "says"),
    [
        ("pretrain", "checkpoint.safetensors", "its sha256 differs"),
        ("pretrain", "stamp.json", "has no stamp that fits its content"),
        ("evaluate", "", "has no stamp that fits its content"),
    ],
)
def test_verify_finds_a_flipped_byte(whole: Experiment, stage: str, name: str, says: str) -> None:
    output = job_of(whole, stage).output
    flip(whole.folder / output / name if name else whole.folder / output)
    outcome = whole.run("verify")
    assert outcome.code == 1
    [line] = outcome.out.splitlines()
    assert line.startswith(f"damaged: {output}") and says in line
    assert line.endswith(f"; to make it again: maskdm {stage} --arm {ARM} --seed 0 --force")
    if name == "checkpoint.safetensors":
        assert states(whole)["pretrain"] == "done", "status compares sizes alone"


def test_verify_finds_cut_and_missing_files_of_an_output(whole: Experiment) -> None:
    output = paths.pretrain(ARM, 0)
    with whole.path(str(output), "checkpoint.safetensors").open("ab") as file:
        file.truncate(100)
    whole.path(str(output), "curve.csv").unlink()
    outcome = whole.run("verify")
    assert outcome.code == 1
    [line] = outcome.out.splitlines()
    assert f"{output / 'checkpoint.safetensors'} is not the file that was written" in line
    assert f"{output / 'curve.csv'} is missing" in line


def test_the_command_that_verify_names_repairs_the_output(whole: Experiment) -> None:
    flip(whole.path(str(paths.pretrain(ARM, 0)), "checkpoint.safetensors"))
    command = whole.run("verify").out.strip().partition("to make it again: maskdm ")[2]
    whole.succeed(*command.split())
    whole.succeed("verify")
    assert set(states(whole).values()) - {"done"} <= {"out of date"}
    assert states(whole)["evaluate"] == "done"


@pytest.mark.parametrize(("number", "code", "says"), [(5, 1, "can't be read"), (13, 1, "cannot read")])
def test_verify_of_an_unreadable_file(
    whole: Experiment, monkeypatch: pytest.MonkeyPatch, number: int, code: int, says: str
) -> None:
    def refuse(path: Path) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("maskdm.config.stamps.file_sha256", refuse)
    outcome = whole.run("verify")
    assert outcome.code == code
    assert says in (outcome.out if number == 5 else outcome.err)
    assert ("damaged" in outcome.out) == (number == 5)
