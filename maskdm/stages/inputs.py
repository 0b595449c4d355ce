"""Opening what an earlier stage made, or saying which command makes it."""

from __future__ import annotations

from pathlib import Path

from maskdm import paths
from maskdm.data.arrays import ImageArrays
from maskdm.errors import UserError


def require(path: Path, stage: str, arm: str | None = None, seed: int | None = None) -> Path:
    """The path, if an earlier stage has made it.

    Raises:
        UserError: it is missing; says which command makes it.
    """
    if not path.exists():
        which = "" if arm is None else f" --arm {arm} --seed {seed}"
        raise UserError(f"{path} is missing; run first: maskdm {stage}{which}   (or everything: dvc repro)")
    return path


def open_data() -> ImageArrays:
    """The prepared dataset.

    Raises:
        UserError: it is missing or damaged.
    """
    require(paths.DATA, "prepare")
    return ImageArrays.open(paths.DATA)
