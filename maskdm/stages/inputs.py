"""Opening what an earlier stage made, or saying which command makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from maskdm import paths
from maskdm.checksums import checked, file_sha256
from maskdm.config import Params
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


def open_data(params: Params, verify: bool = False, folder: Path = paths.DATA) -> ImageArrays:
    """The prepared dataset.

    Args:
        params: say its shape.
        verify: check that every file is the one that was written; where its pixels are used.
        folder: where it lies.

    Raises:
        UserError: it is missing, damaged, or of another shape than params say.
    """
    require(folder, "prepare")
    images = ImageArrays.open(folder)
    expected = params.dataset.shape
    if images.shape != expected:
        raise UserError(
            f"the images in {folder} are {_times(images.shape)}, but params.yaml says {_times(expected)}; "
            "run first: maskdm prepare"
        )
    if verify:
        images.verify(paths.WORK / f"verified{'' if folder == paths.DATA else '-' + folder.name}.json")
    return images


def open_pretraining_data(params: Params, arm: str, verify: bool = False) -> ImageArrays:
    """What an arm is pretrained on: the one of `datasets` that it names, else the dataset.

    Raises:
        UserError: as `open_data`.
    """
    name = params.pretrain_of(arm).dataset
    return open_data(params.for_pretraining(arm), verify, paths.DATA if name is None else paths.pretrain_data(name))


def with_chosen_values(params: Params, arm: str) -> Params:
    """The params that an arm runs with: those of the trial that the stage `choose` took.

    Raises:
        UserError: it has not run, or for other params.
    """
    chosen = read_json(require(paths.chosen(arm), "choose"), "choose")
    if chosen["trial"] is None:
        raise UserError(
            f"every trial of arm {arm} has failed ({chosen['failed']}): it can't run; give tuning.trials smaller "
            "learning rates, or remove the arm"
        )
    given = params.tuning.trials.get(chosen["trial"]) if params.tuning.enabled else {}
    if chosen["values"] != given:
        raise UserError(
            f"{paths.chosen(arm)} says trial {chosen['trial']!r} with {chosen['values']}, which is not in params.yaml; "
            "run first: maskdm choose"
        )
    return params.with_values(arm, chosen["values"]) if params.tuning.enabled else params


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


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape)
