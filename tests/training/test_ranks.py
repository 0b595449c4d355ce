"""Several processes that share a batch: as one process, whatever happens to any of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from maskdm.base.tensors import load_tensors
from maskdm.training.ranks import ALONE
from tests.training import two_ranks

if TYPE_CHECKING:
    from tests.conftest import Experiment

ARM = "patch-m50"
OF_ARM = ("--arm", ARM, "--seed", "0")
STATES = f".work/results/pretrain/{ARM}/seed-0/*/state-*.safetensors"
ABOUT = {"stamp", "checksum"}  # keys of a score that hash the others
Outcomes = dict[str, Tensor]


def with_devices(experiment: Experiment, num_devices: int, **changes: Any) -> Experiment:
    """The experiment on so many processes, in float32, with a batch that is cut into rows and micro-batches."""
    return experiment.change(
        training={"log_every": 4, "flip": 0.5, "grad_clip": 0.1},
        pretrain={"micro_batch_size": 8},
        compute={"precision": "fp32", "devices": num_devices, **changes},
    )


def weights_of(experiment: Experiment, stage: str = "pretrain") -> dict[str, dict[str, Tensor]]:
    name = "checkpoint" if stage == "pretrain" else "milestone-1.000"
    return load_tensors(experiment.path("results", stage, ARM, "seed-0", f"{name}.safetensors"))[0]


def assert_close_weights(got: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """To within 1e-6, the raw and the averaged ones."""
    assert got.keys() == expected.keys() == {"raw", "ema"}
    for kind, tensors in expected.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(got[kind][name], tensor, rtol=0, atol=1e-6)


def no_others(of: int) -> bool:
    """Whether a process has no child of maskdm's left."""
    return not [child for child in psutil.Process(of).children() if _is_maskdm(child)]


def _is_maskdm(process: psutil.Process) -> bool:
    try:
        return "maskdm" in process.cmdline()
    except psutil.NoSuchProcess:  # it has ended, whether or not anybody has asked how
        return False


def when(is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


# --- what two ranks compute


@pytest.fixture(scope="module")
def ranks(prepared_once: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Outcomes]]:
    """What the first rank, the second, and one process alone have computed in every case of `two_ranks`."""
    experiment = prepared_once.copy_to(tmp_path_factory.mktemp("ranks")).change(compute={"precision": "fp32"})
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, two_ranks.__file__, "."], cwd=experiment.folder, env=launched(rank, port))
        for rank in (0, 1)
    ]
    with contextlib.chdir(experiment.folder):
        alone = {name: compute(ALONE, Path(f"{name}-alone")) for name, compute in two_ranks.CASES.items()}
    assert [process.wait(120) for process in processes] == [0, 0]
    return {
        name: {**{str(rank): load_file(experiment.path(f"{name}-{rank}")) for rank in (0, 1)}, "alone": alone[name]}
        for name in two_ranks.CASES
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(rank: int, port: int) -> dict[str, str]:
    """The environment that a launcher of two processes gives to one of them."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


@pytest.mark.parametrize("case", two_ranks.CASES)
def test_two_ranks_end_with_the_weights_of_one_process(ranks: dict[str, dict[str, Outcomes]], case: str) -> None:
    first, alone = ranks[case]["0"], ranks[case]["alone"]
    compared = [key for key in alone if "/" in key]
    assert {key.split("/")[0] for key in compared} == {"raw", "ema", "exp_avg", "exp_avg_sq", "step", "loss"}
    for key in compared:
        torch.testing.assert_close(first[key], alone[key], rtol=0, atol=1e-6, equal_nan=True, msg=key)
    torch.testing.assert_close(first["curve"], alone["curve"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", two_ranks.CASES)
def test_both_ranks_have_the_same_weights_bit_for_bit(ranks: dict[str, dict[str, Outcomes]], case: str) -> None:
    first, second = ranks[case]["0"], ranks[case]["1"]
    weights = [key for key in first if key.startswith(("raw/", "exp_avg/"))]
    assert weights and all(torch.equal(first[key], second[key]) for key in weights)


def test_averages_are_kept_by_the_first_rank(ranks: dict[str, dict[str, Outcomes]]) -> None:
    assert [any(k.startswith("ema/") for k in ranks["good"][rank]) for rank in "01"] == [True, False]


def test_every_rank_draws_its_own_rows_of_the_batch(ranks: dict[str, dict[str, Outcomes]]) -> None:
    case = ranks["good"]
    for name in ("patches", "t", "visible_idx"):
        first, second = case["0"][name], case["1"][name]
        assert len(first) == len(second) == 16 and not torch.equal(first, second)
        torch.testing.assert_close(torch.cat([first, second]), case["alone"][name], rtol=0, atol=0)
    assert not any((a == b).all() for a, b in zip(case["0"]["patches"], case["1"]["patches"], strict=True))


def test_a_loss_that_is_not_finite_on_one_rank_stops_the_update_on_all(ranks: dict[str, dict[str, Outcomes]]) -> None:
    for outcome in ranks["bad"].values():
        assert outcome["failed"]
        assert all(outcome[key].isfinite().all() for key in outcome if key.startswith(("raw/", "exp_avg/")))
        assert outcome["step/norm.weight"] == two_ranks.BAD_STEP, "the update of that step is the first not made"


# --- the stage


@pytest.fixture(scope="module")
def on_one(prepared_once: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Pretrained and finetuned by one process."""
    experiment = with_devices(prepared_once.copy_to(tmp_path_factory.mktemp("one")), 1)
    for stage in ("pretrain", "finetune"):
        experiment.succeed(stage, *OF_ARM)
    return experiment


@pytest.fixture(scope="module")
def on_two(prepared_once: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Pretrained by two processes, not interrupted."""
    experiment = with_devices(prepared_once.copy_to(tmp_path_factory.mktemp("two")), 2)
    experiment.succeed("pretrain", *OF_ARM)
    assert no_others(os.getpid())
    return experiment


def test_a_stage_on_two_devices_publishes_what_one_device_does(on_one: Experiment, on_two: Experiment) -> None:
    assert_close_weights(weights_of(on_two), weights_of(on_one))
    record = json.loads(on_two.path(f"results/records/pretrain-{ARM}-seed-0.json").read_text(encoding="utf-8"))
    assert (record["devices"], record["micro_batch_size"]) == (2, 8)
    assert [row["step"] for row in record["timings"]] == [4, 8, 12]


def test_samples_are_the_same_bytes_on_any_number_of_devices(on_one: Experiment, tmp_path: Path) -> None:
    """64 images in batches of 13: beside the last of five, three of four ranks have nothing to draw."""
    one = on_one.copy_to(tmp_path / "1").change(sampling={"batch_size": 13})
    several = one.copy_to(tmp_path / "4").change(compute={"devices": 4})
    for experiment in (one, several):
        experiment.succeed("sample", *OF_ARM)
    samples = f"results/samples/{ARM}/seed-0"
    assert one.hashes(samples) == several.hashes(samples)
    record = json.loads(several.path(f"results/records/sample-{ARM}-seed-0.json").read_text(encoding="utf-8"))
    assert record["devices"] == 4


def test_a_trial_on_two_devices_scores_as_on_one(prepared: Experiment, tmp_path: Path) -> None:
    trials = {"given": {}, "slower": {"finetune.lr": 1e-3}}
    prepared.change(tuning={"trials": trials}, sampling={"batch_size": 32}).succeed("features")
    scores: list[dict[str, Any]] = []
    for num_devices in (1, 2):
        experiment = with_devices(prepared.copy_to(tmp_path / str(num_devices)), num_devices)
        experiment.try_values("given")
        scores.append(json.loads(experiment.path(f"results/tuning/{ARM}/given.json").read_text(encoding="utf-8")))
    on_one, on_two = ({name: value for name, value in score.items() if name not in ABOUT} for score in scores)
    assert not on_one["failed"] and on_one["fid"] > 0
    assert on_two == {**on_one, **{name: pytest.approx(on_one[name], rel=1e-3) for name in ("fid", "kid", "kid_std")}}


@pytest.mark.workflow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize("num_devices", [1, 2])
def test_compiled_training_follows_eager_training(on_one: Experiment, tmp_path: Path, num_devices: int) -> None:
    compiled = with_devices(on_one.copy_to(tmp_path), num_devices, compile="default")
    compiled.succeed("pretrain", *OF_ARM, "--force")
    for kind, tensors in weights_of(on_one).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(weights_of(compiled)[kind][name], tensor, rtol=0, atol=1e-4)
    record = json.loads(compiled.path(f"results/records/pretrain-{ARM}-seed-0.json").read_text(encoding="utf-8"))
    assert record["compile"] == "default"
    assert record["compile_seconds"] > 0


def test_a_compiler_that_is_not_there_is_told_in_a_line(
    prepared: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    asked = with_devices(prepared.copy_to(tmp_path / "asked"), 1, compile="default")
    started = asked.start("pretrain", *OF_ARM)
    _, said = started.communicate()
    assert started.returncode == 1
    assert "torch.compile failed (" in said
    assert "compute.compile: off does without" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def stopped(prepared_once: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Stopped by Ctrl-C in the middle, on two devices."""
    experiment = with_devices(prepared_once.copy_to(tmp_path_factory.mktemp("stopped")), 2)
    experiment.change(saving={"every_steps": 20, "every_seconds": 1e6}, budget={"unmasked_steps": 120})
    process = experiment.start("pretrain", *OF_ARM)
    when(lambda: any(experiment.folder.glob(STATES)) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved pretrain patch-m50 seed 0 at step" in err, err
    assert err.count("stopped by SIGINT") == 1, "the first rank speaks for all"
    return experiment


def resumed(stopped: Experiment, folder: Path, **changes: Any) -> Experiment:
    """What comes of a stopped stage with other values."""
    experiment = stopped.copy_to(folder).change(**changes)
    assert "resuming from step" in experiment.succeed("pretrain", *OF_ARM).out
    return experiment


def test_resuming_is_exact_with_as_many_devices_and_possible_with_another_number(
    stopped: Experiment, tmp_path: Path
) -> None:
    with_two, with_one = resumed(stopped, tmp_path / "2"), resumed(stopped, tmp_path / "1", compute={"devices": 1})
    shutil.rmtree(stopped.path(".work"))
    stopped.succeed("pretrain", *OF_ARM)
    place = "results/pretrain"
    assert with_two.hashes(place) == stopped.hashes(place)
    assert_close_weights(weights_of(with_one), weights_of(stopped))


@pytest.fixture
def at_work(prepared: Experiment) -> Iterator[tuple[Experiment, subprocess.Popen[str], psutil.Process]]:
    """A long stage in the middle of its steps, its process, and that of its second rank."""
    with_devices(prepared, 2).change(saving={"every_steps": 100}, budget={"unmasked_steps": 100_000})
    process = prepared.start("pretrain", *OF_ARM)
    try:
        when(lambda: any(prepared.folder.glob(STATES)) or process.poll() is not None)
        (follower,) = psutil.Process(process.pid).children()
        yield prepared, process, follower
    finally:
        process.kill()
        process.communicate()


def test_a_rank_that_dies_ends_the_stage_with_a_clear_error(
    at_work: tuple[Experiment, subprocess.Popen[str], psutil.Process],
) -> None:
    experiment, process, follower = at_work
    follower.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "maskdm: error: rank 1 of 0 to 1 (compute.devices) has ended with exit code -9" in err
    assert "if a state was saved, the same command resumes from it" in err
    assert any(experiment.folder.glob(STATES))


def test_no_rank_outlives_the_first_one(at_work: tuple[Experiment, subprocess.Popen[str], psutil.Process]) -> None:
    _, process, follower = at_work
    process.kill()
    follower.wait(20)
    _, err = process.communicate(timeout=20)
    assert "Traceback" not in err, err


# --- launchers


def test_a_launcher_with_another_number_of_processes_is_refused(
    prepared: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(prepared, 4)
    for name, value in launched(0, free_port()).items():
        monkeypatch.setenv(name, value)
    outcome = prepared.run("pretrain", *OF_ARM)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert (
        "compute.devices is 4, but WORLD_SIZE is 2: 2 processes were started; set compute.devices to 2" in outcome.err
    )


def test_a_launched_rank_ends_where_the_work_is_done(
    on_two: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = on_two.copy_to(tmp_path)
    words, port = [sys.executable, "-m", "maskdm", "pretrain", *OF_ARM], free_port()
    follower = subprocess.Popen(words, cwd=done.folder, env=launched(1, port), stderr=subprocess.PIPE, text=True)
    for name, value in launched(0, port).items():
        monkeypatch.setenv(name, value)
    assert done.succeed("pretrain", *OF_ARM).out == f"pretrain {ARM} seed 0: up to date\n"
    _, err = follower.communicate(timeout=60)
    assert (follower.returncode, err) == (0, "")
