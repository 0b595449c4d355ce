"""Opening what the stages left behind, or saying what is wrong with it and which command makes it.

Stamps say before that an output is there and what it was made from. What is left for reading to find: bits that have
changed since in files of the right size, records that no stamp has the hash of, and files that may not be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm.base.checksums import checked, file_sha256
from maskdm.config.jobs import Job
from maskdm.config.stamps import read_stamp

FORCE = " --force"  # for what no stamp can see: without it the stage says that its output is up to date


class UnusableError(Exception):
    """A result that cannot be shown.

    Args:
        reason: what is wrong, with the file.
        command: what makes it anew.
    """

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(f"{reason}: run `{command}`")
        self.reason, self.command = reason, command


@contextmanager
def reading(file: Path, made_by: str) -> Iterator[None]:
    """Whatever goes wrong in the block is the file's fault.

    Raises:
        UnusableError: it is missing or damaged.
    """
    try:
        yield
    except Exception as error:  # what NumPy and pandas raise for nonsense may be almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnusableError(f"{file} cannot be read ({reason})", made_by + FORCE) from error


def require_current(job: Job) -> None:
    """Raises: UnusableError, if the output of a stage is missing or not what params.yaml asks for."""
    if reason := job.why_outdated():
        raise UnusableError(reason, job.first.command)


def read_json(file: Path, made_by: str) -> dict[str, Any]:
    """The content of a description or record.

    Raises:
        UnusableError: it is not what was written.
    """
    with reading(file, made_by):
        return dict(checked(json.loads(file.read_bytes())))


def read_curve(job: Job) -> pd.DataFrame:
    """The curve.csv of a training stage.

    Raises:
        UnusableError: it is not what was written.
    """
    file, stamp = job.output / "curve.csv", read_stamp(job.output)
    with reading(file, job.command):
        if stamp is None or file_sha256(file) != stamp.files[file.name]["sha256"]:
            raise ValueError("it is not the file that was written: its sha256 differs")
        return pd.read_csv(file, dtype="float64")


def open_images(file: Path, shape: tuple[int, int, int], made_by: str) -> np.ndarray:
    """uint8 images (N, H, W, C), memory-mapped; they may be too many to look at them all.

    Raises:
        UnusableError: they are missing, unreadable, or no images of this shape.
    """
    with reading(file, made_by):
        images: np.ndarray = np.load(file, mmap_mode="r")
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise ValueError(f"expected uint8 images {shape}, got {images.dtype} {images.shape}")
        return images
