"""LMDB files read page by page, by plain reads.

The lmdb package maps the file into memory and trusts what is in it: a truncated file ends the process with SIGBUS, and
a damaged one may do anything. Here every page number and length is checked before it is followed.

Source: the layout of LMDB 0.9's data version 1 on 64-bit machines, little-endian (lmdb.h and mdb.c of OpenLDAP).
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW = 1, 2, 4  # kinds of pages
KINDS = 0x6F  # the bits that say it, those of pages that only databases of other kinds have among them
BIG = 1  # a node whose value lies in pages of its own
PAGE_HEADER, NODE_HEADER = struct.Struct("<QHHHH"), struct.Struct("<HHHH")
META_LAYOUT = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")  # magic … free list, main tree, last page, transaction
EMPTY = 2**64 - 1
PAGE_SIZES = [2**power for power in range(9, 17)]
DEEPEST = 32


class DamagedDatabaseError(Exception):
    """It is cut off, damaged or no LMDB file; the message is the reason."""


@dataclass(frozen=True)
class _Meta:
    page_size: int
    entries: int
    root: int
    last_page: int
    transaction: int


class LmdbFile:
    """The entries of a database, in the order of their keys.

    Args:
        file: data.mdb, open for reading.

    Raises:
        DamagedDatabaseError: it is not whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self._meta = self._read_meta()
        self._leaves, self._nodes = array("q"), array("l")  # of every entry: its page, and which of the page's it is
        self._walk()

    def __len__(self) -> int:
        return len(self._leaves)

    def key(self, number: int) -> bytes:
        """The key of an entry."""
        page = self._page(self._leaves[number], LEAF)
        start, _, _, key_size = self._node(page, self._nodes[number])
        return page[start : start + key_size]

    def size(self, number: int) -> int:
        """Bytes of an entry's value."""
        return self._value_place(number)[1]

    def value(self, number: int) -> bytes:
        """The value of an entry.

        Raises:
            DamagedDatabaseError: it does not lie in the file.
        """
        place, size = self._value_place(number)
        return self._read(place, size)

    def _read_meta(self) -> _Meta:
        """The newer of the two descriptions; the size of pages, which places the second, is in the first."""
        first = self._meta_at(0)
        second = self._meta_at(first.page_size)
        meta = max(first, second, key=lambda m: m.transaction)
        needed = (meta.last_page + 1) * meta.page_size
        if needed > self._size:
            raise DamagedDatabaseError(f"it is cut off: {self._size} bytes of {needed}")
        return meta

    def _meta_at(self, place: int) -> _Meta:
        content = self._read(place, PAGE_HEADER.size + META_LAYOUT.size)
        values = META_LAYOUT.unpack_from(content, PAGE_HEADER.size)
        page_size, main = values[4], values[12:20]
        if values[:2] != (MAGIC, VERSION) or page_size not in PAGE_SIZES:
            raise DamagedDatabaseError("it does not begin as an LMDB file of version 1")
        if main[1]:
            raise DamagedDatabaseError("it is of another kind: keys with several values, or integers")
        return _Meta(page_size, main[6], main[7], values[20], values[21])

    def _walk(self) -> None:
        """Find every entry."""
        waiting = [] if self._meta.root == EMPTY else [(self._meta.root, 1)]
        seen = set[int]()
        while waiting:
            number, depth = waiting.pop()
            if number in seen or depth > DEEPEST:
                raise DamagedDatabaseError(f"page {number} is reached twice")
            seen.add(number)
            page = self._page(number, BRANCH | LEAF)
            nodes = self._number_of_nodes(page)
            if PAGE_HEADER.unpack_from(page)[2] & LEAF:
                self._leaves.extend([number] * nodes)
                self._nodes.extend(range(nodes))
            else:
                waiting.extend((self._child(page, node), depth + 1) for node in reversed(range(nodes)))
        if len(self) != self._meta.entries:
            raise DamagedDatabaseError(f"it holds {len(self)} entries, but declares {self._meta.entries}")

    def _child(self, page: bytes, node: int) -> int:
        _, low, flags, _ = self._node(page, node)
        return low | flags << 32

    def _value_place(self, number: int) -> tuple[int, int]:
        """Where an entry's value begins in the file, and its size."""
        leaf = self._leaves[number]
        page = self._page(leaf, LEAF)
        start, size, flags, key_size = self._node(page, self._nodes[number])
        begin = start + key_size
        if flags & ~BIG:
            raise DamagedDatabaseError(f"a key of page {leaf} has several values")
        if not flags & BIG:
            if begin + size > len(page):
                raise DamagedDatabaseError(f"a value of page {leaf} ends outside of it")
            return leaf * self._meta.page_size + begin, size
        if begin + 8 > len(page):
            raise DamagedDatabaseError(f"page {leaf} is damaged")
        (first,) = struct.unpack_from("<Q", page, begin)
        self._page(first, OVERFLOW)
        return first * self._meta.page_size + PAGE_HEADER.size, size

    def _page(self, number: int, kinds: int) -> bytes:
        """A page of one of these kinds."""
        if not 2 <= number <= self._meta.last_page:
            raise DamagedDatabaseError(f"it points to page {number} of {self._meta.last_page + 1}")
        page = self._read(number * self._meta.page_size, self._meta.page_size)
        found, _, flags, _, _ = PAGE_HEADER.unpack_from(page)
        kind = flags & KINDS
        if found != number or kind not in (BRANCH, LEAF, OVERFLOW) or not kind & kinds:
            raise DamagedDatabaseError(f"page {number} is not of the kind it should be")
        return page

    def _number_of_nodes(self, page: bytes) -> int:
        lower = PAGE_HEADER.unpack_from(page)[3]
        if not PAGE_HEADER.size <= lower <= len(page):
            raise DamagedDatabaseError("a page's list of entries is damaged")
        return (lower - PAGE_HEADER.size) // 2

    def _node(self, page: bytes, node: int) -> tuple[int, int, int, int]:
        """Where a node's key begins in its page, its 32-bit number, its flags, and the size of its key."""
        (start,) = struct.unpack_from("<H", page, PAGE_HEADER.size + 2 * node)
        if not PAGE_HEADER.size <= start <= len(page) - NODE_HEADER.size:
            raise DamagedDatabaseError("an entry lies outside of its page")
        low, high, flags, key_size = NODE_HEADER.unpack_from(page, start)
        if start + NODE_HEADER.size + key_size > len(page):
            raise DamagedDatabaseError("a key ends outside of its page")
        return start + NODE_HEADER.size, low | high << 16, flags, key_size

    def _read(self, place: int, size: int) -> bytes:
        if place + size > self._size:
            raise DamagedDatabaseError(f"it is cut off: {self._size} bytes of at least {place + size}")
        content = os.pread(self._file.fileno(), size, place)
        if len(content) != size:
            raise DamagedDatabaseError("it became shorter while it was read")
        return content


@contextmanager
def open_lmdb(path: Path) -> Iterator[LmdbFile]:
    """A database's data.mdb.

    Raises:
        DamagedDatabaseError: it is not whole.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        yield LmdbFile(file)
