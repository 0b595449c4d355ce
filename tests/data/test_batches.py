"""Batches are a pure function of (seed, step), and every epoch shows every image once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskdm.data.batches import Batches, Prefetch, is_resident, to_model_range, to_uint8
from tests.factories import CPU, ArrayImages

ALL_VALUES = np.arange(256, dtype=np.uint8)


def numbered(count: int, labelled: bool = False) -> ArrayImages:
    """1×1 RGB images whose red is their number."""
    pixels = np.zeros((count, 1, 1, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return ArrayImages(pixels, np.arange(count, dtype=np.int64) * 10 if labelled else None)


def batches_of(
    count: int, batch_size: int, seed: int = 0, stream: str = "pretrain", with_labels: bool = False
) -> Batches:
    return Batches(numbered(count, with_labels), batch_size, seed, stream, CPU, with_labels)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 50))


@given(sizes, st.integers(0, 5))
@settings(deadline=None)
def test_every_epoch_is_a_permutation_of_the_dataset(size: tuple[int, int], seed: int) -> None:
    count, batch_size = size
    batches = batches_of(count, batch_size, seed)
    num_steps = -(-3 * count // batch_size)
    stream = np.concatenate([batches.indices(step) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_batch_may_cross_the_end_of_an_epoch_and_hold_several() -> None:
    count, batches = 5, batches_of(5, 12)
    first = batches.indices(0)
    assert first.shape == (12,)
    assert first.dtype == np.int64
    assert sorted(first[:5]) == sorted(first[5:10]) == list(range(count))
    assert sorted([*first[10:], *batches.indices(1)[:3]]) == list(range(count))


@given(sizes, st.lists(st.integers(0, 200), min_size=1, max_size=10))
@settings(deadline=None)
def test_a_batch_depends_on_its_step_and_not_on_what_was_asked_before(size: tuple[int, int], steps: list[int]) -> None:
    used = batches_of(*size)
    for step in steps:
        np.testing.assert_array_equal(used.indices(step), batches_of(*size).indices(step))


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": "finetune"}])
def test_another_seed_or_stream_is_another_order(other: dict[str, int | str]) -> None:
    assert not np.array_equal(batches_of(100, 50).indices(0), batches_of(100, 50, **other).indices(0))  # type: ignore[arg-type]


def test_epochs_are_in_different_orders() -> None:
    batches = batches_of(100, 100)
    assert not np.array_equal(batches.indices(0), batches.indices(1))


def test_a_batch_holds_the_images_and_labels_of_its_indices() -> None:
    batches = batches_of(20, 6, with_labels=True)
    x_0, labels = batches(3)
    assert x_0.shape == (6, 3, 1, 1)
    assert x_0.dtype == torch.float32
    assert labels is not None
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(to_uint8(x_0)[:, 0, 0, 0], batches.indices(3))
    np.testing.assert_array_equal(labels, batches.indices(3) * 10)


@given(sizes, st.lists(st.integers(0, 60), min_size=1, max_size=5), st.booleans(), st.integers(0, 1))
@settings(deadline=None, max_examples=25)
def test_batches_made_for_several_steps_together_are_those_made_one_by_one(
    size: tuple[int, int], steps: list[int], resident: bool, rank: int
) -> None:
    count, share = size
    how = {"with_labels": True, "resident": resident, "rank": rank, "num_ranks": 2}
    together = Batches(numbered(count, labelled=True), 2 * share, 0, "pretrain", CPU, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskdm.data.batches.STEPS_AT_ONCE", 1)
        one_by_one = Batches(numbered(count, labelled=True), 2 * share, 0, "pretrain", CPU, **how)
    assert (together.steps_at_once, one_by_one.steps_at_once) == (16, 1)
    for step in [*steps, *range(steps[-1], steps[-1] + 20)]:
        for some, other in zip(together(step), one_by_one(step), strict=True):
            assert some is not None
            assert other is not None
            assert torch.equal(some, other)


@pytest.mark.parametrize(("side", "steps"), [(1, 16), (52, 16), (53, 15), (147, 2), (148, 1), (512, 1)])
def test_batches_made_together_fit_a_mebibyte_unless_one_does_not(side: int, steps: int) -> None:
    """2 images of float32 in 3 channels: 24 bytes a pixel."""
    images = ArrayImages(np.zeros((4, side, side, 3), dtype=np.uint8))
    assert Batches(images, 2, 0, "pretrain", CPU).steps_at_once == steps


def test_labels_come_only_when_they_are_wanted() -> None:
    assert Batches(numbered(4, labelled=True), 2, 0, "pretrain", CPU)(0)[1] is None
    with pytest.raises(ValueError, match="needs a dataset with labels"):
        Batches(numbered(4), 2, 0, "pretrain", CPU, with_labels=True)


@given(sizes, st.integers(0, 20))
@settings(deadline=None, max_examples=25)
def test_images_kept_on_the_device_give_the_same_batches(size: tuple[int, int], step: int) -> None:
    images = numbered(size[0], labelled=True)
    streamed = Batches(images, size[1], 0, "pretrain", CPU, with_labels=True)
    resident = Batches(images, size[1], 0, "pretrain", CPU, with_labels=True, resident=True)
    for one, other in zip(streamed(step), resident(step), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_whole_upload_takes_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.data.batches.UPLOADED_AT_ONCE", 7)
    images = numbered(30)
    batch, _ = Batches(images, 30, 0, "pretrain", CPU, resident=True)(0)
    assert sorted(to_uint8(batch)[:, 0, 0, 0].tolist()) == list(range(30))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_a_batch_in_order_and_without_overlap(num_ranks: int) -> None:
    images = numbered(50, labelled=True)
    whole, labels = Batches(images, 8, 0, "pretrain", CPU, with_labels=True)(7)
    parts = [
        Batches(images, 8, 0, "pretrain", CPU, with_labels=True, rank=rank, num_ranks=num_ranks)(7)
        for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole)
    assert labels is not None
    assert torch.equal(torch.cat([part[1] for part in parts if part[1] is not None]), labels)


def test_a_batch_that_ranks_can_not_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 9 images can't be shared evenly by 2 ranks"):
        Batches(numbered(20), 9, 0, "pretrain", CPU, num_ranks=2)


def test_the_next_step_is_gathered_ahead_and_a_jump_is_answered_rightly() -> None:
    asked: list[int] = []

    def gather(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(step)
        return torch.tensor([step]), torch.tensor([0])

    prefetch = Prefetch(gather)
    assert [int(prefetch(step)[0]) for step in (0, 1, 2, 10, 11, 0)] == [0, 1, 2, 10, 11, 0]
    prefetch.close()
    assert asked[:4] == [0, 1, 2, 3], "one step ahead of what was asked for"


def test_an_error_of_the_other_thread_reaches_the_caller() -> None:
    def gather(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise OSError(f"no images at {step}")

    with pytest.raises(OSError, match="no images at 3"):
        Prefetch(gather)(3)


def test_images_stay_on_a_gpu_if_they_take_at_most_a_quarter_of_it() -> None:
    images, gpu = numbered(40), torch.device("cuda")  # 120 bytes
    assert is_resident("auto", images, gpu, 480)
    assert not is_resident("auto", images, gpu, 476)
    assert not is_resident("auto", images, CPU, 480), "a CPU has them in memory anyway"
    assert is_resident(True, images, gpu, 1)
    assert not is_resident(False, images, gpu, 480)


def test_all_256_values_survive_the_round_trip() -> None:
    images = torch.from_numpy(ALL_VALUES).reshape(1, 16, 16, 1)
    x = to_model_range(images)
    assert x.shape == (1, 1, 16, 16)
    assert x.min() == -1
    assert x.max() == 1
    assert torch.equal(to_uint8(x), images)
    np.testing.assert_allclose(x.flatten(), ALL_VALUES / 127.5 - 1, atol=1e-6)


def test_pixels_are_rounded_to_the_nearest_and_clamped() -> None:
    x = torch.tensor([-7.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 1.001, 50.0]).reshape(1, 1, 2, 4)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_channels_move_to_where_the_network_wants_them_and_back() -> None:
    images = torch.randint(256, (2, 3, 5, 3), generator=torch.Generator().manual_seed(0)).byte()
    x = to_model_range(images)
    assert x.shape == (2, 3, 3, 5)
    assert torch.equal(to_uint8(x), images)
    assert torch.equal(to_uint8(x)[1, 2, 4], images[1, 2, 4])
