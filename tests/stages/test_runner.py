"""Stages are idempotent: what is up to date, what comes back, what a failure or a kill at any moment leaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskdm.base.checksums import checked
from maskdm.base.locks import one_writer
from maskdm.base.publishing import publish_description
from maskdm.config import load_params, paths
from maskdm.config.jobs import ARM_STAGES, Job, Jobs
from maskdm.config.stamps import Stamp, damaged_files, missing_files, read_stamp, stamp_folder, stamped
from tests.conftest import ARM, TINY, Experiment, Outcome
from tests.factories import no_file_larger_than

OF_ARM = ["--arm", ARM, "--seed", "0"]
STAGES = {
    "prepare": [],
    "features": [],
    "scale": [],
    "choose": [],
    "pretrain": OF_ARM,
    "finetune": OF_ARM,
    "sample": OF_ARM,
    "evaluate": OF_ARM,
    "report": [],
}
Change = dict[str, dict[str, Any]]
# What one stage alone has to be done again for, of those before it nothing.
CHANGES: dict[str, Change] = {
    "prepare": {"dataset": {"limit": 150}},
    "features": {"evaluation": {"classifier_epochs": 1}},
    "scale": {"evaluation": {"kid_subsets": 5}},
    "choose": {"tuning": {"metric": "fid"}},
    "pretrain": {"pretrain": {"lr": 1e-3}},
    "finetune": {"finetune": {"lr": 1e-3}},
    "sample": {"sampling": {"num_steps": 3}},
}


KEPT = {"lock", "previous", "record.json"}  # of the work folder when nothing is unfinished


def of(stage: str) -> list[str]:
    return [stage, *STAGES[stage]]


def job_of(experiment: Experiment, stage: str) -> Job:
    return experiment.job(stage, ARM, 0) if STAGES[stage] else experiment.job(stage)


def output_of(experiment: Experiment, stage: str) -> Path:
    return experiment.path(str(job_of(experiment, stage).output))


def record_of(experiment: Experiment, stage: str) -> dict[str, Any]:
    content = json.loads(experiment.path(str(job_of(experiment, stage).record)).read_text(encoding="utf-8"))
    record: dict[str, Any] = checked(content)
    return record


def work_of(experiment: Experiment, stage: str) -> Path:
    return experiment.path(str(paths.work(job_of(experiment, stage).output)))


def key_of(experiment: Experiment, stage: str) -> str:
    """Of what the stage would make now."""
    with contextlib.chdir(experiment.folder):
        return job_of(experiment, stage).wanted().key


def why_outdated(experiment: Experiment, stage: str) -> str:
    with contextlib.chdir(experiment.folder):
        return job_of(experiment, stage).why_outdated()


def made(experiment: Experiment, stage: str) -> dict[str, str]:
    """The hashes of an output and of its record."""
    job = job_of(experiment, stage)
    return experiment.hashes(str(job.output)) | experiment.hashes(str(job.record))


def everything(experiment: Experiment) -> dict[str, tuple[int, str]]:
    """Every file, with its time and content; folders with their times."""
    found = sorted(experiment.folder.rglob("*"))
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in found
    }


def assert_up_to_date(outcome: Outcome) -> None:
    assert (outcome.code, "up to date" in outcome.out) == (0, True), outcome
    assert outcome.err == ""


def assert_refused(outcome: Outcome, *says: str) -> None:
    """The stage failed with one message, which holds all of `says`."""
    assert outcome.code == 1, outcome
    assert outcome.err.count("maskdm: error: ") == 1 and "Traceback" not in outcome.err
    for part in says:
        assert part in outcome.err


def assert_whole(experiment: Experiment, stage: str) -> None:
    """An output that is there has all that its stamp says, and its own record."""
    job = job_of(experiment, stage)
    with contextlib.chdir(experiment.folder):
        if not job.output.exists():
            return
        stamp = read_stamp(job.output)
        assert stamp is not None
        assert not missing_files(job.output, stamp) and not list(damaged_files(job.output, stamp))
    assert record_of(experiment, stage)["key"] == stamp.key


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a stage's work be an error."""

    def forbid(stage: str) -> None:
        module = importlib.import_module(f"maskdm.stages.{stage}")
        monkeypatch.setattr(module, "run", lambda *_: pytest.fail(f"{stage} has worked"))

    return forbid


# --- stamps ---------------------------------------------------------------------------------------------------

STAMP = Stamp("pretrain", 7, {"pretrain": {"lr": 0.1, "batch_size": 8}}, {"results/data": "abc"})


def test_the_key_depends_on_stage_version_values_and_inputs_alone() -> None:
    same = Stamp("pretrain", 7, {"pretrain": {"batch_size": 8, "lr": 0.1}}, {"results/data": "abc"}, "x", {"a": {}})
    assert same.key == STAMP.key
    others = [
        Stamp("finetune", 7, STAMP.values, STAMP.inputs),
        Stamp("pretrain", 8, STAMP.values, STAMP.inputs),
        Stamp("pretrain", 7, {"pretrain": {"lr": 0.1, "batch_size": 9}}, STAMP.inputs),
        Stamp("pretrain", 7, STAMP.values, {"results/data": "abd"}),
        Stamp("pretrain", 7, STAMP.values, {"results/data": None}),
    ]
    assert len({STAMP.key, *(other.key for other in others)}) == 1 + len(others)


def test_differences_are_named_by_the_keys_of_params() -> None:
    other = Stamp("pretrain", 8, {"pretrain": {"lr": 0.2, "batch_size": 8}}, {"results/data": "abd"})
    said = "pretrain.lr was 0.1, is 0.2; version was 7, is 8; results/data has changed"
    assert STAMP.differences(other) == said
    many = Stamp("pretrain", 8, {"pretrain": {"lr": 0.2, "batch_size": 9}, "arm": "x" * 99}, {"results/data": "abd"})
    said = STAMP.differences(many)
    assert said.endswith(" and 2 more") and said.count(" was ") == 3
    assert len(said) < 200
    assert STAMP.differences(STAMP) == ""


def test_every_flipped_byte_of_a_single_file_is_detected(tmp_path: Path) -> None:
    file, content = tmp_path / "scale.json", {"floor": {"fid": 1.25}, "protocol": [1, None, "ε"]}
    publish_description(file, stamped(content, STAMP))
    stamp, whole = read_stamp(file), file.read_bytes()
    assert stamp is not None and stamp.key == STAMP.key
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_stamp(file) is None, place


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"{}", b'{"stamp": {}}', b"\xff", b"[" * 10**5])
def test_a_damaged_or_missing_stamp_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "stamp.json").write_bytes(content)
    for output in (tmp_path / "file.json", tmp_path / "folder", tmp_path / "nothing", tmp_path):
        assert read_stamp(output) is None


def test_missing_and_damaged_files_of_a_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a", "inner/b"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    stamp_folder(tmp_path, STAMP)
    stamp = read_stamp(tmp_path)
    assert stamp is not None and set(stamp.files) == {"a", "inner/b"}
    assert (missing_files(tmp_path, stamp), list(damaged_files(tmp_path, stamp))) == ("", [])
    (tmp_path / "a").write_text("A", encoding="utf-8")
    assert missing_files(tmp_path, stamp) == "", "sizes alone are looked at"
    assert list(damaged_files(tmp_path, stamp)) == [
        f"{tmp_path / 'a'} is not the file that was written: its sha256 differs"
    ]
    (tmp_path / "a").write_text("longer", encoding="utf-8")
    assert missing_files(tmp_path, stamp) == f"{tmp_path / 'a'} has 6 bytes, expected 1"
    (tmp_path / "inner/b").unlink()
    assert [line.split(" is ")[1] for line in damaged_files(tmp_path, stamp)] == [
        "not the file that was written: its sha256 differs",
        "missing",
    ]


# --- jobs -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["given", "tuned"])
def jobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Of an experiment of which nothing was made."""
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    content["tuning"]["trials"] = {} if request.param == "given" else content["tuning"]["trials"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**content, "seeds": [0, 1]}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return Jobs(load_params(Path("params.yaml")))


def test_every_job_comes_after_its_inputs(jobs: Jobs) -> None:
    seen: set[Job] = set()
    for job in jobs.all():
        if not (jobs.params.tuning.enabled and job.stage in (*ARM_STAGES, "report")):  # need the choice to be known
            assert {one.job for one in job.inputs if one.job is not None} <= seen
        seen.add(job)
    trials = 3 * len(jobs.params.tuning.trials)
    assert len(seen) == 5 + trials + 4 * 3 * 2


def test_no_two_jobs_share_a_path(jobs: Jobs) -> None:
    """Nor does its work folder: it holds a folder for each key, and of what lies there any may be removed."""
    every = list(jobs.all())
    for places in ([job.output for job in every], [job.record for job in every], [paths.work(j.output) for j in every]):
        assert len(set(places)) == len(every)
        assert not [(a, b) for a in places for b in places if a != b and a.is_relative_to(b)]


def test_jobs_cache_what_they_find_until_forget_is_called(one_arm: Experiment) -> None:
    with contextlib.chdir(one_arm.folder):
        jobs = Jobs(load_params(Path("params.yaml")))
        job = jobs.find("pretrain", ARM, 0)
        assert job is jobs.find("pretrain", ARM, 0)
        assert job.why_outdated() == ""
        shutil.rmtree(job.output)
        assert job.why_outdated() == ""
        jobs.forget()
        assert jobs.find("pretrain", ARM, 0).why_outdated() == f"{job.output} is missing"


# --- up to date -----------------------------------------------------------------------------------------------


def test_an_up_to_date_stage_says_so_and_touches_no_file(whole_once: Experiment) -> None:
    before = everything(whole_once)
    for stage in STAGES:
        outcome = whole_once.run(*of(stage))
        assert_up_to_date(outcome)
        assert outcome.out == f"{job_of(whole_once, stage).title}: up to date\n"
    assert everything(whole_once) == before


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_force_makes_the_same_bytes_again(one_arm: Experiment, stage: str) -> None:
    place = str(job_of(one_arm, stage).output)
    before, first = one_arm.hashes(place), record_of(one_arm, stage)
    inode = output_of(one_arm, stage).stat().st_ino
    one_arm.succeed(*of(stage), "--force")
    again = record_of(one_arm, stage)
    assert one_arm.hashes(place) == before
    assert output_of(one_arm, stage).stat().st_ino != inode, "written anew"
    assert again["id"] != first["id"] and (again["starts"], again["key"]) == (1, first["key"])
    assert {path.name for path in work_of(one_arm, stage).iterdir()} <= KEPT
    for later in STAGES:
        if later != "report":
            assert_up_to_date(one_arm.run(*of(later)))


@pytest.mark.parametrize(
    "change",
    [
        {"compute": {"threads": 2}},
        {"saving": {"every_seconds": 7.0}},
        {"pretrain": {"micro_batch_size": 16}},
        {"data": {"device_resident": False}},
        {"compute": {"attention": "plain"}},
    ],
    ids=str,
)
def test_values_that_change_no_result_make_nothing_out_of_date(whole: Experiment, change: Change) -> None:
    whole.change(**change)
    for stage in STAGES:
        if stage != "report" or "pretrain" not in change:  # it shows the values as given
            assert_up_to_date(whole.run(*of(stage)))


def test_another_arm_does_not_make_this_one_out_of_date(one_arm: Experiment) -> None:
    arms = {ARM: {"strategy": "patch", "mask_rate": 0.5}}
    for other in ({"strategy": "none"}, {"strategy": "none", "finetune": {"lr": 1e-4}}):
        one_arm.change(arms={**arms, "scratch": other})
        for stage in ("prepare", "features", "scale", "pretrain", "finetune", "sample", "evaluate"):
            assert_up_to_date(one_arm.run(*of(stage)))
        one_arm.succeed("pretrain", "--arm", "scratch", "--seed", "0")


def test_an_input_remade_with_equal_content_makes_no_later_stage_out_of_date(one_arm: Experiment) -> None:
    outcome = one_arm.change(dataset={"max_pixels": 1000}).run("prepare")
    assert "dataset.max_pixels was 64000000, is 1000" in outcome.err and outcome.out == ""
    for stage in ("features", "scale", "choose", "pretrain", "finetune", "sample", "evaluate"):
        assert_up_to_date(one_arm.run(*of(stage)))


def test_the_note_beside_the_trials_is_written_again(one_arm: Experiment) -> None:
    note = one_arm.path("results/tuning/README.md")
    note.unlink()
    assert_up_to_date(one_arm.run("prepare"))
    assert note.is_file()


def test_leftover_work_of_an_up_to_date_stage_is_removed_unless_its_lock_is_held(one_arm: Experiment) -> None:
    """A process that was killed just before its end has left it; one that was started with --force needs it."""
    begun = work_of(one_arm, "pretrain") / key_of(one_arm, "pretrain") / "begun.json"
    begun.parent.mkdir()
    begun.write_text("{}", encoding="utf-8")
    with one_writer(one_arm.path(str(job_of(one_arm, "pretrain").lock)), "pretrain"):
        assert_up_to_date(one_arm.run(*of("pretrain")))
        assert begun.exists()
    assert_up_to_date(one_arm.run(*of("pretrain")))
    assert not begun.parent.exists()


# --- back and forth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", CHANGES)
def test_going_back_to_earlier_values_restores_output_and_record_without_work(
    one_arm: Experiment, no_work: Callable[[str], None], stage: str
) -> None:
    params = one_arm.file.read_text(encoding="utf-8")
    changed = yaml.safe_load(params)
    for section, values in CHANGES[stage].items():
        changed[section] = {**changed[section], **values}
    first = made(one_arm, stage)
    outcome = one_arm.rewrite(changed).succeed(*of(stage))
    assert f"{job_of(one_arm, stage).title}: {job_of(one_arm, stage).output} is out of date: " in outcome.err
    second = made(one_arm, stage)
    assert first != second
    no_work(stage)
    for content, expected in ((yaml.safe_load(params), first), (changed, second), (yaml.safe_load(params), first)):
        outcome = one_arm.rewrite(content).succeed(*of(stage))
        assert "made before with the same values and inputs; it is back in " in outcome.out
        assert made(one_arm, stage) == expected
        assert_up_to_date(one_arm.run(*of(stage)))
    for later in STAGES:
        if later != "report":
            assert_up_to_date(one_arm.run(*of(later)))


def set_lr(experiment: Experiment, lr: float) -> str:
    """Pretrain with a learning rate; what it said."""
    return experiment.change(pretrain={"lr": lr}).succeed(*of("pretrain")).out


A, B, C = 2e-3, 1e-3, 5e-4


def previous(experiment: Experiment) -> list[str]:
    folder = work_of(experiment, "pretrain") / "previous"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_one_previous_output_is_kept(one_arm: Experiment) -> None:
    keys = {}
    for lr in (A, B, C):
        set_lr(one_arm, lr)
        keys[lr] = key_of(one_arm, "pretrain")
    assert previous(one_arm) == [keys[B]]
    assert "back" not in set_lr(one_arm, A), "made again"
    assert previous(one_arm) == [keys[C]]
    assert "back" in set_lr(one_arm, C)
    assert previous(one_arm) == [keys[A]]


@pytest.mark.parametrize("case", ["by force", "a file is missing", "the output is missing", "the record is missing"])
def test_remaking_the_present_output_keeps_the_previous_one(one_arm: Experiment, case: str) -> None:
    set_lr(one_arm, B)
    output = output_of(one_arm, "pretrain")
    if case == "a file is missing":
        (output / "curve.csv").unlink()
    elif case == "the output is missing":
        shutil.rmtree(output)
    elif case == "the record is missing":
        one_arm.path(str(job_of(one_arm, "pretrain").record)).unlink()
    one_arm.succeed(*of("pretrain"), *(["--force"] if case == "by force" else []))
    assert len(previous(one_arm)) == 1
    assert "back" in set_lr(one_arm, A)


def test_a_damaged_output_does_not_replace_the_previous_one(one_arm: Experiment) -> None:
    set_lr(one_arm, B)
    (output_of(one_arm, "pretrain") / "curve.csv").unlink()
    set_lr(one_arm, C)
    assert "back" in set_lr(one_arm, A)


@pytest.mark.parametrize("damage", ["a file is cut", "no record", "no stamp", "another key"])
def test_a_damaged_previous_output_is_not_restored(one_arm: Experiment, damage: str) -> None:
    before = one_arm.hashes(f"results/pretrain/{ARM}")
    set_lr(one_arm, B)
    kept = work_of(one_arm, "pretrain") / "previous" / previous(one_arm)[0]
    if damage == "a file is cut":
        (kept / "output" / "curve.csv").write_text("step", encoding="utf-8")
    elif damage == "no record":
        (kept / "record.json").unlink()
    elif damage == "no stamp":
        (kept / "output" / "stamp.json").unlink()
    else:
        shutil.copy(output_of(one_arm, "pretrain") / "stamp.json", kept / "output")
    assert "back" not in set_lr(one_arm, A)
    assert one_arm.hashes(f"results/pretrain/{ARM}") == before


# --- what is made again ---------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


DAMAGES: dict[str, tuple[str, Callable[[Experiment], object], str]] = {
    "a folder is gone": ("pretrain", lambda e: shutil.rmtree(output_of(e, "pretrain")), ""),
    "a file is gone": ("scale", lambda e: output_of(e, "scale").unlink(), ""),
    "a file in a folder is cut": (
        "pretrain",
        lambda e: cut(output_of(e, "pretrain") / "checkpoint.safetensors"),
        "checkpoint.safetensors has 9",
    ),
    "a file in a folder is gone": (
        "pretrain",
        lambda e: (output_of(e, "pretrain") / "curve.csv").unlink(),
        "curve.csv is missing",
    ),
    "a stamp is gone": ("pretrain", lambda e: (output_of(e, "pretrain") / "stamp.json").unlink(), "no stamp says"),
    "a stamp is flipped": ("pretrain", lambda e: flip(output_of(e, "pretrain") / "stamp.json"), "is damaged or of"),
    "a file is cut": ("scale", lambda e: cut(output_of(e, "scale")), "is damaged or of"),
    "a file is flipped": ("scale", lambda e: flip(output_of(e, "scale")), "is damaged or of"),
    "a file is a folder": (
        "scale",
        lambda e: (output_of(e, "scale").unlink(), output_of(e, "scale").mkdir()),
        "is damaged or of",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_missing_or_visibly_damaged_outputs_are_made_again(one_arm: Experiment, case: str) -> None:
    stage, damage, says = DAMAGES[case]
    place = str(job_of(one_arm, stage).output)
    before = one_arm.hashes(place)
    damage(one_arm)
    outcome = one_arm.succeed(*of(stage))
    assert "up to date" not in outcome.out
    assert says in outcome.err
    assert one_arm.hashes(place) == before
    assert_whole(one_arm, stage)
    for later in STAGES:
        if later != "report":
            assert_up_to_date(one_arm.run(*of(later)))


@pytest.mark.parametrize("stage", ["pretrain", "scale"])
def test_a_lost_record_is_written_again_from_its_copy(
    one_arm: Experiment, no_work: Callable[[str], None], stage: str
) -> None:
    before = made(one_arm, stage)
    one_arm.path(str(job_of(one_arm, stage).record)).unlink()
    no_work(stage)
    assert_up_to_date(one_arm.run(*of(stage)))
    assert made(one_arm, stage) == before


@pytest.mark.parametrize("copy", ["gone", "cut", "of another output"])
def test_an_output_without_a_record_or_its_copy_is_made_again(one_arm: Experiment, copy: str) -> None:
    """What it took, and where, is a part of the result."""
    place = f"results/pretrain/{ARM}"
    kept = work_of(one_arm, "pretrain") / "record.json"
    of_another = work_of(one_arm, "finetune") / "record.json"
    before = one_arm.hashes(place)
    one_arm.path(str(job_of(one_arm, "pretrain").record)).unlink()
    if copy == "gone":
        kept.unlink()
    else:
        kept.write_bytes(of_another.read_bytes() if copy == "of another output" else kept.read_bytes()[:-9])
    outcome = one_arm.succeed(*of("pretrain"))
    assert f"results/records/pretrain-{ARM}-seed-0.json is missing" in outcome.err and outcome.out == ""
    assert one_arm.hashes(place) == before
    assert_whole(one_arm, "pretrain")


def test_a_flipped_byte_in_a_folder_is_found_by_hashing_every_file(one_arm: Experiment) -> None:
    """Not by a stage: hashing a dataset of hundreds of GB takes minutes."""
    file = output_of(one_arm, "pretrain") / "checkpoint.safetensors"
    flip(file)
    assert_up_to_date(one_arm.run(*of("pretrain")))
    stamp = read_stamp(file.parent)
    assert stamp is not None
    assert list(damaged_files(file.parent, stamp)) == [f"{file} is not the file that was written: its sha256 differs"]
    assert_refused(one_arm.run(*of("finetune"), "--force"), "checkpoint.safetensors", "Delete it and run the stage")


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["finetune", "sample", "evaluate"])
def test_an_outdated_input_is_refused_however_many_stages_earlier(one_arm: Experiment, stage: str) -> None:
    before = everything(one_arm.change(pretrain={"lr": B}))
    assert_refused(
        one_arm.run(*of(stage)),
        f"results/pretrain/{ARM}/seed-0 is out of date: pretrain.lr was 0.002, is 0.001; ",
        f"run first: maskdm pretrain --arm {ARM} --seed 0   (or everything: dvc repro)",
    )
    assert everything(one_arm) == before


@pytest.mark.parametrize("stage", ["finetune", "sample", "evaluate"])
def test_a_missing_input_is_refused_however_many_stages_earlier(one_arm: Experiment, stage: str) -> None:
    shutil.rmtree(output_of(one_arm, "pretrain"))
    before = everything(one_arm)
    says = f"results/pretrain/{ARM}/seed-0 is missing; run first: maskdm pretrain --arm {ARM} --seed 0 "
    assert_refused(one_arm.run(*of(stage)), says)
    assert_refused(one_arm.run(*of(stage), "--force"), says)
    assert everything(one_arm) == before


def test_following_the_commands_in_refusals_finishes_the_pipeline(one_arm: Experiment) -> None:
    one_arm.change(pretrain={"lr": B}, evaluation={"classifier_epochs": 1}, dataset={"limit": 190})
    done = []
    while (outcome := one_arm.run(*of("evaluate"))).code:
        assert len(done) < 8
        command = outcome.err.split("run first: maskdm ")[1].split("   (or")[0]
        done.append(command.split()[0])
        one_arm.succeed(*command.split())
    assert sorted(done) == sorted(["prepare", "features", "scale", "pretrain", "finetune", "sample"])


# --- failures -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing(owner: Any, name: str, at: int, code: int, times: int = 1) -> Iterator[list[int]]:
    """Let the call of a number fail; yields the numbers of all calls."""
    function, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if at <= calls[-1] < at + times:
            raise OSError(code, os.strerror(code))
        return function(*arguments, **options)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, function)


def failures_of(experiment: Experiment, stage: str) -> list[dict[str, Any]]:
    files = work_of(experiment, stage).glob("*/failed.json")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_a_failed_stage_leaves_the_old_output_and_says_why_until_it_succeeds(one_arm: Experiment) -> None:
    before, samples = made(one_arm, "evaluate"), output_of(one_arm, "sample") / "milestone-1.000.npy"
    whole = samples.read_bytes()
    samples.write_bytes(b"no array".ljust(len(whole)))
    assert_refused(one_arm.run(*of("evaluate"), "--force"), "milestone-1.000.npy can't be read")
    assert made(one_arm, "evaluate") == before
    (failure,) = failures_of(one_arm, "evaluate")
    assert failure["reason"].startswith(f"{samples.relative_to(one_arm.folder)} can't be read")
    assert (failure["host"], failure["pid"]) == (socket.gethostname(), os.getpid())
    samples.write_bytes(whole)
    one_arm.succeed(*of("evaluate"), "--force")
    assert failures_of(one_arm, "evaluate") == []
    assert record_of(one_arm, "evaluate")["starts"] == 2
    assert_whole(one_arm, "evaluate")


def test_a_crash_is_recorded_as_a_failure_and_a_signal_is_not(
    one_arm: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = made(one_arm, "evaluate")
    for error, reason in ((IndexError("no such"), "IndexError: no such"), (KeyboardInterrupt(), None)):
        with monkeypatch.context() as patched:

            def fail(*_: Any, error: BaseException = error) -> None:
                raise error

            patched.setattr("maskdm.stages.evaluate.run", fail)
            with contextlib.suppress(IndexError):
                assert one_arm.run(*of("evaluate"), "--force").code == 130
        assert [failure["reason"] for failure in failures_of(one_arm, "evaluate")] == ([reason] if reason else [])
        assert made(one_arm, "evaluate") == before


def test_the_log_of_a_failure_is_the_file_that_the_messages_go_to(one_arm: Experiment) -> None:
    cut(output_of(one_arm, "sample") / "milestone-1.000.npy")  # so that the stage before fails
    (output_of(one_arm, "finetune") / "milestone-1.000.safetensors").write_bytes(
        b"\x80" * (output_of(one_arm, "finetune") / "milestone-1.000.safetensors").stat().st_size
    )
    log = one_arm.path("sample.log")
    with log.open("wb") as file:
        command = [sys.executable, "-m", "maskdm", *of("sample")]
        assert subprocess.run(command, cwd=one_arm.folder, stderr=file, stdout=file, check=False).returncode == 1
    (failure,) = failures_of(one_arm, "sample")
    assert failure["log"] == str(log)
    assert failure["reason"] in log.read_text(encoding="utf-8")


def interrupted_at(experiment: Experiment, monkeypatch: pytest.MonkeyPatch, lr: float, step: int = 8) -> str:
    """Pretrain until a step at which the state was saved; what it said."""
    from maskdm.training import trainer

    row_of = trainer.Progress.update_to

    def interrupt(self: Any, done: int, note: str = "") -> None:
        if done > step:
            raise KeyboardInterrupt
        row_of(self, done, note)

    experiment.change(saving={"every_seconds": 1e6, "every_steps": 4}, training={"log_every": 1}, pretrain={"lr": lr})
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Progress, "update_to", interrupt)
        outcome = experiment.run(*of("pretrain"))
    assert outcome.code == 130
    return outcome.out


def test_unfinished_work_of_other_values_is_kept_and_resumed(
    one_arm: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {}
    for lr in (A, B, C):
        interrupted_at(one_arm, monkeypatch, lr)
        keys[lr] = key_of(one_arm, "pretrain")
        os.utime(work_of(one_arm, "pretrain") / keys[lr] / "begun.json", (len(keys), len(keys)))
    unfinished = {path.parent.name for path in work_of(one_arm, "pretrain").glob("*/begun.json")}
    assert unfinished == {keys[B], keys[C]}, "of the last two"
    assert "resuming from step 8\n" in set_lr(one_arm, B)
    assert record_of(one_arm, "pretrain")["starts"] == 2
    assert "resuming from step 8\n" in set_lr(one_arm, C)
    assert "going on" not in set_lr(one_arm, A)
    assert not list(work_of(one_arm, "pretrain").glob("*/begun.json"))


def test_interrupted_work_ends_as_if_uninterrupted(one_arm: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(one_arm, monkeypatch, A)
    set_lr(one_arm, A)
    interrupted = one_arm.hashes(f"results/pretrain/{ARM}")
    one_arm.succeed(*of("pretrain"), "--force")
    assert one_arm.hashes(f"results/pretrain/{ARM}") == interrupted


# --- a kill at every moment -----------------------------------------------------------------------------------

KILLER = """
import errno, itertools, os, shutil, signal, sys
from maskdm.cli import main
from maskdm.stages import choose, pretrain, scale

def kill_at(number, function, calls):
    def counted(*arguments, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted

def on_two_disks(rename):
    work = os.path.abspath(".work") + os.sep
    def refuse(source, target, **options):
        if len({os.path.abspath(path).startswith(work) for path in (source, target)}) == 2:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target, **options)
    return refuse

folder, disks, *words = sys.argv[1:]
for number in itertools.count(1):
    place = f"{folder}/{number}"
    shutil.copytree(f"{folder}/start", place)
    child = os.fork()
    if child == 0:
        os.chdir(place)
        calls = itertools.count(1)
        for name in ("rename", "replace", "unlink", "rmdir"):
            setattr(os, name, kill_at(number, getattr(os, name), calls))
        if disks == "two":
            os.rename = on_two_disks(os.rename)
        os._exit(main(words))
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def killed_everywhere(start: Experiment, folder: Path, stage: str, disks: str = "one") -> list[Experiment]:
    """What is left by a stage that is killed at its n-th change of a name; the last of them has ended well."""
    start.copy_to(folder / "start")
    command = [sys.executable, "-c", KILLER, str(folder), disks, *of(stage)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    places = sorted((place for place in folder.iterdir() if place.name != "start"), key=lambda path: int(path.name))
    return [Experiment(place) for place in places]


# What stands there before, and what is to be made instead.
KILLED = {stage: CHANGES[stage] for stage in ("choose", "scale", "pretrain")}


@pytest.mark.parametrize(("stage", "disks"), [("choose", "two"), ("scale", "one"), ("pretrain", "one")])
def test_a_stage_killed_at_any_moment_succeeds_when_it_is_run_again(
    one_arm: Experiment,
    tmp_path_factory: pytest.TempPathFactory,
    no_work: Callable[[str], None],
    stage: str,
    disks: str,
) -> None:
    params, first = one_arm.content, made(one_arm, stage)
    one_arm.change(saving={"every_steps": 4}, **KILLED[stage])
    undisturbed = one_arm.copy_to(tmp_path_factory.mktemp("undisturbed"))
    undisturbed.succeed(*of(stage))
    place = str(job_of(one_arm, stage).output)
    expected = undisturbed.hashes(place)
    left = killed_everywhere(one_arm, tmp_path_factory.mktemp("killed"), stage, disks)
    assert len(left) > 15
    for number, experiment in enumerate(left, 1):
        assert_whole(experiment, stage)
        outcome = experiment.run(*of(stage))
        assert outcome.code == 0, (number, outcome.err)
        assert experiment.hashes(place) == expected, number
        assert_whole(experiment, stage)
        assert_up_to_date(experiment.run(*of(stage)))
        assert {path.name for path in work_of(experiment, stage).iterdir()} <= KEPT, number
        assert not list(experiment.path("results").rglob(".*")), number
    assert {record_of(experiment, stage)["starts"] for experiment in left} == {1, 2}
    no_work(stage)
    for number, experiment in enumerate(left, 1):
        experiment.rewrite(params)
        assert "it is back in" in experiment.succeed(*of(stage)).out, number
        assert made(experiment, stage) == first, "the output that stood there before is not lost"


def test_a_kill_at_any_moment_of_restoring_loses_no_output(
    one_arm: Experiment, tmp_path_factory: pytest.TempPathFactory, no_work: Callable[[str], None]
) -> None:
    first = made(one_arm, "pretrain")
    set_lr(one_arm, B)
    second = made(one_arm, "pretrain")
    one_arm.change(pretrain={"lr": A})
    left = killed_everywhere(one_arm, tmp_path_factory.mktemp("killed"), "pretrain")
    assert len(left) > 4
    no_work("pretrain")
    for experiment in left:
        assert_whole(experiment, "pretrain")
        experiment.succeed(*of("pretrain"))
        assert made(experiment, "pretrain") == first
        assert "it is back in" in set_lr(experiment, B)
        assert made(experiment, "pretrain") == second


# --- two at once ----------------------------------------------------------------------------------------------


def test_of_two_processes_one_works_and_the_other_waits(one_arm: Experiment) -> None:
    one_arm.change(tuning={"metric": "fid"})
    with one_writer(one_arm.path(str(job_of(one_arm, "choose").lock)), "choose"):  # so that both are there
        processes = [one_arm.start("choose") for _ in range(2)]
        waiting = [next(iter(process.stderr)) for process in processes if process.stderr is not None]
    assert waiting == [f"choose: waiting for process {os.getpid()}, which works on it\n"] * 2
    outcomes = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for *_, code in outcomes] == [0, 0], outcomes
    assert sorted(out for out, *_ in outcomes) == ["", "choose: up to date\n"]
    assert_whole(one_arm, "choose")


def test_a_file_system_without_locks_is_only_a_warning(one_arm: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    outcome = one_arm.change(tuning={"metric": "fid"}).succeed("choose")
    assert f"warning: .work/results/chosen/lock can't be locked ({os.strerror(errno.ENOLCK)})" in outcome.err
    assert_up_to_date(one_arm.run("choose"))


# --- disks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["scale", "choose"])
@pytest.mark.parametrize(("call", "code"), [("fsync", errno.ENOSPC), ("rename", errno.EIO)])
def test_a_disk_that_refuses_at_any_moment_is_one_clear_error(
    one_arm: Experiment, tmp_path_factory: pytest.TempPathFactory, stage: str, call: str, code: int
) -> None:
    old = made(one_arm, stage)
    one_arm.change(**CHANGES[stage])
    undisturbed = one_arm.copy_to(tmp_path_factory.mktemp("undisturbed"))
    undisturbed.succeed(*of(stage))
    place = str(job_of(one_arm, stage).output)
    new = undisturbed.hashes(place)
    for number in range(1, 100):
        experiment = one_arm.copy_to(tmp_path_factory.mktemp("refused"))
        with failing(os, call, number, code) as calls:
            outcome = experiment.run(*of(stage))
        if len(calls) < number:
            assert outcome.code == 0
            break
        if outcome.code == 0:  # where it does not matter: the note on a failure, on progress
            continue
        assert_refused(outcome, "cannot write ", os.strerror(code))
        assert_whole(experiment, stage)
        assert experiment.hashes(place) == new or made(experiment, stage) == old, number
        experiment.succeed(*of(stage))
        assert experiment.hashes(place) == new
        assert_whole(experiment, stage)
    assert 3 <= number < 99


@pytest.mark.parametrize("num_bytes", [0, 200, 5000, 100_000])
def test_a_full_disk_keeps_the_old_output_and_the_same_command_later_succeeds(
    one_arm: Experiment, num_bytes: int
) -> None:
    """The lock, what was begun, a state, the weights: each has its turn to be what does not fit."""
    before = made(one_arm, "pretrain")
    one_arm.change(pretrain={"lr": B}, saving={"every_steps": 4})
    with no_file_larger_than(num_bytes):
        assert_refused(one_arm.run(*of("pretrain")), "cannot write ", "File too large")
    assert made(one_arm, "pretrain") == before
    one_arm.succeed(*of("pretrain"))
    assert_whole(one_arm, "pretrain")
    assert failures_of(one_arm, "pretrain") == []


@pytest.mark.parametrize("stage", ["scale", "choose", "pretrain"])
def test_results_may_lie_on_another_file_system_than_the_work(
    one_arm: Experiment, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    rename = os.rename

    def across(source: Any, target: Any, **options: Any) -> None:
        there = [Path(os.fspath(path)).absolute().is_relative_to(one_arm.path(".work")) for path in (source, target)]
        if there[0] != there[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", across)
    params, first = one_arm.content, made(one_arm, stage)
    one_arm.change(**CHANGES[stage]).succeed(*of(stage))
    assert_whole(one_arm, stage)
    assert "it is back in" in one_arm.rewrite(params).succeed(*of(stage)).out
    assert made(one_arm, stage) == first
    assert_up_to_date(one_arm.run(*of(stage)))
    assert not list(one_arm.path("results").rglob("*.building")) + list(one_arm.path(".work").rglob("*.building"))


@pytest.mark.parametrize("in_the_way", [".work", ".work/results/metrics"])
def test_a_file_where_a_folder_should_be_is_a_clear_error(one_arm: Experiment, in_the_way: str) -> None:
    before = one_arm.hashes("results/metrics/scale.json")
    one_arm.change(**CHANGES["scale"])
    place = one_arm.path(in_the_way)
    place.rename(one_arm.path("aside"))
    place.write_text("mine", encoding="utf-8")
    assert_refused(one_arm.run("scale"), "cannot write ")
    assert one_arm.hashes("results/metrics/scale.json") == before
    place.unlink()
    one_arm.path("aside").rename(place)
    one_arm.succeed("scale")
    assert_whole(one_arm, "scale")
