"""Training batches as a pure function of (seed, step): no loader state to save, nothing to restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from maskdm.base import rng

RESIDENT_SHARE = 4  # the dataset may take so much of a GPU's memory: one part in
UPLOADED_AT_ONCE = 8192  # images
STEPS_AT_ONCE, BYTES_AT_ONCE = 16, 2**20  # whose batches are made together on a CPU; of their float32 pixels, at most


class Images(Protocol):
    """What batches are drawn from (see `maskdm.data.arrays.ImageArrays`)."""

    labels: np.ndarray | None

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The images of these indices, uint8 (B, H, W, C)."""


class Batches:
    """Shuffled epochs, one after another, cut into batches.

    On a CPU small batches are made for up to 16 steps together: between the steps of a network, which fill the caches,
    the calls that make one take several times as long as one batch after another. For a GPU either all images are
    kept in its memory as uint8, and nothing but indices goes there in a step; or the next batch is gathered into pinned
    memory by another thread, and copied asynchronously, while the GPU works on this one. The batches are the same.

    Args:
        images: the dataset.
        batch_size: B, of all ranks together.
        seed: of the experiment.
        stream: names the use, so that pretraining and finetuning see different orders.
        device: where the batches go.
        with_labels: whether labels are wanted.
        resident: whether the images are kept on the device.
        rank: of this process among those that share a batch.
        num_ranks: how many they are; each gets B / num_ranks images, in the order of their ranks.

    Attributes:
        steps_at_once: how many steps' batches are made together, at the first that is asked for.

    Raises:
        ValueError: labels are wanted and the dataset has none, or the batch can't be shared evenly.
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
        """Which images make up the batch of a step, of all ranks: (B,) int64; an epoch's end may lie inside."""
        first, count = step * self.batch_size, len(self.images)
        epoch, start = divmod(first, count)
        if start + self.batch_size <= count:
            return self._epoch_order(epoch)[start : start + self.batch_size]
        position = np.arange(first, first + self.batch_size)
        epochs = position // count
        parts = [self._epoch_order(int(e))[position[epochs == e] % count] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _make(self, first: int) -> tuple[Tensor, Tensor | None]:
        """The batches of this and the next steps that are made together: images one after another, labels or None."""
        pixels, indices = self._prefetch(first) if self._prefetch is not None else self._gather(first)
        x_0 = to_model_range(pixels.to(self.device, non_blocking=True))
        if self._labels is None:
            return x_0, None
        return x_0, self._labels[indices.to(self.device, non_blocking=True)]

    def _gather(self, first: int) -> tuple[Tensor, Tensor]:
        """The same as pixels (…, H, W, C) uint8, and the images' indices; pinned if they are to be copied."""
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
    """Gathers the batch of the next step in another thread while this one is worked on.

    Args:
        gather: step → pixels and indices.
    """

    def __init__(self, gather: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self._gather = gather
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """What `gather` gives for a step; steps may come in any order."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._gather, step)
        batch = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._gather, step + 1)
        return batch

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


def is_resident(choice: Literal["auto"] | bool, images: Images, device: torch.device, memory_bytes: int) -> bool:
    """Whether the images are to be kept on the device: by `auto`, on a GPU where they fit."""
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
