"""Faults of machines and users, for real, in their short versions; benchmarks/faults.py has the long ones."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import faults
from benchmarks.faults import ARM, OF_ARM, READ_BY, STAGES, Stages, make_params
from maskdm import interrupts

if TYPE_CHECKING:
    from tests.conftest import Experiment, Outcome

CHECKPOINT = f"results/pretrain/{ARM}/seed-0/checkpoint.safetensors"
WORK = f".work/results/pretrain/{ARM}/seed-0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stages, dict[str, float]]:
    """Every stage of one arm, not interrupted, and the seconds that each took; not to be changed."""
    return faults.run_all(make_params(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def stages(whole: tuple[Stages, dict[str, float]], tmp_path: Path) -> Stages:
    """A copy of it, without what is kept of finished work."""
    shutil.copytree(whole[0].folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".work"))
    return Stages(tmp_path / "copy")


@pytest.fixture
def untrained(stages: Stages) -> Stages:
    """The same, pretraining still to be done."""
    shutil.rmtree(stages.path(f"results/pretrain/{ARM}"))
    return stages


# --- kills


@pytest.mark.workflow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_five_times_ends_as_if_it_never_was(
    whole: tuple[Stages, dict[str, float]], stages: Stages, stage: str
) -> None:
    output = STAGES[stage][1]
    faults.forget(stages, output)
    assert faults.kill_stage(stages, stage, 5, whole[1][stage], random.Random(0)) == 5
    assert stages.digests(output) == whole[0].digests(output)
    names = {path.relative_to(stages.folder) for path in stages.path(output).rglob("*")}
    assert names == {path.relative_to(whole[0].folder) for path in whole[0].path(output).rglob("*")}
    assert not stages.path("results/.building").exists(), "what a killed process had half built is gone"


def when(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_within_seconds_and_the_same_command_goes_on(
    whole: tuple[Stages, dict[str, float]], untrained: Stages, number: signal.Signals, code: int
) -> None:
    process = untrained.start("pretrain", *OF_ARM)
    when(lambda: any(untrained.path(WORK).glob("state-*.safetensors")))
    asked = time.monotonic()
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(10)
    assert time.monotonic() - asked < 5
    assert process.exitcode == code, untrained.said()
    assert f"stopped by {number.name}: saved pretrain {ARM} seed 0 at step " in untrained.said()
    step = int(untrained.said().split(" at step ")[1].split()[0])
    assert untrained.path(f"{WORK}/state-{step:010d}.safetensors").exists()
    untrained.must("pretrain", *OF_ARM)
    assert f"going on from step {step}\n" in untrained.said(), "not a step is lost"
    assert untrained.digests(CHECKPOINT) == whole[0].digests(CHECKPOINT)


def test_a_second_signal_ends_at_once_and_loses_what_was_saved_before_only_to_itself(untrained: Stages) -> None:
    """With steps of seconds, the first signal would wait for the end of one."""
    make_params(untrained.folder, pretrain={"batch_size": 20_000}, budget={"unmasked_steps": 6000})
    process = untrained.start("pretrain", *OF_ARM)
    when(lambda: untrained.path(f"{WORK}/owner.json").exists())
    time.sleep(1.5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    when(lambda: "SIGTERM: saving after this step" in untrained.said())
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == 143
    assert "saved pretrain" not in untrained.said()


def test_a_signal_that_comes_while_samples_are_drawn_keeps_the_finished_batches(
    whole: tuple[Stages, dict[str, float]], stages: Stages
) -> None:
    words, output = STAGES["sample"]
    shutil.rmtree(stages.path(output))
    make_params(stages.folder, sampling={"batch_size": 2})
    shards = stages.path(f".work/{output}/milestone-0.600")
    process = stages.start("sample", *words)
    when(lambda: len(list(shards.glob("*.safetensors"))) > 2)
    process.terminate()
    process.join()
    assert process.exitcode == 143 and "what was finished is kept" in stages.said()
    kept = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.safetensors")}
    damaged = shards / min(kept)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    process = stages.start("sample", *words)
    when(lambda: len(list(shards.glob("*.safetensors"))) > len(kept) + 1)
    process.kill()
    process.join()
    now = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.safetensors")}
    assert {name: at for name, at in kept.items() if now[name] != at}.keys() == {damaged.name}, "drawn once"
    stages.must("sample", *words)
    assert stages.digests(output).keys() == whole[0].digests(output).keys()


def test_a_signal_whose_message_nobody_can_read_saves_all_the_same(untrained: Stages) -> None:
    """Ctrl-C ends `tee` in the same pipe as well, and a closed terminal takes the message with it."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "maskdm", "pretrain", *OF_ARM],
        cwd=untrained.folder,
        stdout=writing,
        stderr=writing,
        preexec_fn=faults.heed_signals,
    )
    os.close(writing)
    when(lambda: any(untrained.path(WORK).glob("state-*.safetensors")))
    os.close(reading)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 129
    untrained.must("pretrain", *OF_ARM)
    assert "going on from step" in untrained.said()


def test_signals_that_were_ignored_from_outside_stay_ignored() -> None:
    """What nohup does with a lost terminal."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    try:
        for number in interrupts.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(interrupts.Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.exit_code == 143
        with pytest.raises(interrupts.Stopped), interrupts.deferring() as deferral:  # at the latest at its end
            os.kill(os.getpid(), signal.SIGTERM)
            assert deferral.requested is signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("stage", ["prepare", "features", "pretrain"])
def test_a_second_process_waits_says_for_whom_and_finds_the_work_done(
    whole: tuple[Stages, dict[str, float]], stages: Stages, tmp_path: Path, stage: str
) -> None:
    words, output = STAGES[stage]
    faults.forget(stages, output)
    if stage == "prepare":  # long enough to be seen at work
        make_params(stages.folder, dataset={"shard_images": 1})
    first = stages.start(stage, *words)
    locks = stages.path(".work/locks")
    when(lambda: any(str(first.pid) in lock.read_text() for lock in locks.glob(f"{stage}*.lock")))
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    other = Stages(stages.folder, "other.txt")
    second = other.start(stage, *words)
    when(lambda: "waiting for process" in other.said())
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0), stages.said() + other.said()
    assert f"waiting for process {first.pid}, which is at work on it since" in other.said()
    assert f"process {first.pid} has done it" in other.said()
    if stage != "prepare":
        assert stages.digests(output) == whole[0].digests(output)


# --- disks


@pytest.mark.parametrize(
    ("stage", "limit", "says"),
    [
        ("pretrain", 60_000, "cannot write .work/results/pretrain/patch-m50/seed-0/state-"),
        ("sample", 2_000, "cannot write results/samples/patch-m50/seed-0"),
        ("sample", 500, "cannot write .work/results/samples/patch-m50/seed-0/"),
        ("prepare", 1_000, "cannot write results/data"),
        ("features", 20_000, "cannot write results/features"),
        ("report", 30_000, "cannot write results/report"),
        ("choose", 400, "cannot write results/records/choose.json"),
    ],
)
def test_no_room_is_a_clear_error_and_with_room_the_same_command_ends(
    whole: tuple[Stages, dict[str, float]], stages: Stages, stage: str, limit: int, says: str
) -> None:
    words, output = STAGES[stage]
    before = stages.digests(output)
    code = stages.run(stage, *words, limit=limit)
    assert code == 1, stages.said()
    assert f"maskdm: error: {says}" in stages.said()
    assert "free space" in stages.said() and "Traceback" not in stages.said()
    assert stages.digests(output) == before, "the old output is as it was"
    stages.must(stage, *words)
    assert stages.digests(output) == whole[0].digests(output)


def test_states_saved_before_the_disk_was_full_are_gone_on_from(
    whole: tuple[Stages, dict[str, float]], untrained: Stages
) -> None:
    process = untrained.start("pretrain", *OF_ARM)
    when(lambda: any(untrained.path(WORK).glob("state-*.safetensors")))
    process.kill()
    process.join()
    before = {file.name: file.read_bytes() for file in untrained.path(WORK).glob("state-*.safetensors")}
    assert untrained.run("pretrain", *OF_ARM, limit=60_000) == 1
    assert {file.name: file.read_bytes() for file in untrained.path(WORK).glob("state-*.safetensors")} == before
    assert not list(untrained.path(WORK).glob("*.building"))
    untrained.must("pretrain", *OF_ARM)
    assert f"going on from step {int(max(before).split('-')[1].split('.')[0])}\n" in untrained.said()
    assert untrained.digests(CHECKPOINT) == whole[0].digests(CHECKPOINT)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another filesystem."""
    place = Path("/dev/shm") / f"maskdm-test-{os.getpid()}"
    if not place.parent.is_dir() or place.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second filesystem to write to: /dev/shm")
    place.mkdir()
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("moved", ["results", ".work"])
def test_results_may_lie_on_another_filesystem_than_the_work(
    whole: tuple[Stages, dict[str, float]], untrained: Stages, elsewhere: Path, moved: str
) -> None:
    if moved == "results":
        shutil.copytree(untrained.path("results"), elsewhere / "results")
        shutil.rmtree(untrained.path("results"))
    else:
        (elsewhere / ".work").mkdir()
        shutil.rmtree(untrained.path(".work"), ignore_errors=True)
    untrained.path(moved).symlink_to(elsewhere / moved)
    process = untrained.start("pretrain", *OF_ARM)
    when(lambda: any(untrained.path(WORK).glob("state-*.safetensors")))
    process.kill()
    process.join()
    untrained.must("pretrain", *OF_ARM)
    assert "going on from step" in untrained.said()
    assert untrained.digests(CHECKPOINT) == whole[0].digests(CHECKPOINT)
    shutil.rmtree(untrained.path(f"results/pretrain/{ARM}"))
    untrained.must("pretrain", *OF_ARM)
    assert "done before" in untrained.said()
    assert untrained.digests(CHECKPOINT) == whole[0].digests(CHECKPOINT)


@pytest.mark.parametrize("place", [f"results/pretrain/{ARM}", ".work", "results/records"])
def test_a_folder_that_refuses_writes_is_a_clear_error(untrained: Stages, place: str) -> None:
    """/sys refuses even root."""
    path = untrained.path(place)
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to("/sys")
    assert untrained.run("pretrain", *OF_ARM) == 1
    assert "maskdm: error: cannot write " in untrained.said() and "Traceback" not in untrained.said()
    path.unlink()
    path.mkdir()
    untrained.must("pretrain", *OF_ARM)


# --- damage


FILES = [(stage, name) for stage, names in READ_BY.items() for name in names]


@pytest.mark.parametrize(("stage", "name"), FILES, ids=[name for _, name in FILES])
def test_a_damaged_file_is_refused_by_name(stages: Stages, stage: str, name: str) -> None:
    numbers = random.Random(name)
    outcomes = [
        faults.damage(stages, stage, name, change)
        for change in (
            lambda content: faults.flip(content, numbers),
            lambda content: faults.flip(content, numbers),
            lambda content: content[: numbers.randrange(len(content))],
            lambda content: numbers.randbytes(len(content)),
            lambda content: b"",
        )
    ]
    assert set(outcomes) <= {"refused", "harmless"}, outcomes
    assert outcomes[2:] == ["refused"] * 3
    assert "refused" in outcomes[:2]


@pytest.mark.parametrize("change", ["flipped", "gone"])
def test_a_milestone_damaged_in_the_work_folder_is_trained_for_again(
    whole: tuple[Stages, dict[str, float]], stages: Stages, change: str
) -> None:
    output = f"results/finetune/{ARM}/seed-0"
    shutil.rmtree(stages.path(output))
    process = stages.start("finetune", *OF_ARM)
    kept = stages.path(f".work/{output}")
    when(lambda: any(kept.glob("milestones/*.safetensors")))
    milestone = min(kept.glob("milestones/*.safetensors"), key=lambda file: int(file.stem))
    when(lambda: any(int(file.stem[6:]) > int(milestone.stem) for file in kept.glob("state-*.safetensors")))
    process.kill()
    process.join()
    milestone.unlink() if change == "gone" else faults.replace(milestone, faults.flip(milestone.read_bytes(), random))  # type: ignore[arg-type]
    stages.must("finetune", *OF_ARM)
    assert ("is damaged and was renamed" in stages.said()) == (change == "flipped")
    assert stages.digests(output) == whole[0].digests(output)


# --- clocks and memory


def test_a_clock_that_jumps_back_changes_nothing(
    prepared: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the time of day finds it an hour earlier than the last."""
    straight = prepared.copy_to(tmp_path / "straight")
    straight.succeed("pretrain", *OF_ARM)
    now = time.time()
    hours = iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int((now - 3600 * next(hours)) * 1e9))
    prepared.change(saving={"every_steps": 3}, tracking={"enabled": True}).succeed("pretrain", *OF_ARM)
    output = STAGES["pretrain"][1]
    assert prepared.hashes(output) == straight.hashes(output)


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def assert_out_of_memory(outcome: Outcome, *says: str) -> None:
    assert outcome.code == 1
    for part in ("maskdm: error: out of memory: ", "Tried to allocate 2.00 GiB", *says):
        assert part in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_training_out_of_gpu_memory_names_what_to_lower(
    scored: Experiment, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    shutil.rmtree(scored.path(".work"))
    monkeypatch.setattr("maskdm.backbone.UViT.forward", out_of_memory)
    visible = "8 visible tokens of 16 patches" if stage == "pretrain" else "16 visible tokens of 16 patches"
    assert_out_of_memory(scored.stage(stage), "batches of 32 images", visible, f"{stage}.micro_batch_size below 32")


def test_sampling_and_scoring_out_of_gpu_memory_name_what_to_lower(
    scored: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(scored.path(".work"))
    with monkeypatch.context() as patched:
        patched.setattr("maskdm.backbone.UViT.forward", out_of_memory)
        assert_out_of_memory(scored.stage("sample"), "batches of 64 images", "lower sampling.batch_size")
    monkeypatch.setattr("maskdm.classifier.Classifier.embed", out_of_memory)
    assert_out_of_memory(scored.stage("evaluate"), "batches of 256 images", "lower evaluation.batch_size")


def test_no_memory_on_a_cpu_is_told_as_well(prepared: Experiment) -> None:
    """For real: so many images at once are more than the machine has."""
    prepared.change(pretrain={"batch_size": 4_000_000_000}, budget={"unmasked_steps": 10**9})
    outcome = prepared.stage("pretrain")
    assert outcome.code == 1 and "maskdm: error: out of memory: pretrain patch-m50 seed 0: batches of" in outcome.err
