"""Hashes of files and of plain values, and descriptions that carry their own."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

# Why a file that is whole may be unreadable for now: nothing is to be taken for damaged because of these.
NOT_NOW = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM}


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def values_sha256(values: Any) -> str:
    """The sha256 of plain values: equal values, equal hash."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def short_hash(*parts: Any) -> str:
    """A short hash of plain values or sections of params: equal values, equal hash."""
    plain = [part.model_dump(mode="json") if hasattr(part, "model_dump") else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


CHECKSUM = "checksum"


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Plain values with a key more, which holds their hash."""
    return {**content, CHECKSUM: values_sha256(json.loads(json.dumps(content)))}


def checked(content: Any, is_required: bool = True) -> Any:
    """The values that `with_checksum` was given.

    Args:
        content: what was read.
        is_required: whether content without a checksum is refused.

    Raises:
        ValueError: they are others.
    """
    if not isinstance(content, dict) or CHECKSUM not in content:
        if is_required:
            raise ValueError(f"it has no {CHECKSUM}: not a file of this version of maskdm")
        return content
    plain = {key: value for key, value in content.items() if key != CHECKSUM}
    if values_sha256(plain) != content[CHECKSUM]:
        raise ValueError(f"its content is not what was written: the {CHECKSUM} differs")
    return plain
