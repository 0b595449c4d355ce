"""A small classifier trained on the dataset's own labels; its penultimate layer gives the features for scoring.

It replaces Inception where the images are unlike photographs, or pretrained weights cannot be downloaded. Its scores
are comparable only between arms scored on one dataset with one such classifier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskdm.base import rng
from maskdm.base.errors import UserError
from maskdm.base.progress import progress
from maskdm.base.tensors import load_into, load_tensors, save_tensors
from maskdm.data.batches import to_model_range
from maskdm.training.optimizer import EagerAdam

FEATURE_DIM = 64
BATCH_SIZE = 64
HELD_OUT = 0.2
BLOCK = 1024  # images per forward pass without training


class Pixels(Protocol):
    """Images that can be indexed, in memory or on disk: uint8 (N, H, W, C)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""


class Classifier(nn.Module):
    """Three convolutions and two linear layers.

    Args:
        channels: number of channels of the images.
        num_classes: number of classes.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "num_classes": num_classes}
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
        """Images in [−1, 1], (B, C, H, W) → features (B, 64) with mean square 1 over the training images.

        Without this scaling KID's cubic kernel would depend on the arbitrary size of the features.
        """
        return self._penultimate(images) / self.rms

    def forward(self, images: Tensor) -> Tensor:
        """Images in [−1, 1], (B, C, H, W) → logits (B, classes)."""
        return self.head(self._penultimate(images))

    def _penultimate(self, images: Tensor) -> Tensor:
        return F.relu(self.features(self.convolutions(images)))


def train_classifier(images: Pixels, labels: np.ndarray, num_classes: int, num_epochs: int) -> tuple[Classifier, float]:
    """Train on four fifths of the images and measure accuracy on the rest; equal arguments give equal bytes.

    Args:
        images: uint8 (N, H, W, C); read batch by batch.
        labels: int64 (N,).
        num_classes: number of classes.
        num_epochs: passes over the training part.

    Returns:
        the network in evaluation mode, and its accuracy on the held-out fifth, in [0, 1].
    """
    model, targets = Classifier(images.shape[-1], num_classes), torch.tensor(labels)
    _initialise(model)
    order = torch.randperm(len(images), generator=rng.generator(0, "classifier/split"))
    held_out, train = order.tensor_split([max(1, round(HELD_OUT * len(images)))])
    optimizer = EagerAdam(model.parameters(), lr=1e-3, fused=True)
    for epoch in progress(range(num_epochs), num_epochs, "classifier", "epoch"):
        order = torch.randperm(len(train), generator=rng.generator(0, "classifier/order", epoch))
        for rows in train[order].split(BATCH_SIZE):
            loss = F.cross_entropy(model(_batch(images, rows)), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        squares = [model.embed(_batch(images, rows)).square().mean(1) for rows in train.split(BLOCK)]
        model.rms.copy_(torch.cat(squares).mean().sqrt())
        predicted = torch.cat([model(_batch(images, rows)).argmax(1) for rows in held_out.split(BLOCK)])
    return model.eval(), float((predicted == targets[held_out]).float().mean())


def _initialise(model: Classifier) -> None:
    generator = rng.generator(0, "classifier/init")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)


def _batch(images: Pixels, rows: Tensor) -> Tensor:
    """The images of indices (B,), in [−1, 1]: (B, C, H, W)."""
    return to_model_range(torch.from_numpy(images[rows.numpy()]))


def write_classifier(path: Path, images: Pixels, labels: np.ndarray, num_classes: int, num_epochs: int) -> float:
    """`train_classifier`, then write the network to a file; returns its held-out accuracy."""
    model, accuracy = train_classifier(images, labels, num_classes, num_epochs)
    save_tensors(path, {"classifier": model.state_dict()}, {"architecture": model.sizes, "accuracy": accuracy})
    return accuracy


def load_classifier(path: Path) -> Classifier:
    """Load a network that `write_classifier` wrote, in evaluation mode.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    states, info = load_tensors(path)
    state = states.get("classifier", {})
    try:
        sizes = {"channels": state["convolutions.0.weight"].shape[1], "num_classes": state["head.weight"].shape[0]}
    except (KeyError, IndexError):
        sizes = None
    if sizes is None or info.get("architecture") != sizes:
        raise UserError(f"{path} holds no classifier; run first: maskdm features --force")
    model = Classifier(**sizes)
    load_into(model, state, path)
    return model.eval()
