"""CelebA from its aligned and cropped images, a folder or .zip, and the file that says which split each is of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.config import DatasetConfig
from maskdm.data.collection import Collection, ImageFiles
from maskdm.data.image_folder import image_names
from maskdm.data.named.files import by_base_name, find_or_download, split_of
from maskdm.data.sources import open_source, reading

SPLITS = {"train": "0", "valid": "1", "test": "2", "all": None}
IMAGES, PARTITION = "img_align_celeba", "list_eval_partition.txt"
MOST_BYTES = 2**24  # of the partition: four times as many as it has


@contextmanager
def open_celeba(dataset: DatasetConfig) -> Iterator[Collection]:
    """The images of a split: train, valid, test or all, in the order of their names, without labels.

    Raises:
        UserError: files are missing, or the partition and the images do not belong together.
    """
    wanted = SPLITS[split_of(dataset)]
    needed = f"{IMAGES}.zip, or the folder {IMAGES} that is in it, and {PARTITION}"
    images, partition_file = find_or_download(dataset, _find, needed)
    partition = _read_partition(partition_file)
    with open_source(str(images)) as source:
        files = by_base_name(source, image_names(source))
        _check_same(partition, files, partition_file, images)
        names = [files[name] for name in sorted(files) if wanted is None or partition[name] == wanted]
        if not names:
            raise UserError(f"dataset.split: {partition_file} has no image of {dataset.split or 'train'}")
        yield ImageFiles(str(images), source, names)


def _find(root: Path) -> tuple[Path, Path] | None:
    """The images and the partition, in the root or where torchvision puts them below it."""
    for folder in (root, root / "celeba"):
        images = next((path for name in (IMAGES, f"{IMAGES}.zip") if (path := folder / name).exists()), None)
        if images is not None and (folder / PARTITION).is_file():
            return images, folder / PARTITION
    return None


def _read_partition(path: Path) -> dict[str, str]:
    """Which split every image is of, by file name."""
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is larger than any {PARTITION}: get it anew")
    lines = reading(str(path), path.read_bytes).decode("utf-8", "replace").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[1] not in SPLITS.values():
            raise UserError(
                f"{path}, line {number}: expected a file name and 0, 1 or 2, got {printable(' '.join(row), 80)!r}"
            )
    return {row[0]: row[1] for row in rows}


def _check_same(partition: dict[str, str], files: dict[str, str], partition_file: Path, images: Path) -> None:
    if partition.keys() == files.keys():
        return
    missing = sorted(partition.keys() - files.keys()) or sorted(files.keys() - partition.keys())
    lacks = images if partition.keys() - files.keys() else partition_file
    raise UserError(
        f"{partition_file} names {len(partition)} images, but {images} holds {len(files)}; {lacks} lacks "
        f"{printable(missing[0])}: they do not belong together, or one is incomplete"
    )
