"""The dataset on disk: memory-mapped .npy shards of uint8 images, labels, and a manifest that describes them.

Equal images give equal bytes: nothing here depends on the time, the machine or where the folder lies.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maskdm.base.checksums import CHECKSUM, checked, file_sha256, values_sha256
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description, replace_file
from maskdm.config import paths

FORMAT = "maskdm-arrays/2"
MANIFEST = "manifest.json"
LABELS = "labels.npy"

Images = NDArray[np.uint8]  # one image (H, W, C) or a batch (B, H, W, C), values 0..255
Labels = NDArray[np.int64]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # beside the manifest, never a path
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Shard(_Entry):
    file: FileName
    count: Count
    sha256: Digest


class _LabelsFile(_Entry):
    file: FileName
    sha256: Digest
    class_names: Annotated[list[str], Field(min_length=1)]


class _Skipped(_Entry):
    file: str
    reason: str


class _Manifest(_Entry):
    """What manifest.json holds."""

    format: Literal["maskdm-arrays/2"]
    count: Count
    shape: tuple[Count, Count, Count]
    dtype: Literal["uint8"]
    shards: Annotated[list[_Shard], Field(min_length=1)]
    labels: _LabelsFile | None
    sha256: Digest
    source: dict[str, Any]
    protocol: dict[str, Any]
    skipped: list[_Skipped]

    @model_validator(mode="after")
    def _shards_hold_count(self) -> Self:
        held = sum(shard.count for shard in self.shards)
        if held != self.count:
            raise ValueError(f"its shards hold {held} images, but count is {self.count}")
        return self


@dataclass
class LabelledImages:
    """What an embedded source gives.

    Attributes:
        images: pairs of an image (H, W, C) and the index of its class (None without classes), read once.
        class_names: the names of the classes, or None.
    """

    images: Iterator[tuple[Images, int | None]]
    class_names: tuple[str, ...] | None


class ShardFile:
    """One shard while it is written, image by image.

    Args:
        path: the .npy file.
        shape: (H, W, C) of every image.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.count, self._shape = 0, shape
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def add(self, image: Images) -> None:
        """Append an image.

        Raises:
            ValueError: the image's shape or dtype is not the dataset's.
        """
        check_image(image, self._shape)
        self._file.write(image.tobytes())
        self.count += 1

    def finish(self) -> None:
        """Write down how many images there are."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def _write_header(self) -> None:
        """A shard's .npy header; numpy pads it to the same length for every count: it can be written again."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def check_image(image: Images, shape: tuple[int, int, int]) -> None:
    """Refuse an image of another shape or dtype.

    Raises:
        ValueError: it is one.
    """
    if image.shape != shape or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 of shape {shape}, got {image.dtype} of {image.shape}")


def shard_name(number: int) -> str:
    """The file of a dataset's shard."""
    return f"images-{number:05d}.npy"


class ShardWriter:
    """Streams images into shards; holds no more than the image it is given, and 8 bytes of label per image.

    Args:
        folder: an existing, empty folder.
        shape: (H, W, C) of every image.
        shard_images: images per shard; the last holds the rest.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], shard_images: int) -> None:
        self._folder, self._shape, self._shard_images = folder, shape, shard_images
        self._labels = array("q")
        self._shards: list[dict[str, Any]] = []
        self._open: ShardFile | None = None

    def add(self, image: Images, label: int | None = None) -> None:
        """Append an image, and its label where the dataset has classes.

        Raises:
            ValueError: the image's shape or dtype is not the dataset's.
        """
        check_image(image, self._shape)
        if self._open is None:
            self._open = ShardFile(self._path(), self._shape)
        self._open.add(image)
        if label is not None:
            self._labels.append(label)
        if self._open.count == self._shard_images:
            self._close_shard()

    def finish(
        self,
        class_names: tuple[str, ...] | None,
        source: Mapping[str, Any],
        protocol: Mapping[str, Any],
        skipped: list[dict[str, str]],
    ) -> dict[str, Any]:
        """Write the last shard, the labels and the manifest; return the manifest."""
        self._close_shard()
        labels = None if class_names is None else np.array(self._labels, dtype=np.int64)
        entries = Entries(self._shards, labels, class_names, skipped)
        return write_manifest(self._folder, self._shape, entries, source, protocol)

    def close(self) -> None:
        """Let go of a half-written shard."""
        if self._open is not None:
            self._open.close()

    def _path(self) -> Path:
        return self._folder / shard_name(len(self._shards))

    def _close_shard(self) -> None:
        if self._open is None:
            return
        self._open.finish()
        path = self._path()
        self._shards.append({"file": path.name, "count": self._open.count, "sha256": file_sha256(path)})
        self._open = None


@dataclass(frozen=True)
class Entries:
    """What a dataset holds, for its manifest.

    Attributes:
        shards: {"file", "count", "sha256"} of every shard, in order.
        labels: (N,) of all their images, or None.
        class_names: of the labels, or None.
        skipped: the bad images left out, as {"file", "reason"}.
    """

    shards: list[dict[str, Any]]
    labels: Labels | None
    class_names: tuple[str, ...] | None
    skipped: list[dict[str, str]]


def write_manifest(
    folder: Path,
    shape: tuple[int, int, int],
    entries: Entries,
    source: Mapping[str, Any],
    protocol: Mapping[str, Any],
) -> dict[str, Any]:
    """Write labels and manifest beside shards that are there; return the manifest."""
    count = sum(shard["count"] for shard in entries.shards)
    assert count > 0, "a source without images is an error of the source"
    content: dict[str, Any] = {
        "format": FORMAT,
        "count": count,
        "shape": list(shape),
        "dtype": "uint8",
        "shards": entries.shards,
        "labels": _write_labels(folder, count, entries),
        "source": dict(source),
        "protocol": dict(protocol),
        "skipped": entries.skipped,
    }
    content["sha256"] = _dataset_digest(content)
    publish_description(folder / MANIFEST, content)
    return content


def _write_labels(folder: Path, count: int, entries: Entries) -> dict[str, Any] | None:
    if entries.class_names is None:
        return None
    assert entries.labels is not None and len(entries.labels) == count, "every image of a dataset with classes has one"
    path = folder / LABELS
    np.save(path, entries.labels)
    return {"file": path.name, "sha256": file_sha256(path), "class_names": list(entries.class_names)}


class ImageArrays:
    """A dataset that `maskdm prepare` wrote; pixels stay on disk until they are asked for.

    Attributes:
        folder: where it lies.
        manifest: the content of manifest.json.
        labels: (N,) int64 in [0, num_classes), or None.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Images], labels: Labels | None) -> None:
        self.folder, self.manifest, self.labels = folder, manifest, labels
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    @classmethod
    def open(cls, folder: Path = paths.DATA) -> Self:
        """Open a dataset, reading its manifest and labels and mapping its shards.

        Raises:
            UserError: there is none, or a file is missing, damaged or not of the manifest's shape.
        """
        manifest = _read_manifest(folder)
        shards = [_map_shard(folder, shard, manifest) for shard in manifest.shards]
        return cls(folder, manifest.model_dump(mode="json"), shards, _read_labels(folder, manifest))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.manifest["shape"]
        return height, width, channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names in the order of the labels; empty without labels."""
        labels = self.manifest["labels"]
        return tuple(labels["class_names"]) if labels else ()

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)

    @property
    def sha256(self) -> str:
        """The digest of the whole dataset: of its shards' digests, its shape and its labels."""
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
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shard_of):
            shard, here = self._shards[number], shard_of == number
            out[here] = shard[indices[here] - (self._ends[number] - len(shard))]
        return out

    def all(self) -> Images:
        """Every image, (N, H, W, C), in memory."""
        return np.concatenate(self._shards)

    def verify(self, memory: Path | None = None) -> None:
        """Hash every file and compare with the manifest.

        Args:
            memory: a file to note in what was found whole: the same files, untouched since, are not read again.

        Raises:
            UserError: a file is not the one that was written, or `memory` can't be written.
        """
        manifest = self.manifest
        entries = [entry for entry in (*manifest["shards"], manifest["labels"]) if entry]
        seen = [[e["file"], e["sha256"], *_stamp(self.folder / e["file"])] for e in entries]
        if memory is not None and _read_memory(memory) == seen:
            return
        for entry in entries:
            path = self.folder / entry["file"]
            if file_sha256(path) != entry["sha256"]:
                raise _damaged(path, "is not the file that was written (its sha256 differs)")
        if memory is not None:
            with replace_file(memory) as file:
                file.write_text(json.dumps(seen), encoding="utf-8")


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _read_memory(memory: Path) -> Any:
    try:
        return json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _dataset_digest(manifest: Mapping[str, Any]) -> str:
    """What makes two datasets the same to every later stage; where they came from does not matter."""
    labels = manifest["labels"]
    content = {
        "shape": manifest["shape"],
        "shards": [shard["sha256"] for shard in manifest["shards"]],
        "labels": labels and {"sha256": labels["sha256"], "class_names": labels["class_names"]},
    }
    return values_sha256(content)


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        fields = {k: v for k, v in content.items() if k != CHECKSUM} if isinstance(content, dict) else content
        manifest = _Manifest.model_validate_json(json.dumps(fields))
        checked(content)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no dataset in {folder} (no {path}): `maskdm prepare` makes it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        what = [".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")]
        raise _damaged(path, f"is no complete {FORMAT} manifest ({': '.join(filter(None, what))})") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is no complete {FORMAT} manifest ({error})") from None
    return manifest


def _map_shard(folder: Path, shard: _Shard, manifest: _Manifest) -> Images:
    path = folder / shard.file
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header makes numpy raise almost anything
        raise _damaged(path, _reason(error)) from None
    expected = (shard.count, *manifest.shape)
    if mapped.shape != expected or mapped.dtype != np.uint8:
        raise _damaged(path, f"holds {mapped.dtype} of shape {mapped.shape}, expected uint8 of {expected}")
    return mapped.view(np.ndarray)


def _read_labels(folder: Path, manifest: _Manifest) -> Labels | None:
    if manifest.labels is None:
        return None
    path, num_classes = folder / manifest.labels.file, len(manifest.labels.class_names)
    try:
        labels: Labels = np.lib.format.open_memmap(path, mode="r")  # as np.load, but for .npy alone, and lazily
    except Exception as error:  # as above
        raise _damaged(path, _reason(error)) from None
    expected = (manifest.count,)
    if labels.shape != expected or labels.dtype != np.int64:
        raise _damaged(path, f"holds {labels.dtype} of shape {labels.shape}, expected int64 of {expected}")
    labels = np.array(labels)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(path, f"holds labels outside [0, {num_classes})")
    return labels


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read or is cut off ({getattr(error, 'strerror', None) or error})"


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}: remove {path.parent} and run `maskdm prepare` again")
