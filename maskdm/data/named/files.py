"""Finding a dataset's original files below its root, or downloading them there."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from maskdm.base.errors import UserError
from maskdm.base.locks import one_writer
from maskdm.base.printable import printable
from maskdm.base.publishing import cannot_write, replace_file
from maskdm.config import DatasetConfig, paths
from maskdm.data.sources import Source

DOWNLOAD = "download-"  # in the work folder: what is being downloaded
CONNECTION_SECONDS = 30.0  # without an answer

# By source: torchvision's class, which knows where the files are and their checksums, and what it downloads.
_MNIST = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
DOWNLOADS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "mnist": ("MNIST", "MNIST/raw", _MNIST),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _MNIST),
    "celeba": ("CelebA", "celeba", ("img_align_celeba.zip", "list_eval_partition.txt")),
}

T = TypeVar("T")


def split_of(dataset: DatasetConfig) -> str:
    """The split that is asked for, which the schema knows; train where none is."""
    return dataset.split or "train"


def find_or_download(dataset: DatasetConfig, find: Callable[[Path], T | None], needed: str) -> T:
    """What `find` finds below the dataset's root, if need be after a download.

    Args:
        dataset: whose files.
        find: given the root, None where files are missing.
        needed: which files belong where, for a message that begins with "put".

    Raises:
        UserError: they are not there and can't be downloaded.
    """
    root = paths.root_of(dataset)
    if (found := find(root)) is not None:
        return found
    reason = None
    with one_writer(paths.WORK / "download.lock", f"download of {dataset.source}"):
        if find(root) is None:  # else another process has downloaded it meanwhile
            reason = _download(dataset.source, root)
    if reason is None and (found := find(root)) is not None:
        return found
    raise UserError(
        f"dataset.root: the files of {dataset.source} are not in {root} (looked in {root.absolute()}), and could not "
        f"be downloaded ({reason or 'the download lacks them'}): put {needed} into {root}"
    )


def by_base_name(source: Source, files: Sequence[str]) -> dict[str, str]:
    """The files of a source by the last part of their paths.

    Args:
        source: for a message.
        files: their paths.

    Raises:
        UserError: two have the same: which is meant is not known.
    """
    found: dict[str, str] = {}
    for file in files:
        name = file.rsplit("/", 1)[-1]
        if name in found:
            raise UserError(
                f"dataset.root: {source.root} holds {printable(name)} twice: {source.where(found[name])} and "
                f"{source.where(file)}: remove one, or move it elsewhere"
            )
        found[name] = file
    return found


def _download(source: str, root: Path) -> str | None:
    """Download a dataset's files into a root, each whole; why not, where that fails. Only one process may be here."""
    name, below, files = DOWNLOADS[source]
    for left in paths.WORK.glob(f"{DOWNLOAD}*"):  # by a download that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        fresh = tempfile.TemporaryDirectory(prefix=DOWNLOAD, dir=paths.WORK)
    except OSError as error:
        raise cannot_write(paths.WORK, error) from error
    with fresh as folder:
        try:
            with _patience():
                _torchvision_class(name)(folder, download=True)
        except Exception as error:  # of the network, of torchvision, of the package that it asks for
            return printable(" ".join(str(error).split())) or type(error).__name__
        for file in files:
            with replace_file(root / file) as building:
                shutil.move(Path(folder) / below / file, building)
    return None


def _torchvision_class(name: str) -> Callable[..., object]:
    from maskdm.base.torchvision_compat import declare_missing_operators  # imports torch: only to download

    declare_missing_operators()
    from torchvision import datasets

    found: Callable[..., object] = getattr(datasets, name)
    return found


@contextmanager
def _patience() -> Iterator[None]:
    """A server that does not answer is waited for no longer than that."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
