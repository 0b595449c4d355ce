"""Training batches as a pure function of (seed, step): no loader state to save, nothing to restart."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from maskdm import rng


class Images(Protocol):
    """What batches are drawn from (see `maskdm.data.arrays.ImageArrays`)."""

    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """The images of these indices, uint8 (B, H, W, C)."""


class Batches:
    """Shuffled epochs, one after another, cut into batches.

    Args:
        images: the dataset.
        batch_size: B.
        seed: of the experiment.
        stream: names the use, so that pretraining and finetuning see different orders.
        device: where the batches go.
        with_labels: whether labels are wanted.

    Raises:
        ValueError: labels are wanted and the dataset has none.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        stream: str,
        device: torch.device,
        with_labels: bool = False,
    ) -> None:
        if with_labels and images.labels is None:
            raise ValueError("a class-conditional model needs a dataset with labels")
        self.images, self.batch_size, self.device = images, batch_size, device
        self._seed, self._stream, self._with_labels = seed, stream, with_labels
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The batch of a step (from 0): images in [−1, 1] (B, C, H, W), and labels (B,) or None."""
        indices = self.indices(step)
        x_0 = to_model_range(torch.from_numpy(self.images.gather(indices)).to(self.device, non_blocking=True))
        if not self._with_labels or self.images.labels is None:
            return x_0, None
        return x_0, torch.from_numpy(self.images.labels[indices]).to(self.device)

    def indices(self, step: int) -> np.ndarray:
        """Which images make up the batch of a step: (B,) int64; an epoch's end may lie inside."""
        first, count = step * self.batch_size, len(self.images)
        position = np.arange(first, first + self.batch_size)
        epochs = position // count
        parts = [self._epoch_order(int(e))[position[epochs == e] % count] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = rng.generator(self._seed, f"{self._stream}/order", epoch)
            self._order = torch.randperm(len(self.images), generator=generator).numpy()
            self._epoch = epoch
        return self._order


def to_model_range(images: Tensor) -> Tensor:
    """uint8 (B, H, W, C) → float32 in [−1, 1], (B, C, H, W)."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [−1, 1], (B, C, H, W) → uint8 (B, H, W, C), rounded: the inverse of `to_model_range`."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
