"""What a TIFF file's directory declares, looked at before a decoder believes it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGICS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")  # Pillow takes swapped ones, too
BIG = b"II+\0"  # BigTIFF as Pillow reads it
BYTES_TYPES = {1, 2, 6, 7}  # read as they stand; a value of any other type becomes an object
POINTER_TYPES = {4: "L", 13: "L", 16: "Q", 18: "Q"}  # to how the offset is written
POINTERS = {34665, 34853, 40965}  # to the directories of EXIF, GPS and interoperability
MOST_VALUES = 2**18  # of a tag: 64 million pixels in tiles of 16×16 have as many


@dataclass(frozen=True)
class _Layout:
    """How numbers are written: 32-bit, or BigTIFF's 64-bit offsets."""

    order: str
    is_big: bool

    def unpack(self, kinds: str, content: bytes, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + kinds, content, offset)


def too_many_values(content: bytes) -> str | None:
    """What is wrong with the directories that a decoder of the first image would read, or None.

    A tag of some MB makes some GB of Python objects: a directory that declares more than any image needs is refused.
    """
    if content[:4] not in MAGICS:
        return None
    layout = _Layout("<" if content[:1] == b"I" else ">", content[:4] == BIG)
    first = 8 if layout.is_big else 4
    waiting, seen = [(first, "Q" if layout.is_big else "L")], set[int]()
    while waiting:
        where, kind = waiting.pop()
        try:
            (offset,) = layout.unpack(kind, content, where)
        except struct.error:
            continue  # the decoder will say so
        if offset in seen:
            continue
        seen.add(offset)
        for tag, type_, count, value in _entries(content, offset, layout):
            if count > MOST_VALUES and type_ not in BYTES_TYPES:
                return f"its tag {tag} declares {count} values, more than the {MOST_VALUES} that any image needs"
            if tag in POINTERS:
                if type_ not in POINTER_TYPES or not (layout.is_big or POINTER_TYPES[type_] == "L"):
                    return f"its tag {tag} is no pointer (type {type_})"
                waiting.append((value, POINTER_TYPES[type_]))
    return None


def _entries(content: bytes, offset: int, layout: _Layout) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and the place of the value of every entry of a directory, as far as it goes."""
    counted, entry, size = ("Q", "HHQ", 20) if layout.is_big else ("H", "HHL", 12)
    try:
        (number,) = layout.unpack(counted, content, offset)
        start = offset + struct.calcsize("=" + counted)
        for place in range(start, start + number * size, size):
            tag, type_, count = layout.unpack(entry, content, place)
            yield tag, type_, count, place + struct.calcsize("=" + entry)
    except struct.error:
        return
