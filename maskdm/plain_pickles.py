"""Files of `torch.save` from anybody, opened only if they hold plain tensors: no code runs, and memory is bounded."""

from __future__ import annotations

import codecs
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch

from maskdm.printable import printable

# What the pickles of weights call for, each by its name.
PLAIN_NAMES = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)

HEAD_BYTES = 512  # that tell what a file is
PICKLE_OPCODES = 50  # that tell what a pickle is of
PICKLE, ZIP = b"\x80", b"PK\x03\x04"  # what their files begin with
CONTAINERS = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list", "EMPTY_TUPLE": "tuple", "MARK": "tuple"}


def load_plain(path: Path) -> Any:
    """The content of a file of `torch.save`: tensors on the CPU, plain values, and containers of them.

    A tensor may still claim more elements than the file holds (a stride of 0): look at sizes before copying.

    Args:
        path: a regular file; a pipe would be waited for.

    Raises:
        ValueError: it is damaged, or holds more than plain tensors; the reason, fit to be shown.
    """
    try:
        _check_kind(path)
        _check_names(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises may be almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(printable(reason)) from None


def _check_names(path: Path) -> None:
    """Refuse a file whose pickles call for more than tensors: `weights_only` lets some through that only take memory.

    Raises:
        ValueError: they do, or what is packed there is larger than the file.
    """
    names = set()
    with ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = archive.infolist()
            if sum(member.file_size for member in members) > path.stat().st_size:  # PyTorch compresses nothing
                raise ValueError("it is compressed")
            named = [member for member in members if member.filename.lower().endswith(".pkl")]
            pickles = [stack.enter_context(archive.open(member)) for member in named]
        else:  # before PyTorch 1.6: five pickles, then the tensors
            pickles = [stack.enter_context(path.open("rb"))] * 5
        for file in pickles:
            for code, name in _opcodes(file):
                if code == "STACK_GLOBAL":
                    raise ValueError("it was saved with pickle protocol 4 or later; save it with torch's default")
                if code == "GLOBAL":
                    names.add(str(name))
    if foreign := sorted(name for name in names if not PLAIN_NAMES.fullmatch(name)):
        raise ValueError(f"it calls for {foreign[0]}")


def _check_kind(path: Path) -> None:
    """Refuse what is no file of torch.save at all, saying what it is.

    Raises:
        ValueError: it is none.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise ValueError("it is empty")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise ValueError("it is a .zip archive, but none of torch.save")
    elif head.startswith(ZIP):
        raise ValueError("it is cut off: the end of its archive is missing")
    elif head.startswith(PICKLE):
        with path.open("rb") as file:
            _check_is_of_torch(file)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise ValueError("it is a safetensors file")
    elif line := _first_line(head):
        raise ValueError(f"it is a text that begins with {line!r}")
    else:
        raise ValueError("it is none of the files that torch.save writes")


def _check_is_of_torch(file: IO[bytes]) -> None:
    """Refuse a pickle that is not the first of those that PyTorch wrote before 1.6: its magic number.

    Raises:
        ValueError: it is another's; says what it is of, as far as its beginning tells.
    """
    texts: list[str] = []
    for code, argument in islice(_opcodes(file), PICKLE_OPCODES):
        if argument == torch.serialization.MAGIC_NUMBER:
            return
        if isinstance(argument, str):
            texts.append(argument)
        if what := _content(code, texts):
            raise ValueError(f"it is a pickle of {what}, and none of torch.save")
    raise ValueError("it is a pickle, but none of torch.save")


def _content(code: str, texts: list[str]) -> str:
    """What a pickle is of, if an opcode tells; the names of an object come with it or before it."""
    if code in CONTAINERS:
        return f"a {CONTAINERS[code]}"
    names = {"GLOBAL": texts[-1:], "STACK_GLOBAL": texts[-2:]}.get(code, [])
    return ".".join(names).replace(" ", ".")


def _opcodes(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The opcodes of a pickle, each with its argument; nothing is unpickled.

    Raises:
        ValueError: it is damaged.
    """
    try:
        for code, argument, _ in pickletools.genops(file):
            yield code.name, argument
    except Exception:  # as of other damaged pickles
        raise ValueError("its pickle is damaged or cut off") from None


def _first_line(head: bytes) -> str:
    """The beginning of the first line of a text; empty for what is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut off
    except UnicodeDecodeError:
        return ""
    is_text = all(c.isprintable() or c.isspace() for c in text)
    return text.strip().partition("\n")[0].strip()[:40] if is_text else ""
