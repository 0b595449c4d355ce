"""Files of `torch.save` from anybody, opened only if they hold plain tensors: no code runs, and memory is bounded."""

from __future__ import annotations

import pickletools
import re
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from maskdm.printable import printable

# What the pickles of weights call for, each by its name.
PLAIN_NAMES = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)


def load_plain(path: Path) -> Any:
    """The content of a file of `torch.save`: tensors on the CPU, plain values, and containers of them.

    A tensor may still claim more elements than the file holds (a stride of 0): look at sizes before copying.

    Args:
        path: a regular file; a pipe would be waited for.

    Raises:
        ValueError: it is damaged, or holds more than plain tensors; the reason, fit to be shown.
    """
    try:
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
            for code, name, _ in pickletools.genops(file):
                if code.name == "STACK_GLOBAL":
                    raise ValueError("it was saved with pickle protocol 4 or later; save it with torch's default")
                if code.name == "GLOBAL":
                    names.add(str(name))
    if foreign := sorted(name for name in names if not PLAIN_NAMES.fullmatch(name)):
        raise ValueError(f"it calls for {foreign[0]}")
