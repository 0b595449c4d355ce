"""Open the outputs of earlier stages; the runner has checked that they exist and are up to date."""

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
    """Open a prepared dataset.

    Args:
        params: the experiment; it gives the expected shape.
        verify: whether to hash every file; stages that use the pixels do.
        folder: the dataset's folder.

    Raises:
        UserError: the dataset is missing, damaged, or has another shape than params.yaml says.
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
    """Open the dataset that a training stage uses: `pretrain.dataset` of the arm if it pretrains, else the main one.

    Raises:
        UserError: as `open_data`.
    """
    config = training.params.pretrain_of(training.arm)
    other = config.dataset if training.stage == "pretrain" else None
    return open_data(training.params, verify, paths.DATA if other is None else paths.pretrain_data(other))


@dataclass(frozen=True)
class Dataset:
    """The prepared dataset with its two parts.

    Attributes:
        train: the images to train on.
        held_out: the images never trained on; None if nothing is held out.
    """

    train: ImageArrays
    held_out: ImageArrays | None

    @property
    def all(self) -> StoredImages:
        """Every image, held out or not; the classifier that scores samples is trained on all of them."""
        return StoredImages([self.train] if self.held_out is None else [self.train, self.held_out])

    def reference(self, which: str) -> StoredImages:
        """The real images that samples are compared with, by `evaluation.reference`: train, held_out or all."""
        if which == "held_out":
            assert self.held_out is not None, "the schema requires dataset.held_out"
            return StoredImages([self.held_out])
        return self.all if which == "all" else StoredImages([self.train])

    @property
    def hashes(self) -> dict[str, Any]:
        """Digests of both parts, as results/features records them."""
        return {"data_sha256": self.train.sha256, "held_out_sha256": self.held_out and self.held_out.sha256}


def open_dataset(params: Params, verify: bool = False) -> Dataset:
    """Open both parts of the dataset.

    Args:
        params: the experiment.
        verify: whether to hash every file.

    Raises:
        UserError: a part is missing, damaged or has another shape than params.yaml says.
    """
    train = open_data(params, verify)
    held_out = open_data(params, verify, paths.HELD_OUT) if params.dataset.held_out else None
    return Dataset(train, held_out)


def read_json(path: Path, stage: str) -> Any:
    """Read a JSON file with a checksum that an earlier stage wrote.

    Raises:
        UserError: it is missing or damaged; the message names `stage`, which makes it.
    """
    try:
        return checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, stage, error) from None


def read_array(path: Path, stage: str, sha256: str) -> np.ndarray:
    """Memory-map an array that an earlier stage wrote.

    Args:
        path: the .npy file.
        stage: the stage that makes it.
        sha256: the expected hash of the file.

    Raises:
        UserError: it is missing or damaged; the message names `stage`.
    """
    try:
        if file_sha256(path) != sha256:
            raise ValueError("it is not the file that was written: its sha256 differs")
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        raise _damaged(path, stage, error) from None
    return array


def _damaged(path: Path, stage: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path} can't be read ({reason}); delete its folder and run the {stage} stage again")
