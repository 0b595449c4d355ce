"""Your own images: a folder tree, a .zip or a .tar of any sizes and formats.

The same images give the same arrays whether they lie in a folder or in an archive. Archives are read in
place: nothing is extracted, so links and paths that point elsewhere have no effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath

from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.config import DatasetConfig
from maskdm.data.arrays import Labels
from maskdm.data.collection import Collection, ImageFiles, as_array
from maskdm.data.sources import Source, open_source, reading

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@contextmanager
def open_image_folder(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images under `dataset.root`, in the sorted order of their paths, with labels from class folders.

    Raises:
        UserError: root is missing, unreadable or holds no images.
    """
    assert dataset.root is not None, "the schema requires root for image_folder"
    with open_source(dataset.root) as source:
        names = image_names(source)
        class_names, labels = labels_from_folders(names)
        shown = class_names and tuple(map(printable, class_names))
        yield ImageFiles(dataset.root, source, names, shown, labels)


def image_names(source: Source) -> list[str]:
    """The sorted images of a source, by the suffixes of their names.

    Raises:
        UserError: there are none.
    """
    files = reading(source.root, source.files)
    names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
    if not names:
        kinds = Counter(printable(PurePosixPath(name).suffix, 20) or "no suffix" for name in files)
        most = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        raise UserError(
            f"dataset.root: no images in {source.root}: looked for {' '.join(SUFFIXES)} in all its folders, "
            f"found {f'{len(files)} other files ({most})' if files else 'no files'}"
        )
    return names


def labels_from_folders(names: Sequence[str]) -> tuple[tuple[str, ...] | None, Labels | None]:
    """Classes from the folders directly under the deepest folder that holds all images.

    There are classes when these folders are two or more and no image lies beside them.

    Args:
        names: the images' POSIX paths.

    Returns:
        the sorted class names and the class of each path, or nothing.
    """
    first, last = min(map(_folders, names)), max(map(_folders, names))  # what these two share, all share
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    if any(name.count("/") == depth for name in names):
        return None, None
    class_names = tuple(sorted({_folders(name)[depth] for name in names}))
    index = {name: number for number, name in enumerate(class_names)}
    return class_names, as_array(index[_folders(name)[depth]] for name in names)


def _folders(name: str) -> list[str]:
    return name.split("/")[:-1]
