"""The work folder of one run of a stage: whose it is, and what it has finished; never an output of a stage.

What lies in it belongs to a fingerprint of all that the stage's result depends on. Work of other inputs is set aside
and taken back when the inputs are those again. Finished work is kept (as hard links, where that is possible), so that
an engine that lost its books may run the stage again: it costs a second, not a training.
"""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from maskdm import paths
from maskdm.checksums import NOT_NOW, file_sha256, values_sha256
from maskdm.differences import differing
from maskdm.errors import UserError
from maskdm.publishing import cannot_write, link_or_copy, publish_copy, replace_file

FORMAT = "maskdm-work/1"
OWNER, FINISHED, MANIFEST = "owner.json", "finished", "manifest.json"
DIFFERENCES_SHOWN = 3


def plain(value: Any) -> Any:
    """Sections of params, tuples and the like as JSON has them."""
    return json.loads(json.dumps(value, default=lambda v: v.model_dump(mode="json") if _is_section(v) else str(v)))


@dataclass
class Work:
    """A claimed work folder.

    Attributes:
        folder: where it lies.
        what: the stage and its arm, seed or trial, for messages.
        fingerprint: of its inputs.
        key: names this piece of work, the same in every process that works on it.
        starts: how many processes have worked on it, this one included.
    """

    folder: Path
    what: str
    fingerprint: str
    key: str
    starts: int

    @classmethod
    def claim(cls, output: Path, what: str, inputs: Mapping[str, Any]) -> Work:
        """The work folder of an output, for these inputs; call it under the stage's lock.

        Args:
            output: names the folder.
            what: for messages.
            inputs: all that the result depends on, plain values.

        Raises:
            UserError: the place can't be written.
        """
        folder, fingerprint = paths.work(output), values_sha256(inputs)
        try:
            for left in folder.rglob("*.building"):  # by a process that was killed
                _remove(left)
            owner = _read_owner(folder)
            if owner.get("fingerprint") != fingerprint:
                _make_way(folder, output, what, owner, inputs)
                _take_back(folder, output, what, fingerprint)
                owner = _read_owner(folder)
            work = cls(folder, what, fingerprint, owner.get("key", uuid.uuid4().hex), owner.get("starts", 0) + 1)
            work._write_owner(inputs)
        except OSError as error:
            raise cannot_write(folder, error) from error
        return work

    @property
    def is_finished(self) -> bool:
        """Whether its results are kept."""
        return (self.folder / FINISHED / MANIFEST).is_file()

    def keep(self, outputs: Sequence[Path]) -> None:
        """Keep what was published, and drop what it was made from.

        Raises:
            UserError: the place can't be written.
        """
        building = self.folder / f"{FINISHED}.building"
        try:
            shutil.rmtree(building, ignore_errors=True)
            files = [file for output in outputs for file in _files(output)]
            for file in files:
                link_or_copy(file, building / "files" / file)
            content = {"outputs": [str(o) for o in outputs], "files": {str(f): file_sha256(f) for f in files}}
            with replace_file(building / MANIFEST) as manifest:
                manifest.write_text(json.dumps({**content, "sha256": values_sha256(content)}, indent=2) + "\n")
            shutil.rmtree(self.folder / FINISHED, ignore_errors=True)
            building.rename(self.folder / FINISHED)
        except OSError as error:
            raise cannot_write(building, error) from error
        self._drop_all_but_finished()
        for aside in paths.set_aside(outputs[0]).glob(f"*/{FINISHED}/{MANIFEST}"):
            shutil.rmtree(aside.parents[1])  # superseded: its outputs have made way for these

    def restore(self) -> bool:
        """Publish what was kept; False where there is nothing, or it is damaged.

        Raises:
            UserError: an output can't be written, or what is kept can't be read now.
        """
        if not self.is_finished:
            return False
        folder = self.folder / FINISHED
        try:
            manifest = _read_manifest(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, OSError) and error.errno in NOT_NOW:
                raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error
            print(
                f"warning: {self.what} was finished before, but what {folder} keeps of it is damaged ({error}): "
                "doing it again",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(folder)
            return False
        for output in map(Path, manifest["outputs"]):
            _restore(output, folder / "files" / output, manifest["files"])
        self._drop_all_but_finished()
        return True

    def _drop_all_but_finished(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in (OWNER, FINISHED):
                _remove(path)

    def _write_owner(self, inputs: Mapping[str, Any]) -> None:
        owner = {"format": FORMAT, "what": self.what, "fingerprint": self.fingerprint, "inputs": inputs}
        with replace_file(self.folder / OWNER) as file:
            file.write_text(json.dumps({**owner, "key": self.key, "starts": self.starts}, indent=2), encoding="utf-8")


def differences(before: Any, after: Any) -> Iterator[str]:
    """What differs between two nested plain values, as `pretrain.lr was 0.002, is 0.004`."""
    for path, old, new in differing(before, after):
        yield f"{path} was {_short(old)}, is {_short(new)}"


def _read_owner(folder: Path) -> dict[str, Any]:
    """Whose the folder is; empty where nobody's, or where that can't be read or was changed."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        is_ours = owner["format"] == FORMAT and values_sha256(owner["inputs"]) == owner["fingerprint"]
        is_ours = is_ours and isinstance(owner["key"], str) and isinstance(owner["starts"], int)
    except OSError as error:
        if error.errno in NOT_NOW:
            raise
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return dict(owner) if is_ours else {}


def _make_way(folder: Path, output: Path, what: str, owner: dict[str, Any], inputs: Mapping[str, Any]) -> None:
    """Set work of other inputs aside; finished work too, until new work is finished (see `keep`)."""
    if not folder.is_dir():
        return
    if [path.name for path in folder.iterdir()] in ([], [OWNER]):
        shutil.rmtree(folder)
        return
    aside = paths.set_aside(output) / (owner["fingerprint"][:16] if owner else f"unknown-{uuid.uuid4().hex[:8]}")
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    if owner:
        changed = list(differences(owner["inputs"], inputs))
        more = f" and {len(changed) - DIFFERENCES_SHOWN} more" if len(changed) > DIFFERENCES_SHOWN else ""
        why = f"was begun with other inputs ({'; '.join(changed[:DIFFERENCES_SHOWN])}{more})"
        then = "; it is taken up again when the inputs are those again"
    else:
        why, then = f"does not say whose it is (its {OWNER} is missing, damaged or of another version)", ""
    print(f"{what}: what lay in {folder} {why}: set aside in {aside}{then}", file=sys.stderr, flush=True)


def _take_back(folder: Path, output: Path, what: str, fingerprint: str) -> None:
    """Bring unfinished work of these inputs back, if it was set aside."""
    aside = paths.set_aside(output) / fingerprint[:16]
    if _read_owner(aside).get("fingerprint") == fingerprint:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(folder)
        print(f"{what}: taking up what was set aside in {aside}", file=sys.stderr, flush=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of finished work holds, checked against its files.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: it is damaged.
    """
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if content.pop("sha256") != values_sha256(content):
        raise ValueError(f"the checksum of its {MANIFEST} differs")
    _check_places(folder, content)
    for name, sha256 in content["files"].items():
        if file_sha256(folder / "files" / name) != sha256:
            raise ValueError(f"the checksum of {name} differs")
    return content


def _check_places(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse to restore anything but files, and elsewhere than in the results.

    Raises:
        ValueError: the manifest names another place, or a link or device is kept.
    """
    outputs = [Path(output) for output in manifest["outputs"]]
    for place in (*outputs, *map(Path, manifest["files"])):
        is_below = len(place.parts) > 1 and place.is_relative_to(paths.RESULTS) and ".." not in place.parts
        if not is_below or not any(place.is_relative_to(output) for output in outputs):
            raise ValueError(f"{place} is no output")
    for path in (folder / "files").rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no file")


def _restore(output: Path, kept: Path, hashes: dict[str, str]) -> None:
    """Publish a kept output, unless it is there already: a new copy would be news to every later stage."""
    expected = {name: sha256 for name, sha256 in hashes.items() if output in (Path(name), *Path(name).parents)}
    there = {str(file): file_sha256(file) for file in _files(output) if not file.name.startswith(".")}
    if there != expected:
        publish_copy(output, kept)


def _files(output: Path) -> list[Path]:
    return [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _is_section(value: Any) -> bool:
    return isinstance(value, BaseModel)
