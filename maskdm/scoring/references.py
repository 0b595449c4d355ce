"""Reference statistics on disk: in results/features, and kept for other experiments on the same images.

What a pretrained extractor makes of a dataset takes hours for large ones, and is the same for every experiment that
compares with these images: it is kept in `.work/references` of the project, whose entries may be deleted at any time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskdm.base.checksums import checked, file_sha256, values_sha256, with_checksum
from maskdm.base.errors import UserError
from maskdm.base.locks import one_writer
from maskdm.base.publishing import link_or_copy, publish_folder
from maskdm.base.tensors import load_tensors, save_tensors
from maskdm.config import paths
from maskdm.scoring.extractors import FeatureExtractor
from maskdm.scoring.scores import Reference

STATISTICS = "statistics.safetensors"
ENTRY = "entry.json"
FORMAT = 1  # of what is kept


def save_statistics(folder: Path, reference: Reference, features_sha256: str) -> None:
    """Write what was computed of the features beside them.

    Args:
        folder: that holds the features.
        reference: computed of them.
        features_sha256: of their file.
    """
    tensors = {name: torch.from_numpy(np.array(getattr(reference, name))) for name in ("mean", "covariance", "radii")}
    info = {"features_sha256": features_sha256, "neighborhood": reference.neighborhood}
    save_tensors(folder / STATISTICS, {"reference": tensors}, info)


def load_statistics(folder: Path, features: np.ndarray, features_sha256: str, neighborhood: int) -> Reference:
    """What `save_statistics` wrote.

    Args:
        folder: that holds it.
        features: (M, D) real images' features.
        features_sha256: of their file.
        neighborhood: that the radii must be of.

    Raises:
        UserError: it is missing, damaged, or was computed of other features.
    """
    path = folder / STATISTICS
    sets, info = load_tensors(path)
    found = {name: tensor.numpy() for name, tensor in sets.get("reference", {}).items()}
    count, dim = features.shape
    expected = {"mean": (dim,), "covariance": (dim, dim), "radii": (count,)}
    if (
        info.get("features_sha256") != features_sha256
        or info.get("neighborhood") != neighborhood
        or {name: array.shape for name, array in found.items()} != expected
        or any(array.dtype != np.float64 for array in found.values())
    ):
        raise UserError(
            f"{path} was computed of other features than those beside it; run first: maskdm features --force"
        )
    return Reference(features, **found, neighborhood=neighborhood)


def open_reference(folder: Path, neighborhood: int) -> Reference:
    """Features and statistics of a folder, as they lie there; for folders that nobody else has touched.

    Args:
        folder: that `bring_back` has filled.
        neighborhood: that the radii must be of.

    Raises:
        UserError: they do not belong together.
    """
    features: np.ndarray = np.lib.format.open_memmap(folder / paths.REAL_FEATURES, mode="r")
    return load_statistics(folder, features, file_sha256(folder / paths.REAL_FEATURES), neighborhood)


def key_of(images_sha256: str, extractor: FeatureExtractor, batch_size: int, neighborhood: int) -> str:
    """The name of a kept entry: the images, the extractor and what else makes equal bytes.

    The size of batches, the device and the threads of a CPU change features by rounding alone, but runs are to be
    equal whatever ran before them.
    """
    is_cpu = extractor.device.type == "cpu"
    threads = [torch.get_num_threads()] if is_cpu else []
    return values_sha256(
        {
            "format": FORMAT,
            "images": images_sha256,
            "extractor": [extractor.name, extractor.sha256],
            "computed": [batch_size, extractor.device.type, *threads, torch.__version__],
            "neighborhood": neighborhood,
        }
    )[:32]


def kept_at(key: str) -> Path:
    """Where an entry lies: in the project's work folder, for all of its experiments."""
    return paths.project_root() / paths.WORK / "references" / key


def bring_back(key: str, folder: Path) -> bool:
    """Put a kept entry's files into a folder, if it is there and whole; a damaged one is told of and left out.

    Args:
        key: of `key_of`.
        folder: an existing one, without them.
    """
    entry = kept_at(key)
    if not (entry / ENTRY).is_file():
        return False
    if damage := _damage(entry):
        print(f"the kept features in {entry} are damaged ({damage}): computed anew", file=sys.stderr)
        return False
    for name in (paths.REAL_FEATURES, STATISTICS):
        link_or_copy(entry / name, folder / name)
    print(f"real features: taken from {entry}, of the same images and extractor", file=sys.stderr)
    return True


def keep(key: str, folder: Path) -> None:
    """Keep what a folder has for other experiments; where that can't be written, say so and go on."""
    place = kept_at(key)
    try:
        with one_writer(place.with_suffix(".lock"), "keep the real features"):
            if not (place / ENTRY).is_file() or _damage(place):
                with publish_folder(place) as entry:
                    _fill(entry, folder)
    except (UserError, OSError) as error:
        print(f"the real features are not kept for other experiments: {error}", file=sys.stderr)


def _fill(entry: Path, folder: Path) -> None:
    for name in (paths.REAL_FEATURES, STATISTICS):
        link_or_copy(folder / name, entry / name)
    hashes = {name: file_sha256(entry / name) for name in (paths.REAL_FEATURES, STATISTICS)}
    (entry / ENTRY).write_text(json.dumps(with_checksum(hashes)), encoding="utf-8")


def _damage(entry: Path) -> str:
    """What is wrong with a kept entry; empty if nothing is."""
    try:
        hashes: dict[str, Any] = checked(json.loads((entry / ENTRY).read_text(encoding="utf-8")))
        for name in (paths.REAL_FEATURES, STATISTICS):
            if file_sha256(entry / name) != hashes[name]:
                return f"the sha256 of {name} is another"
    except (OSError, ValueError, KeyError, RecursionError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""
