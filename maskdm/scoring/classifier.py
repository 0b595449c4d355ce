"""A small classifier trained on the dataset's own labels, whose penultimate layer scores samples.

It stands in for Inception where no pretrained weights can be had and the images are nothing like photographs.
Its numbers compare arms on one dataset with one such classifier, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm.base import rng
from maskdm.base.progress import progress
from maskdm.data.batches import to_model_range
from maskdm.training.optimizer import EagerAdam

FEATURE_DIM = 64
BATCH_SIZE = 64
HELD_OUT = 0.2


class Pixels(Protocol):
    """Images that are had by their indices, as an array in memory or on disk: uint8 (N, H, W, C)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""


class Classifier(nn.Module):
    """Three convolutions and two linear layers.

    Args:
        channels: of the images.
        num_classes: of the labels.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.features = nn.Linear(256, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, num_classes)
        self.rms: Tensor
        self.register_buffer("rms", torch.ones(()))

    def embed(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], (B, C, H, W) → features (B, 64), of mean square 1 over the training images.

        Without that scale KID's cubic kernel would give numbers that depend on how large the features happen to be.
        """
        return self._penultimate(images) / self.rms

    def forward(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], (B, C, H, W) → logits (B, classes)."""
        return self.head(self._penultimate(images))

    def _penultimate(self, images: Tensor) -> Tensor:
        return F.relu(self.features(self.convolutions(images)))


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier and how well it does.

    Attributes:
        model: the network, in evaluation mode.
        accuracy: on the held-out fifth of the images, in [0, 1].
    """

    model: Classifier
    accuracy: float


def train_classifier(images: Pixels, labels: np.ndarray, num_classes: int, num_epochs: int) -> TrainedClassifier:
    """Train on four fifths of the images, measure on the rest; the same bytes every time.

    Args:
        images: uint8 (N, H, W, C); read batch by batch.
        labels: int64 (N,).
        num_classes: of the labels.
        num_epochs: passes over the training part.
    """
    model = Classifier(images.shape[-1], num_classes)
    _initialise(model)
    order = torch.randperm(len(images), generator=rng.generator(0, "classifier/split")).numpy()
    num_held_out = max(1, round(HELD_OUT * len(images)))
    held_out, train = order[:num_held_out], order[num_held_out:]
    optimizer = EagerAdam(model.parameters(), lr=1e-3, fused=True)
    for epoch in progress(range(num_epochs), num_epochs, "classifier", "epoch"):
        _train_epoch(model, optimizer, images, labels, train, epoch)
    _normalise(model, images, train)
    return TrainedClassifier(model.eval(), _accuracy(model, images, labels, held_out))


def _train_epoch(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    images: Pixels,
    labels: np.ndarray,
    train: np.ndarray,
    epoch: int,
) -> None:
    order = train[torch.randperm(len(train), generator=rng.generator(0, "classifier/order", epoch)).numpy()]
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        logits = model(to_model_range(torch.from_numpy(images[chosen])))
        loss = F.cross_entropy(logits, torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def _normalise(model: Classifier, images: Pixels, train: np.ndarray) -> None:
    squares = [model.embed(batch).square().mean(1) for batch in _batches(images, train)]
    model.rms.copy_(torch.cat(squares).mean().sqrt())


@torch.inference_mode()
def _accuracy(model: Classifier, images: Pixels, labels: np.ndarray, held_out: np.ndarray) -> float:
    predicted = torch.cat([model(batch).argmax(1) for batch in _batches(images, held_out)])
    return float((predicted == torch.from_numpy(labels[held_out])).float().mean())


def _batches(images: Pixels, indices: np.ndarray, batch_size: int = 1024) -> Iterator[Tensor]:
    for start in range(0, len(indices), batch_size):
        yield to_model_range(torch.from_numpy(images[indices[start : start + batch_size]]))


def _initialise(model: Classifier) -> None:
    generator = rng.generator(0, "classifier/init")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
