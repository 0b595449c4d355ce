"""What a killed process had built half: never read as a result, and in nobody's way but the disk's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from maskdm import paths
from maskdm.doctor.findings import Finding, info, ok, size_of
from maskdm.doctor.holding import at_work, outputs
from maskdm.plan.units import size

SUFFIXES = (".building", ".old")


def check() -> list[Finding]:
    """Look for what nobody who is at work can be building."""
    left = [path for path in (*_below_results(), *_below_work()) if not _is_in_use(path)]
    return [_left_over(path) for path in left] or [ok("none")]


def _left_over(path: Path) -> Finding:
    return info(
        f"{path}: left half-built by a process that was killed ({size(size_of(path))}); it is never read as a result",
        f"the next run of its stage replaces it; to remove it now: rm -r {path}",
        partial(_remove, path),
    )


def _below_results() -> Iterator[Path]:
    """The outputs in results/.building, not what is in them."""
    return _half_built(paths.BUILDING)


def _below_work() -> Iterator[Path]:
    """The temporary files and folders of work folders; those of tracking are its sender's."""
    folders = sorted(paths.WORK.iterdir()) if paths.WORK.is_dir() else []
    for folder in folders:
        if folder.is_dir() and folder.name != "tracking":
            yield from _half_built(folder)


def _half_built(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(SUFFIXES):
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _half_built(path)


def _is_in_use(path: Path) -> bool:
    """Whether a stage that is at work builds there."""
    top = paths.BUILDING if paths.BUILDING in path.parents else paths.WORK
    place = path.relative_to(top).with_suffix("")
    return any(_overlap(place, output) for what in at_work() for output in outputs(what))


def _overlap(one: Path, other: Path) -> bool:
    """Whether one path is the other, or below it; a work folder has its output's name without a suffix."""
    names = (other, other.with_suffix(""))
    return any(one == name or name in one.parents or one in name.parents for name in names)


def _remove(path: Path) -> str:
    if _is_in_use(path):  # its stage has started since
        return "left it to the stage that has started meanwhile"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return "removed it"
