"""Hashes of plain values and files, values that contain their own hash, and differences between values."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Errors that may be temporary: a file that cannot be read because of them is not taken to be damaged.
NOT_NOW = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM}
CHECKSUM = "checksum"  # the key of the hash in values of `with_checksum`


def file_sha256(path: Path) -> str:
    """The sha256 of the content of a file.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def values_sha256(values: Any) -> str:
    """The sha256 of plain values; equal values have equal hashes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def short_hash(*parts: Any) -> str:
    """A short hash of plain values or sections of params; equal values have equal hashes."""
    plain = [part.model_dump(mode="json") if hasattr(part, "model_dump") else part for part in parts]
    return values_sha256(plain)[:16]


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Plain values with one more key, which is their hash."""
    return {**content, CHECKSUM: values_sha256(json.loads(json.dumps(content)))}


def checked(content: Any) -> Any:
    """The values that were given to `with_checksum`.

    Raises:
        ValueError: the hash is missing or wrong.
    """
    if not isinstance(content, dict) or CHECKSUM not in content:
        raise ValueError(f"it has no {CHECKSUM}: not a file of this version of maskdm")
    plain = {key: value for key, value in content.items() if key != CHECKSUM}
    if values_sha256(plain) != content[CHECKSUM]:
        raise ValueError(f"its content is not what was written: the {CHECKSUM} differs")
    return plain


def differing(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every path at which two values differ, such as `pretrain.lr`, with both values; None if one has no such path."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path, one, other
