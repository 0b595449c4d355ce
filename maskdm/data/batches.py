"""Training batches as a pure function of (seed, step): there is no loader state to save or restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from maskdm.base import rng

RESIDENT_SHARE = 4  # the dataset may take 1/4 of a GPU's memory
UPLOADED_AT_ONCE = 8192  # images
STEPS_AT_ONCE = 16  # batches made together on a CPU, at most
BYTES_AT_ONCE = 2**20  # of their float32 pixels, at most, unless one batch has more


class Images(Protocol):
    """What batches are drawn from, such as `maskdm.data.arrays.ImageArrays`."""

    labels: np.ndarray | None

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The images of `indices` (B,), uint8 (B, H, W, C)."""


class Batches:
    """Shuffled epochs, one after another, cut into batches.

    On a CPU small batches are made for up to 16 steps at once: one by one they take several times as long, because the
    network's steps in between evict them from the caches. On a GPU either all images stay in its memory as uint8 and a
    step copies only indices; or another thread gathers the next batch into pinned memory, which is copied
    asynchronously while the GPU works on the current one. The batches are the same in all cases.

    Args:
        images: the dataset.
        batch_size: B, of all ranks together.
        seed: the experiment's seed.
        stream: name of the use, so that pretraining and finetuning see different orders.
        device: the device on which batches are returned.
        with_labels: whether to return labels.
        resident: whether to keep all images on the device.
        rank: this process among those that share a batch.
        num_ranks: number of processes that share a batch; each gets B / num_ranks images, in the order of the ranks.

    Attributes:
        steps_at_once: number of steps whose batches are made together, when the first of them is requested.

    Raises:
        ValueError: labels are requested and the dataset has none, or the batch cannot be shared evenly.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        stream: str,
        device: torch.device,
        with_labels: bool = False,
        resident: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if with_labels and images.labels is None:
            raise ValueError("a class-conditional model needs a dataset with labels")
        if batch_size % num_ranks:
            raise ValueError(f"a batch of {batch_size} images can't be shared evenly by {num_ranks} ranks")
        self.images, self.batch_size, self.device = images, batch_size, device
        self._seed, self._stream = seed, stream
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._share = batch_size // num_ranks
        self._own = slice(rank * self._share, (rank + 1) * self._share)
        labels = images.labels if with_labels else None
        self._labels = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(device)
        self._resident = _upload(images, device) if resident else None
        bytes_of_batch = 4 * self._share * math.prod(images.shape)
        fitting = max(1, min(STEPS_AT_ONCE, BYTES_AT_ONCE // bytes_of_batch))
        self.steps_at_once = fitting if device.type == "cpu" else 1
        self._made: tuple[int, Tensor, Tensor | None] | None = None
        self._prefetch = Prefetch(self._gather) if device.type == "cuda" and not resident else None

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """This rank's part of the batch of a step (from 0): images in [−1, 1] (B, C, H, W), and labels (B,) or None."""
        if self.steps_at_once == 1:
            return self._make(step)
        first = step - step % self.steps_at_once
        if self._made is None or self._made[0] != first:
            self._made = first, *self._make(first)
        _, x_0, labels = self._made
        here = slice((step - first) * self._share, (step - first + 1) * self._share)
        return x_0[here], None if labels is None else labels[here]

    def indices(self, step: int) -> np.ndarray:
        """The images in the batch of a step, for all ranks: (B,) int64; a batch may cross the end of an epoch."""
        first, count = step * self.batch_size, len(self.images)
        epoch, start = divmod(first, count)
        if start + self.batch_size <= count:
            return self._epoch_order(epoch)[start : start + self.batch_size]
        position = np.arange(first, first + self.batch_size)
        epochs = position // count
        parts = [self._epoch_order(int(e))[position[epochs == e] % count] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _make(self, first: int) -> tuple[Tensor, Tensor | None]:
        """The batches of `steps_at_once` steps from `first` on, concatenated: images, and labels or None."""
        pixels, indices = self._prefetch(first) if self._prefetch is not None else self._gather(first)
        x_0 = to_model_range(pixels.to(self.device, non_blocking=True))
        if self._labels is None:
            return x_0, None
        return x_0, self._labels[indices.to(self.device, non_blocking=True)]

    def _gather(self, first: int) -> tuple[Tensor, Tensor]:
        """The pixels (…, H, W, C) uint8 of these batches, and the images' indices; in pinned memory for a GPU."""
        own = [self.indices(step)[self._own] for step in range(first, first + self.steps_at_once)]
        indices = torch.from_numpy(np.concatenate(own))
        if self.device.type == "cuda":
            indices = indices.pin_memory()
        if self._resident is not None:
            return self._resident[indices.to(self.device, non_blocking=True)], indices
        pixels = torch.from_numpy(self.images.gather(indices.numpy()))
        return (pixels.pin_memory() if self.device.type == "cuda" else pixels), indices

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = rng.generator(self._seed, f"{self._stream}/order", epoch)
            self._order = torch.randperm(len(self.images), generator=generator).numpy()
            self._epoch = epoch
        return self._order


class Prefetch:
    """Gathers the next step's batch in another thread while the current one is in use.

    Args:
        gather: step → pixels and indices.
    """

    def __init__(self, gather: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self._gather = gather
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The result of `gather` for a step; steps may be requested in any order."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._gather, step)
        batch = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._gather, step + 1)
        return batch

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown()


def is_resident(choice: Literal["auto"] | bool, images: Images, device: torch.device, memory_bytes: int) -> bool:
    """Whether to keep the images on the device; `auto`: on a GPU, if they take at most 1/4 of its memory."""
    if choice == "auto":
        num_bytes = len(images) * math.prod(images.shape)
        return device.type == "cuda" and num_bytes <= memory_bytes // RESIDENT_SHARE
    return choice


def to_model_range(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) → float32 in [−1, 1], (B, C, H, W)."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [−1, 1], (B, C, H, W) → uint8 (B, H, W, C), rounded: the inverse of `to_model_range`."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def _upload(images: Images, device: torch.device) -> Tensor:
    """All images on the device, uint8 (N, H, W, C)."""
    resident = torch.empty(len(images), *images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), UPLOADED_AT_ONCE):
        indices = np.arange(start, min(start + UPLOADED_AT_ONCE, len(images)))
        resident[start : indices[-1] + 1] = torch.from_numpy(images.gather(indices)).to(device)
    return resident
