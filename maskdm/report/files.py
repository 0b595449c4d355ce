"""Opening what the stages left behind, or saying what is wrong with it and which command makes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm.checksums import checked
from maskdm.formats import CURVE_COLUMNS


class UnusableError(Exception):
    """A result that cannot be shown.

    Args:
        reason: what is wrong, with the file.
        command: what makes it anew.
    """

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(f"{reason}: run `{command}`")
        self.reason, self.command = reason, command


def read_json(file: Path, made_by: str, keys: Iterable[str]) -> dict[str, Any]:
    """The content of a JSON file with at least these keys.

    Raises:
        UnusableError: it is missing, unreadable, or lacks one.
    """
    try:
        content = checked(json.loads(file.read_text(encoding="utf-8")), is_required=False)
    except (OSError, ValueError) as error:
        raise _unreadable(file, made_by, error) from error
    require(content, keys, str(file), made_by)
    return content


def require(content: Any, keys: Iterable[str], where: str, made_by: str) -> None:
    """Raises: UnusableError, if a mapping lacks a key, or is none."""
    missing = [k for k in keys if k not in content] if isinstance(content, dict) else list(keys)
    if missing:
        raise UnusableError(f"{where} lacks {', '.join(missing)}", made_by)


def read_curve(file: Path, made_by: str) -> pd.DataFrame:
    """A curve.csv.

    Raises:
        UnusableError: it is missing, unreadable, or lacks a column.
    """
    try:
        curve = pd.read_csv(file, dtype="float64")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise _unreadable(file, made_by, error) from error
    require(dict.fromkeys(curve.columns), CURVE_COLUMNS, str(file), made_by)
    return curve


def open_images(file: Path, made_by: str) -> np.ndarray:
    """uint8 images (N, H, W, 1 or 3), memory-mapped.

    Raises:
        UnusableError: they are missing, unreadable, or no images.
    """
    try:
        images: np.ndarray = np.load(file, mmap_mode="r")
    except OSError as error:
        raise _unreadable(file, made_by, error) from error
    except Exception as error:  # NumPy takes what it cannot read for a pickle, and talks of that, or fails oddly
        raise UnusableError(f"{file} cannot be read (not a .npy file, or cut off)", made_by) from error
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or not len(images):
        found = f"{images.dtype} {images.shape}"
        raise UnusableError(f"{file}: expected uint8 images (N, H, W, 1 or 3), got {found}", made_by)
    return images


def _unreadable(file: Path, made_by: str, error: Exception) -> UnusableError:
    if isinstance(error, FileNotFoundError):
        return UnusableError(f"{file} is missing", made_by)
    return UnusableError(f"{file} cannot be read ({' '.join(str(error).split())})", made_by)
