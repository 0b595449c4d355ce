"""The dataset on disk: memory-mapped .npy shards of uint8 images, labels, and a manifest that describes them.

Equal images give equal bytes: nothing in these files depends on the time, the machine or the location of the folder.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from maskdm.base.checksums import checked, file_sha256, values_sha256
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description, publish_text
from maskdm.config import paths
from maskdm.config.jobs import MANIFEST as MANIFEST

FORMAT = "maskdm-arrays/2"
LABELS = "labels.npy"
FILE_NAME = re.compile(r"\w[\w.-]*")  # a manifest names files in its own folder, never paths

Images = NDArray[np.uint8]  # one image (H, W, C) or a batch (B, H, W, C), values 0..255
Labels = NDArray[np.int64]


class ShardWriter:
    """Writes images into shards one by one; holds no more than one image, and 8 bytes of label per image.

    Args:
        folder: an existing, empty folder.
        shape: (H, W, C) of every image.
        shard_images: images per shard; the last shard holds the rest. Skipped images are counted too, so that skipping
            one does not move others to another shard.

    Attributes:
        num_images: number of images written so far.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], shard_images: int) -> None:
        self._folder, self._shape, self._shard_images = folder, shape, shard_images
        self._labels = array("q")
        self._shards: list[dict[str, Any]] = []
        self._position = 0  # of the next image, skipped ones included
        self._file: BinaryIO | None = None  # the open shard
        self._count = 0  # images in it
        self.num_images = 0

    def add(self, image: Images, label: int | None = None) -> None:
        """Append an image, and its label if the dataset has classes.

        Raises:
            ValueError: the image's shape or dtype differs from the dataset's.
        """
        if image.shape != self._shape or image.dtype != np.uint8:
            raise ValueError(f"expected uint8 of shape {self._shape}, got {image.dtype} of {image.shape}")
        if self._file is None:
            self._file = (self._folder / f"images-{self._position // self._shard_images:05d}.npy").open("wb")
            self._write_header()
        self._file.write(image.tobytes())
        self._count += 1
        self.num_images += 1
        if label is not None:
            self._labels.append(label)
        self.skip()

    def skip(self) -> None:
        """Go to the next position; called alone, it leaves out a bad image."""
        self._position += 1
        if self._position % self._shard_images == 0:
            self._close_shard()

    def finish(
        self,
        class_names: Sequence[str] | None,
        source: Mapping[str, Any],
        protocol: Mapping[str, Any],
        skipped: list[dict[str, str]],
    ) -> dict[str, Any]:
        """Write the last shard, the labels and the manifest, and return the manifest.

        Args:
            class_names: names of the classes in the order of the labels, or None.
            source: where the images come from, as plain values.
            protocol: how they were cropped, resized and converted.
            skipped: the images left out, as {"file", "reason"}.
        """
        self._close_shard()
        assert self.num_images > 0, "callers refuse a source without images"
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "count": self.num_images,
            "shape": list(self._shape),
            "dtype": "uint8",
            "shards": self._shards,
            "labels": None,
            "source": dict(source),
            "protocol": dict(protocol),
            "skipped": skipped,
        }
        if class_names is not None:
            assert len(self._labels) == self.num_images, "every image of a dataset with classes has a label"
            np.save(self._folder / LABELS, np.array(self._labels, dtype=np.int64))
            sha256 = file_sha256(self._folder / LABELS)
            manifest["labels"] = {"file": LABELS, "sha256": sha256, "class_names": list(class_names)}
        manifest["sha256"] = dataset_sha256(manifest)
        publish_description(self._folder / MANIFEST, manifest)
        return manifest

    def close(self) -> None:
        """Close the file of an unfinished shard."""
        if self._file is not None:
            self._file.close()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)
        self._write_header()
        self._file.close()
        path = Path(self._file.name)
        self._shards.append({"file": path.name, "count": self._count, "sha256": file_sha256(path)})
        self._file, self._count = None, 0

    def _write_header(self) -> None:
        """Write the .npy header; NumPy pads it to the same length for every count, so it can be overwritten."""
        assert self._file is not None
        header = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


class ImageArrays:
    """A dataset that `maskdm prepare` wrote; pixels stay on disk until they are asked for.

    Attributes:
        folder: the dataset's folder.
        manifest: the content of manifest.json.
        labels: (N,) int64 in [0, num_classes), or None.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Images], labels: Labels | None) -> None:
        self.folder, self.manifest, self.labels = folder, manifest, labels
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: Path = paths.DATA) -> Self:
        """Read the manifest and the labels, and memory-map the shards.

        Raises:
            UserError: the folder holds no dataset, or a file is missing, damaged or of another shape than the manifest
                says.
        """
        manifest = _read_manifest(folder)
        shape = tuple(manifest["shape"])
        shards: list[Images] = [
            _map(folder / shard["file"], np.uint8, (shard["count"], *shape)) for shard in manifest["shards"]
        ]
        if manifest["labels"] is None:
            return cls(folder, manifest, shards, None)
        path, num_classes = folder / manifest["labels"]["file"], len(manifest["labels"]["class_names"])
        labels: Labels = np.array(_map(path, np.int64, (sum(map(len, shards)),)))
        if labels.min() < 0 or labels.max() >= num_classes:
            raise _damaged(path, f"holds labels outside [0, {num_classes})")
        return cls(folder, manifest, shards, labels)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels; empty without labels."""
        labels = self.manifest["labels"]
        return tuple(labels["class_names"]) if labels else ()

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    def sha256(self) -> str:
        """Digest of the whole dataset (see `dataset_sha256`)."""
        return str(self.manifest["sha256"])

    def gather(self, indices: NDArray[np.integer]) -> Images:
        """The images of `indices` (B,), in their order, as (B, H, W, C).

        Raises:
            IndexError: an index is not in [0, N).
        """
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"expected indices in [0, {len(self)}), got {indices.min()} to {indices.max()}")
        if len(self._shards) == 1:
            return self._shards[0][indices]
        images = np.empty((len(indices), *self.shape), dtype=np.uint8)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shard_of):
            shard, here = self._shards[number], shard_of == number
            images[here] = shard[indices[here] - (self._ends[number] - len(shard))]
        return images

    def all(self) -> Images:
        """Every image, (N, H, W, C), in memory."""
        return np.concatenate(self._shards)

    def verify(self, memory: Path | None = None) -> None:
        """Hash every file and compare with the manifest.

        Args:
            memory: a file that records which files were verified; they are not read again while their size,
                modification time and inode stay the same.

        Raises:
            UserError: a file is not the one that was written, or `memory` cannot be written.
        """
        entries = _files(self.manifest)
        stats = [(self.folder / entry["file"]).stat() for entry in entries]
        seen = [
            [entry["file"], entry["sha256"], stat.st_size, stat.st_mtime_ns, stat.st_ino]
            for entry, stat in zip(entries, stats, strict=True)
        ]
        with suppress(OSError, ValueError):  # not written yet, or damaged
            if memory is not None and json.loads(memory.read_text(encoding="utf-8")) == seen:
                return
        for entry in entries:
            path = self.folder / entry["file"]
            if file_sha256(path) != entry["sha256"]:
                raise _damaged(path, "is not the file that was written (its sha256 differs)")
        if memory is not None:
            publish_text(memory, json.dumps(seen))


@dataclass(frozen=True)
class StoredImages:
    """One or more prepared datasets of the same shape and classes, concatenated: uint8 (N, H, W, C)."""

    parts: Sequence[ImageArrays]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        return len(self), *self.parts[0].shape

    @property
    def sha256(self) -> str:
        """Digest of the images and labels; that of the dataset if there is only one."""
        hashes = [part.sha256 for part in self.parts]
        return hashes[0] if len(hashes) == 1 else values_sha256(hashes)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return self.parts[0].num_classes

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64, or None."""
        labels = [part.labels for part in self.parts if part.labels is not None]
        return np.concatenate(labels) if len(labels) == len(self.parts) else None

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The images of a slice, or of indices (B,), in their order: (B, H, W, C)."""
        indices = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        images = np.empty((len(indices), *self.shape[1:]), dtype=np.uint8)
        start = 0
        for part in self.parts:
            here = (indices >= start) & (indices < start + len(part))
            images[here] = part.gather(indices[here] - start)
            start += len(part)
        return images


def dataset_sha256(manifest: Mapping[str, Any]) -> str:
    """The digest of images, shape and labels; it does not depend on where the images came from."""
    labels = manifest["labels"]
    content = {
        "shape": manifest["shape"],
        "shards": [shard["sha256"] for shard in manifest["shards"]],
        "labels": labels and {"sha256": labels["sha256"], "class_names": labels["class_names"]},
    }
    return values_sha256(content)


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest's entries of files: shards, then labels."""
    return [*manifest["shards"], *([manifest["labels"]] if manifest["labels"] else [])]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = checked(json.loads(path.read_bytes()))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}")
        for file in _files(manifest):
            if not FILE_NAME.fullmatch(file["file"]):
                raise ValueError(f"{file['file']!r} is not the name of a file beside it")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no dataset in {folder} (no {path}): `maskdm prepare` makes it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"is not a complete {FORMAT} manifest ({error})") from None
    return manifest


def _map(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map an array file, and check its dtype and shape."""
    try:
        mapped: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        reason = getattr(error, "strerror", None) or error
        raise _damaged(path, f"cannot be read or is cut off ({reason})") from None
    if mapped.shape != shape or mapped.dtype != dtype:
        raise _damaged(path, f"holds {mapped.dtype} of shape {mapped.shape}, expected {np.dtype(dtype)} of {shape}")
    return mapped.view(np.ndarray)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}: remove {path.parent} and run `maskdm prepare` again")
