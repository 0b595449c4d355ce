"""The rules of where and how a stage computes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
import torch

from maskdm.base.errors import UserError
from maskdm.config import ComputeConfig
from maskdm.training.devices import KEEP_FREED_MEMORY, Compute, gpus_of_stage, resolve
from tests.factories import CPU

HOLD = """
import sys
from maskdm.training.devices import gpus_of_stage
print(*gpus_of_stage(int(sys.argv[1]), tuple(sys.argv[2:])), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("compile_mode", "expected"),
    [("auto", None), ("off", None), ("default", "default"), ("reduce-overhead", "reduce-overhead")],
)
def test_a_cpu_compiles_only_when_asked(compile_mode: str, expected: str | None) -> None:
    compute = resolve(ComputeConfig(device="cpu", precision="auto", compile=compile_mode))  # type: ignore[arg-type]
    assert compute.compile_mode == expected
    assert compute.describe()["compile"] == (expected or "off")


def test_what_is_not_compiled_is_the_function_itself() -> None:
    def function() -> None: ...

    assert Compute(CPU, autocast=False, threads=1).compiled(function) is function


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_that_is_asked_for_is_that_of_products_and_of_the_record(precision: str) -> None:
    compute = resolve(ComputeConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
    with compute.context():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == compute.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert compute.describe()["precision"] == precision


def test_kernels_are_deterministic_and_nothing_is_filled_for_it() -> None:
    resolve(ComputeConfig(device="cpu", precision="auto"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_the_allocator_takes_every_setting() -> None:
    library = ctypes.CDLL(None)
    assert [library.mallopt(parameter, value) for parameter, value in KEEP_FREED_MEMORY.items()] == [1, 1, 1]


def test_cuda_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"compute\.device is cuda, but PyTorch sees no CUDA device"):
        resolve(ComputeConfig(device="cuda", precision="auto"))


def test_stages_at_work_at_a_time_take_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # so that it is looked up anew
    uuids = tuple(f"test-{uuid.uuid4()}" for _ in range(4))
    others = []
    try:
        for num_devices, expected in (("1", "0"), ("2", "1 2"), ("2", "3 0")):  # the last finds but one free
            words = [sys.executable, "-c", HOLD, num_devices, *uuids]
            other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            others.append(other)
            assert other.stdout is not None
            assert other.stdout.readline().strip() == expected
        others[1].communicate()
        assert gpus_of_stage(1, uuids) == (1,), "one of a process that has ended"
        assert gpus_of_stage(1, uuids) == (1,), "a process keeps the one it has"
    finally:
        for other in others:
            if other.poll() is None:
                other.communicate()


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"RANK": "1"}, "has set RANK but not LOCAL_RANK"), ({"LOCAL_RANK": "2"}, "has 2 CUDA devices")],
)
def test_a_launcher_that_gives_no_gpu_is_an_error(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        resolve(ComputeConfig(device="cuda", precision="auto"))
