"""The real images of an experiment: the part that is trained on, the part held out, or both as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from maskdm.config import Params, paths
from maskdm.data.arrays import ImageArrays
from maskdm.data.inputs import open_data
from maskdm.data.stored_images import StoredImages


@dataclass(frozen=True)
class Dataset:
    """The dataset of params as it lies in results/data.

    Attributes:
        train: what is trained on.
        held_out: what is not; None where nothing is held out.
    """

    train: ImageArrays
    held_out: ImageArrays | None

    @property
    def all(self) -> StoredImages:
        """Every image: what the classifier, which is a ruler and no competitor, is trained on."""
        return StoredImages([self.train] if self.held_out is None else [self.train, self.held_out])

    def reference(self, which: str) -> StoredImages:
        """The real images that samples are compared with.

        Args:
            which: `evaluation.reference`.
        """
        if which == "held_out":
            assert self.held_out is not None, "the schema asks for dataset.held_out"
            return StoredImages([self.held_out])
        return self.all if which == "all" else StoredImages([self.train])

    @property
    def hashes(self) -> dict[str, Any]:
        """What results/features must have been made from."""
        return {"data_sha256": self.train.sha256, "held_out_sha256": self.held_out and self.held_out.sha256}


def open_dataset(params: Params, verify: bool = False) -> Dataset:
    """Both parts of the dataset.

    Args:
        params: say the shape, and whether anything is held out.
        verify: check that every file is the one that was written.

    Raises:
        UserError: a part is missing, damaged or of another shape.
    """
    train = open_data(params, verify)
    held_out = open_data(params, verify, paths.HELD_OUT) if params.dataset.held_out else None
    return Dataset(train, held_out)
