"""Prepared datasets as one row of images, read from disk when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskdm.base.checksums import values_sha256
from maskdm.data.arrays import ImageArrays


@dataclass(frozen=True)
class StoredImages:
    """One prepared dataset or more of the same shape and classes, one behind the other: uint8 (N, H, W, C)."""

    parts: Sequence[ImageArrays]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return len(self), *self.parts[0].shape

    @property
    def sha256(self) -> str:
        """Of the images and labels: of one part its own."""
        hashes = [part.sha256 for part in self.parts]
        return hashes[0] if len(hashes) == 1 else values_sha256(hashes)

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return self.parts[0].num_classes

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64, or None."""
        labels = [part.labels for part in self.parts if part.labels is not None]
        return np.concatenate(labels) if len(labels) == len(self.parts) else None

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The images of a slice, or of indices (B,), in their order: (B, H, W, C)."""
        indices = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        out = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        start = 0
        for part in self.parts:
            here = (indices >= start) & (indices < start + len(part))
            out[here] = part.gather(indices[here] - start)
            start += len(part)
        return out
