"""Micro-batches that fit: a function of the experiment and the device's size."""

from __future__ import annotations

import pytest
import torch

from maskdm.config import StageConfig
from maskdm.training.devices import Compute
from maskdm.training.memory import FILLED, MemoryCounter, micro_batch_size
from tests.factories import FP32, tiny_params

PARAMS = tiny_params()


def device_of(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(Compute, "memory_bytes", property(lambda _: int(num_bytes)))


def automatic(batch_size: int) -> StageConfig:
    return StageConfig(lr=1e-3, batch_size=batch_size, micro_batch_size="auto")


@pytest.mark.parametrize(("given", "size"), [(None, 24), (8, 8), (24, 24)])
def test_what_is_given_is_taken(given: int | None, size: int) -> None:
    assert micro_batch_size(PARAMS, FP32, StageConfig(lr=1e-3, batch_size=24, micro_batch_size=given), 16) == size


def test_ranks_take_their_share() -> None:
    assert micro_batch_size(PARAMS, FP32, StageConfig(lr=1e-3, batch_size=24), 16, num_ranks=3) == 8


@pytest.mark.parametrize("fits", [1, 2, 3, 4, 6, 8, 12, 24])
def test_auto_is_the_largest_divisor_that_fits(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    needed = MemoryCounter(PARAMS, FP32).training(24, fits, 16)
    device_of(monkeypatch, needed / FILLED + 100)
    assert micro_batch_size(PARAMS, FP32, automatic(24), 16) == fits
    if fits > 1:
        device_of(monkeypatch, needed / FILLED - 100)
        assert micro_batch_size(PARAMS, FP32, automatic(24), 16) < fits


def test_auto_on_a_device_that_is_too_small_for_one_image_is_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    device_of(monkeypatch, 1000)
    assert micro_batch_size(PARAMS, FP32, automatic(24), 16) == 1


def test_fewer_visible_patches_and_recomputed_activations_leave_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config, deep = automatic(4096), tiny_params(model={"depth": 9})
    device_of(monkeypatch, MemoryCounter(deep, FP32).training(4096, 256, 16) / FILLED + 100)
    whole, masked = (micro_batch_size(deep, FP32, config, num_visible) for num_visible in (16, 4))
    again = deep.model_copy(update={"compute": deep.compute.model_copy(update={"activation_checkpointing": True})})
    assert whole == 256
    assert masked > whole
    assert micro_batch_size(again, FP32, config, 16) > whole


def test_what_is_taken_otherwise_leaves_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tiny_params(model={"dim": 256, "depth": 9})
    device_of(monkeypatch, MemoryCounter(wide, FP32).training(64, 16, 16) / FILLED + 100)
    whole = micro_batch_size(wide, FP32, automatic(64), 16)
    assert whole == 16
    assert micro_batch_size(wide, FP32, automatic(64), 16, taken=1_000_000) < whole


def test_ranks_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device_of(monkeypatch, 2 * MemoryCounter(PARAMS, FP32).training(12, 6, 16) / FILLED + 100)
    assert micro_batch_size(PARAMS, FP32, automatic(24), 16, num_ranks=2) == 6


def test_a_cpu_gives_half_of_the_machine() -> None:
    import psutil

    assert Compute(torch.device("cpu"), autocast=False, threads=1).memory_bytes == psutil.virtual_memory().total // 2
