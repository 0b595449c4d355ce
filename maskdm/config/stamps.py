"""The stamp of an output says what it was made from and which files it has; it decides whether a stage must run.

The stamp of a folder is its file `stamp.json`; the stamp of a single JSON file is its key `stamp`. A stamp contains
neither time nor machine, so equal work has equal stamps. Nothing here imports torch.
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
        stage: the stage that made it.
        version: the version of the stage's code.
        values: the values of params.yaml that it depends on, in plain text.
        inputs: the digests of the outputs and files that it was made from, by name.
        content: the digest of the output itself, which later stages have among their `inputs`.
        files: `size` and `sha256` of the files of a folder, by name.
    """

    stage: str
    version: int
    values: dict[str, Any]
    inputs: dict[str, str | None]
    content: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A short hash of everything that the output was made from: equal keys mean equal outputs."""
        return short_hash(self.stage, self.version, self.values, self.inputs)

    def differences(self, other: Stamp) -> str:
        """How the values and inputs of `other` differ from these, for people: `pretrain.lr was 0.002, is 0.004`."""
        mine, theirs = ({**stamp.values, "version": stamp.version} for stamp in (self, other))
        found = [f"{path} was {_short(before)}, is {_short(now)}" for path, before, now in differing(mine, theirs)]
        found += [
            f"{name} {'is missing or damaged' if now is None else 'has changed'}"
            for name, _, now in differing(self.inputs, other.inputs)
        ]
        more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
        return "; ".join(found[:MAX_SHOWN]) + more


def stamp_folder(folder: Path, stamp: Stamp) -> None:
    """Write the stamp of a folder whose other files are complete."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = values_sha256({name: entry["sha256"] for name, entry in files.items()})
    publish_description(folder / FILE, {**asdict(stamp), "content": content, "files": files})


def stamped(content: dict[str, Any], stamp: Stamp) -> dict[str, Any]:
    """The content of a single-file output together with its stamp."""
    plain = json.loads(json.dumps(content))
    return {**plain, STAMP: {**asdict(stamp), "content": values_sha256(plain)}}


def read_stamp(output: Path) -> Stamp | None:
    """The stamp of an output; None if it is missing or damaged."""
    try:
        if output.is_dir():
            return Stamp(**checked(json.loads((output / FILE).read_bytes())))
        content = checked(json.loads(output.read_bytes()))
        stamp = Stamp(**content.pop(STAMP))
        return stamp if values_sha256(content) == stamp.content else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def missing_files(output: Path, stamp: Stamp) -> str:
    """The first file that is missing from a folder or has the wrong size, in words; empty if there is none."""
    for name, entry in stamp.files.items():
        try:
            size = (output / name).stat().st_size
        except OSError:
            return f"{output / name} is missing"
        if size != entry["size"]:
            return f"{output / name} has {size:,} bytes, expected {entry['size']:,}"
    return ""


def damaged_files(output: Path, stamp: Stamp) -> Iterator[str]:
    """Hash every file of an output, and yield a line for each one that differs from what was written.

    Raises:
        UserError: a file cannot be read at the moment.
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
