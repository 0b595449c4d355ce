"""Outputs appear whole or not at all: built beside, synced, moved into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.errors import UserError


@contextmanager
def publish_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well, it becomes `output`.

    A reader sees the old folder, none, or the new one, never a part of it. When the block raises, what was built
    is removed and an existing `output` stays as it was.

    Raises:
        UserError: the place can't be written.
    """
    building = paths.building(output)
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(output, error) from error
    try:
        yield building
        for file in sorted(building.rglob("*")):
            if file.is_file():
                _sync(file)
        _replace_folder(building, output)
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        _remove_empty(building.parent)


def _remove_empty(folder: Path) -> None:
    """Remove the folders made to build in, as far as nobody else builds there."""
    while paths.BUILDING in (folder, *folder.parents):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def publish_text(output: Path, text: str) -> None:
    """Write a small file whole.

    Raises:
        UserError: the place can't be written.
    """
    building = output.with_name(output.name + ".building")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        building.write_text(text, encoding="utf-8")
        _sync(building)
        building.replace(output)
    except OSError as error:
        raise cannot_write(output, error) from error


def publish_json(output: Path, content: Any) -> None:
    """Write plain values as readable JSON, whole; equal values give equal bytes.

    Raises:
        UserError: the place can't be written.
    """
    publish_text(output, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def cannot_write(output: Path, error: OSError) -> UserError:
    """What to tell a user who may not, or can't, write there."""
    return UserError(
        f"cannot write {output}: {error.strerror or error} (free space, or permissions of {output.parent}?)"
    )


def _replace_folder(building: Path, output: Path) -> None:
    if output.exists():
        old = building.with_name(output.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        building.rename(output)
        shutil.rmtree(old)
    else:
        building.rename(output)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
