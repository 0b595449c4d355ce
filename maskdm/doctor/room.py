"""Room: whether there is space, and whether what has to be written can be written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from maskdm import paths
from maskdm.doctor.dvc_locks import config
from maskdm.doctor.findings import Finding, counted, files_below, ok, problem, size_of
from maskdm.doctor.work_folders import SET_ASIDE, states
from maskdm.plan.units import size

PROBE_BYTES = 64 * 1024
MIN_FREE_BYTES = 100 * 2**20
MIN_FREE_FILES = 1000
STATES_THAT_MUST_FIT = 3  # the two that are kept, and the one that is being written
FOLDERS_NAMED = 3
WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EROFS: "it is read-only",
    errno.EDQUOT: "your quota is used up",
    errno.EACCES: "you have no permission to write there",
    errno.EPERM: "you have no permission to write there",
    errno.EFBIG: "files may not grow that large (ulimit -f)",
    errno.EIO: "the disk reports an error: it may be failing",
    errno.ENOTDIR: "a file is in its place",
}


@dataclass(frozen=True)
class Place:
    """A folder that the pipeline writes to.

    Attributes:
        name: for people.
        folder: it, or where it is missing, the nearest folder above it.
    """

    name: str
    folder: Path


def check() -> list[Finding]:
    """Look at every place that the pipeline writes to."""
    places = _places()
    refused = [finding for place in places if (finding := _probe(place))]
    return [*refused, *_unwritable_below(), *(_space(group) for group in _by_filesystem(places))]


def words_of(error: OSError) -> str:
    """What a refusal of the system means."""
    return WORDS.get(error.errno or 0, error.strerror or str(error))


def _places() -> list[Place]:
    named = {"results": paths.RESULTS, ".work": paths.WORK}
    root = paths.project_root()
    if (root / ".dvc").is_dir():
        named |= {"DVC's cache": cache_folder(root, config(root)), "DVC's locks": root / ".dvc" / "tmp"}
    named["temporary files"] = Path(os.environ.get("TMPDIR") or "/tmp")
    return [Place(name, _existing(folder)) for name, folder in named.items()]


def cache_folder(root: Path, settings: ConfigParser) -> Path:
    """Where a project's DVC keeps the outputs; the setting is relative to the folder of the file that has it."""
    folder = settings.get("cache", "dir", fallback=None)
    return root / ".dvc" / (folder.strip("\"'") if folder else "cache")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _probe(place: Place) -> Finding | None:
    """Write and sync a file without a name, as far as the system knows such."""
    try:
        with tempfile.TemporaryFile(dir=place.folder, prefix=".doctor-") as file:
            file.write(b"\1" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return problem(
            f"{place.name}: {counted(PROBE_BYTES, 'byte')} could not be written to {place.folder.absolute()}: "
            f"{words_of(error)}",
            _what_helps(error, place),
        )
    return None


def _what_helps(error: OSError, place: Place) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"make room, then type the same command again. {_what_may_go(place.folder)}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"become the owner of the folder ({_owner(place.folder)}), or have it opened to you: chmod, chown"
    if error.errno == errno.EROFS:
        return "mount it writable; a disk with errors is often made read-only by the system: see dmesg"
    if error.errno == errno.EFBIG:
        return "raise the limit: ulimit -f unlimited"
    return "until this is mended, nothing can be saved there"


def _unwritable_below() -> Iterator[Finding]:
    """Folders of results and work that this user may not write to, though their top is writable."""
    folders = [
        Path(entry.path)
        for top in (paths.RESULTS, paths.WORK)
        for entry in files_below(top)
        if entry.is_dir(follow_symlinks=False) and not os.access(entry.path, os.W_OK | os.X_OK)
    ]
    if folders:
        more = f" and {len(folders) - FOLDERS_NAMED} more" if len(folders) > FOLDERS_NAMED else ""
        yield problem(
            f"you may not write to {', '.join(map(str, folders[:FOLDERS_NAMED]))}{more} ({_owner(folders[0])}): "
            "their stages will fail when they publish or save",
            "chmod -R u+w, or chown -R to yourself (folders made by a container often belong to root)",
        )


def _by_filesystem(places: list[Place]) -> list[list[Place]]:
    groups: dict[int, list[Place]] = {}
    for place in places:
        groups.setdefault(place.folder.stat().st_dev, []).append(place)
    return list(groups.values())


def _space(group: list[Place]) -> Finding:
    """Judge the free space of the places of one filesystem."""
    names, folder = ", ".join(place.name for place in group), group[0].folder
    disk = os.statvfs(folder)
    free, need = disk.f_bavail * disk.f_frsize, _need(group)
    if free < need:
        return problem(
            f"{names}: {size(free)} free, and at least {size(need)} should be{_because(need)}",
            f"make room before you go on. {_what_may_go(folder)}",
        )
    if disk.f_files and disk.f_favail < MIN_FREE_FILES:
        return problem(
            f"{names}: room for {counted(disk.f_favail, 'more file')} only (inodes), though {size(free)} are free",
            f"remove many small files. {_what_may_go(folder)}",
        )
    return ok(f"{names}: writable, {size(free)} free")


def _need(group: list[Place]) -> int:
    """The free bytes that a filesystem should have; states are only saved in .work and published to results."""
    if not {place.name for place in group} & {"results", ".work"}:
        return MIN_FREE_BYTES
    return max(MIN_FREE_BYTES, STATES_THAT_MUST_FIT * max(map(size_of, states(paths.WORK)), default=0))


def _because(need: int) -> str:
    return "" if need == MIN_FREE_BYTES else f" ({STATES_THAT_MUST_FIT} times the largest saved state)"


def _what_may_go(folder: Path) -> str:
    """The largest things on a folder's filesystem that the user can do without."""
    root = paths.project_root()
    candidates = {
        SET_ASIDE: f"rm -r {SET_ASIDE} (unfinished work of other params)",
        cache_folder(root, config(root)): "dvc gc --workspace (earlier results in DVC's cache)",
        root / paths.WORK / "tracking": "maskdm sync (what waits for MLflow)",
    }
    device = folder.stat().st_dev
    sizes = {path: size_of(path) for path in candidates if path.exists() and path.stat().st_dev == device}
    largest = sorted((path for path in sizes if sizes[path]), key=lambda path: -sizes[path])
    if not largest:
        return "Nothing of this project's that lies there can go: remove something else"
    return "May go: " + "; ".join(f"{size(sizes[path])} with {candidates[path]}" for path in largest)


def _owner(folder: Path) -> str:
    try:
        return f"it belongs to {folder.owner()}"
    except KeyError:
        return f"it belongs to user {folder.stat().st_uid}"
