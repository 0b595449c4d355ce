"""Features of the real images with their statistics, on disk: in results/features, and kept for other experiments.

What a pretrained extractor makes of a dataset takes hours for large ones, and is the same for every experiment that
compares with these images: it is kept in `.work/references` of the project, whose entries may be deleted at any time.
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
FORMAT = 1  # of what is kept


def make_reference(
    folder: Path,
    images: Pixels,
    images_sha256: str,
    extractor: FeatureExtractor,
    config: EvaluationConfig,
    title: str = "real features",
    should_keep: bool = True,
) -> Reference:
    """Write the features of real images and their statistics: computed, or taken from what is kept.

    Args:
        folder: an existing one, without them.
        images: uint8 (N, H, W, C).
        images_sha256: of them.
        extractor: makes the features.
        config: the size of batches, the manifold's neighbourhood.
        title: for the progress display.
        should_keep: whether to keep them for other experiments, if the extractor is a pretrained one.

    Raises:
        UserError: a batch does not fit into memory.
    """
    neighborhood = config.prc_neighborhood
    key = key_of(images_sha256, extractor, config.batch_size, neighborhood)
    if (kept := bring_back(key, folder, neighborhood)) is not None:
        return kept
    features = extractor.features(images, config.batch_size, title, folder / paths.REAL_FEATURES)
    reference = Reference.of(features, neighborhood)
    save_statistics(folder, reference)
    if should_keep and config.features not in ("classifier", "pixels"):
        keep(key, folder)
    return reference


def save_statistics(folder: Path, reference: Reference) -> None:
    """Write what was computed of the features in a folder beside them."""
    tensors = {name: torch.from_numpy(getattr(reference, name)) for name in ("mean", "covariance", "radii")}
    features_sha256 = file_sha256(folder / paths.REAL_FEATURES)
    info = {"features_sha256": features_sha256, "neighborhood": reference.neighborhood}
    save_tensors(folder / STATISTICS, {"reference": tensors}, info)


def open_reference(folder: Path, neighborhood: int) -> Reference:
    """The features in a folder, memory-mapped, and their statistics.

    Args:
        folder: that `make_reference` has filled.
        neighborhood: that the radii must be of.

    Raises:
        UserError: they are damaged or do not belong together.
    """
    features, statistics = folder / paths.REAL_FEATURES, folder / STATISTICS
    sets, info = load_tensors(statistics)
    if info.get("features_sha256") != file_sha256(features) or info.get("neighborhood") != neighborhood:
        raise DamagedError(
            f"{statistics} was computed of other features than those beside it; run first: maskdm features --force",
            f"the sha256 of {features.name} is another",
        )
    mapped: np.ndarray = np.lib.format.open_memmap(features, mode="r")
    computed = {name: tensor.numpy() for name, tensor in sets["reference"].items()}
    return Reference(mapped, **computed, neighborhood=neighborhood)


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


def bring_back(key: str, folder: Path, neighborhood: int) -> Reference | None:
    """Put a kept entry's files into a folder and open them.

    Args:
        key: of `key_of`.
        folder: an existing one, without them.
        neighborhood: of the key.

    Returns:
        None where nothing is kept, or what is kept is damaged; damage is reported on stderr.
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
        print(f"the kept features in {entry} are damaged ({reason}): computed anew", file=sys.stderr)
        for name in FILES:  # a second name of the damaged file, which is not to be written to
            remove(folder / name)
        return None
    print(f"real features: taken from {entry}, of the same images and extractor", file=sys.stderr)
    return reference


def keep(key: str, folder: Path) -> None:
    """Keep what a folder has for other experiments; where that can't be written, say so and go on."""
    place = kept_at(key)
    try:
        with one_writer(place.with_suffix(".lock"), "keep the real features"), publish_folder(place) as entry:
            for name in FILES:
                link_or_copy(folder / name, entry / name)
    except (UserError, OSError) as error:
        print(f"the real features are not kept for other experiments: {error}", file=sys.stderr)
