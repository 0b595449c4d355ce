"""Opening what earlier stages made; the runner has checked that it is there and up to date."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.base.checksums import checked, file_sha256
from maskdm.base.errors import UserError
from maskdm.config import Params, Training, paths
from maskdm.data.arrays import ImageArrays, StoredImages


def open_data(params: Params, verify: bool = False, folder: Path = paths.DATA) -> ImageArrays:
    """The prepared dataset.

    Args:
        params: say its shape.
        verify: check that every file is the one that was written; where its pixels are used.
        folder: where it lies.

    Raises:
        UserError: it is missing, damaged, or of another shape than params say.
    """
    images = ImageArrays.open(folder)
    expected = params.dataset.shape
    if images.shape != expected:
        shape, wanted = ("×".join(map(str, sides)) for sides in (images.shape, expected))
        raise UserError(
            f"the images in {folder} are {shape}, but params.yaml says {wanted}; run first: maskdm prepare --force"
        )
    if verify:
        images.verify(paths.WORK / f"verified{'' if folder == paths.DATA else '-' + folder.name}.json")
    return images


def open_training_data(training: Training, verify: bool = False) -> ImageArrays:
    """What a training stage sees: in pretraining the one of `datasets` that the arm names, else the dataset.

    Raises:
        UserError: as `open_data`.
    """
    config = training.params.pretrain_of(training.arm)
    other = config.dataset if training.stage == "pretrain" else None
    return open_data(training.params, verify, paths.DATA if other is None else paths.pretrain_data(other))


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


def read_json(path: Path, stage: str) -> Any:
    """The content of a description that an earlier stage has published.

    Raises:
        UserError: it is missing or damaged; names the stage that makes it.
    """
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, stage, error) from None


def read_array(path: Path, stage: str, sha256: str) -> np.ndarray:
    """An array of an earlier stage, memory-mapped.

    Args:
        path: the .npy file.
        stage: which makes it.
        sha256: of the file that the stage wrote.

    Raises:
        UserError: it is missing or damaged; names the stage that makes it.
    """
    try:
        if file_sha256(path) != sha256:
            raise ValueError("it is not the file that was written: its sha256 differs")
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # what NumPy raises for a header of nonsense may be almost anything
        raise _damaged(path, stage, error) from None
    return array


def _damaged(path: Path, stage: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path} can't be read ({reason}); delete its folder and run the {stage} stage again")
