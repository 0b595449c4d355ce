"""The stamp of an output: what it was made from, and which files it has. It decides whether a stage has work to do.

A folder holds its stamp as `stamp.json`; an output that is one JSON file holds it under the key `stamp`. A stamp says
nothing of time or machine: equal work has equal stamps. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskdm.base.checksums import NOT_NOW, checked, differing, file_sha256, short_hash, values_sha256
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description

STAMP = "stamp"
FILE = "stamp.json"
MAX_SHOWN = 3  # differences in one message


@dataclass(frozen=True)
class Stamp:
    """What an output was made from.

    Attributes:
        stage: that made it.
        version: of the stage's code.
        values: of params.yaml that it depends on, in clear.
        inputs: digests of the outputs and files that it was made from, by name.
        content: the digest of the output itself: what later stages have as their input.
        files: of a folder, by name: `size` and `sha256`.
    """

    stage: str
    version: int
    values: dict[str, Any]
    inputs: dict[str, str | None]
    content: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A short hash of all that the output was made from: equal keys, equal outputs."""
        return short_hash(self.stage, self.version, self.values, self.inputs)

    def differences(self, other: Stamp) -> str:
        """What `other` is made from that this one is not, for people: `pretrain.lr was 0.002, is 0.004`."""
        mine, theirs = ({**stamp.values, "version": stamp.version} for stamp in (self, other))
        found = [f"{path} was {_short(before)}, is {_short(now)}" for path, before, now in differing(mine, theirs)]
        found += [
            f"{name} {'is missing or damaged' if now is None else 'has changed'}"
            for name, _, now in differing(self.inputs, other.inputs)
        ]
        more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
        return "; ".join(found[:MAX_SHOWN]) + more


def stamp_folder(folder: Path, stamp: Stamp) -> None:
    """Write the stamp of a folder whose other files are all there."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = values_sha256({name: entry["sha256"] for name, entry in files.items()})
    publish_description(folder / FILE, {**asdict(stamp), "content": content, "files": files})


def stamped(content: dict[str, Any], stamp: Stamp) -> dict[str, Any]:
    """The content of a single-file output, with its stamp."""
    plain = json.loads(json.dumps(content))
    return {**plain, STAMP: {**asdict(stamp), "content": values_sha256(plain)}}


def read_stamp(output: Path) -> Stamp | None:
    """The stamp of an output; None where there is none, or none that is whole."""
    try:
        if output.is_dir():
            return Stamp(**checked(json.loads((output / FILE).read_bytes())))
        content = checked(json.loads(output.read_bytes()))
        stamp = Stamp(**content.pop(STAMP))
        return stamp if values_sha256(content) == stamp.content else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def missing_files(output: Path, stamp: Stamp) -> str:
    """What a folder lacks of its stamp's files, judged by their sizes; empty where all are there."""
    for name, entry in stamp.files.items():
        try:
            size = (output / name).stat().st_size
        except OSError:
            return f"{output / name} is missing"
        if size != entry["size"]:
            return f"{output / name} has {size:,} bytes, expected {entry['size']:,}"
    return ""


def damaged_files(output: Path, stamp: Stamp) -> Iterator[str]:
    """Hash every file of an output; a line for each that is not the one that was written.

    Raises:
        UserError: a file may not be read now.
    """
    for name, entry in stamp.files.items():
        file = output / name
        try:
            if file_sha256(file) != entry["sha256"]:
                yield f"{file} is not the file that was written: its sha256 differs"
        except FileNotFoundError:
            yield f"{file} is missing"
        except OSError as error:
            if error.errno in NOT_NOW:
                raise UserError(f"cannot read {file}: {error.strerror}") from error
            yield f"{file} can't be read: {error.strerror}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
