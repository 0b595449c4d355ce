"""Where two nested plain values differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def differing(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place in which they differ, as `pretrain.lr`, with both values there; None where one has no such place."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path, one, other
