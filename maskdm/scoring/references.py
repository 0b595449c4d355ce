"""Features of the real images and their statistics on disk: in results/features, and in a cache for other experiments.

Features of a pretrained extractor take hours for large datasets, and are the same for every experiment that compares
with the same images. They are cached in the project's `.work/references`, which may be deleted at any time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from maskdm.base.checksums import file_sha256, values_sha256
from maskdm.base.errors import UserError
from maskdm.base.locks import one_writer
from maskdm.base.publishing import link_or_copy, publish_folder, remove
from maskdm.base.tensors import DamagedError, load_tensors, save_tensors
from maskdm.config import EvaluationConfig, paths
from maskdm.scoring.classifier import Pixels
from maskdm.scoring.extractors import FeatureExtractor
from maskdm.scoring.scores import Reference

STATISTICS = "statistics.safetensors"
FILES = (paths.REAL_FEATURES, STATISTICS)
FORMAT = 1  # of the cache


def make_reference(
    folder: Path,
    images: Pixels,
    images_sha256: str,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    title: str = "real features",
    should_keep: bool = True,
) -> Reference:
    """Write the features of real images and their statistics, computed or taken from the cache.

    Args:
        folder: an existing folder without these files.
        images: uint8 (N, H, W, C).
        images_sha256: hash of the images.
        extractor: computes the features.
        config: batch size, and neighbourhood of precision and recall.
        title: for the progress display.
        should_keep: whether to cache them for other experiments, if the extractor is pretrained.

    Raises:
        UserError: a batch does not fit into memory.
    """
    neighborhood = config.prc_neighborhood
    key = key_of(images_sha256, extractor, config.batch_size, neighborhood)
    if (kept := restore(key, folder, neighborhood)) is not None:
        return kept
    features = extractor.features(images, config.batch_size, title, folder / paths.REAL_FEATURES)
    reference = Reference.of(features, neighborhood)
    save_statistics(folder, reference)
    if should_keep and config.features not in ("classifier", "pixels"):
        keep(key, folder)
    return reference


def save_statistics(folder: Path, reference: Reference) -> None:
    """Write the statistics of a folder's features next to them."""
    tensors = {name: torch.from_numpy(getattr(reference, name)) for name in ("mean", "covariance", "radii")}
    features_sha256 = file_sha256(folder / paths.REAL_FEATURES)
    info = {"features_sha256": features_sha256, "neighborhood": reference.neighborhood}
    save_tensors(folder / STATISTICS, {"reference": tensors}, info)


def open_reference(folder: Path, neighborhood: int) -> Reference:
    """Open a folder's features, memory-mapped, and their statistics.

    Args:
        folder: a folder that `make_reference` filled.
        neighborhood: the expected neighbourhood of the radii.

    Raises:
        UserError: the files are damaged or do not belong together.
    """
    features, statistics = folder / paths.REAL_FEATURES, folder / STATISTICS
    sets, info = load_tensors(statistics)
    if info.get("features_sha256") != file_sha256(features) or info.get("neighborhood") != neighborhood:
        raise DamagedError(
            f"{statistics} was computed from other features than those beside it; run first: maskdm features --force",
            f"the sha256 of {features.name} is another",
        )
    mapped: np.ndarray = np.lib.format.open_memmap(features, mode="r")
    computed = {name: tensor.numpy() for name, tensor in sets["reference"].items()}
    return Reference(mapped, **computed, neighborhood=neighborhood)


def key_of(images_sha256: str, extractor: FeatureExtractor, batch_size: int, neighborhood: int) -> str:
    """The name of a cache entry: a hash of everything that the bytes depend on.

    Batch size, device and number of CPU threads change features only by rounding, but a run's bytes must not depend on
    which experiments ran before.
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
    """The folder of a cache entry: in the project's work folder, shared by its experiments."""
    return paths.project_root() / paths.WORK / "references" / key


def restore(key: str, folder: Path, neighborhood: int) -> Reference | None:
    """Copy or link a cache entry's files into a folder and open them.

    Args:
        key: the entry's name, from `key_of`.
        folder: an existing folder without these files.
        neighborhood: the neighbourhood in the key.

    Returns:
        None if there is no entry, or it is damaged; damage is reported on stderr.
    """
    entry = kept_at(key)
    if not entry.is_dir():
        return None
    try:
        for name in FILES:
            link_or_copy(entry / name, folder / name)
        reference = open_reference(folder, neighborhood)
    except (UserError, OSError) as error:
        reason = error.reason if isinstance(error, DamagedError) else " ".join(str(error).split())
        print(f"the cached features in {entry} are damaged ({reason}): computing them again", file=sys.stderr)
        for name in FILES:  # hard links to the damaged files: never write to them
            remove(folder / name)
        return None
    print(f"real features: taken from the cache {entry} (same images and extractor)", file=sys.stderr)
    return reference


def keep(key: str, folder: Path) -> None:
    """Cache a folder's files for other experiments; if they cannot be written, print why and continue."""
    place = kept_at(key)
    try:
        with one_writer(place.with_suffix(".lock"), "cache the real features"), publish_folder(place) as entry:
            for name in FILES:
                link_or_copy(folder / name, entry / name)
    except (UserError, OSError) as error:
        print(f"the real features are not cached for other experiments: {error}", file=sys.stderr)
