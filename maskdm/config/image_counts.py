"""The number of images of a source that are used and held out, as far as it is known before they are read."""

from __future__ import annotations

from maskdm.config.schema import SPLITS, DatasetConfig, Params

NUM_IMAGES = {**SPLITS, "digits": {"train": 1_797}}  # of the whole sources, by split

MIN_REAL = 4  # real images to score samples against: each half of them has a covariance and a nearest neighbour


def num_used(dataset: DatasetConfig, available: int) -> int:
    """The number of images that `limit` or `fraction` leaves, of those whose classes are used."""
    if dataset.fraction is not None:
        return max(1, round(dataset.fraction * available))
    return available if dataset.limit is None else min(dataset.limit, available)


def num_held_out(dataset: DatasetConfig, used: int) -> int:
    """The number of used images that are not trained on."""
    return round(dataset.held_out * used)


def most_real(params: Params) -> int | None:
    """The largest possible number of real images to compare samples with; None if it is not known before `prepare`."""
    dataset = params.dataset
    available = NUM_IMAGES.get(dataset.source, {}).get(dataset.split or "train")
    used = dataset.limit if available is None else num_used(dataset, available)
    if used is None:
        return None
    held_out = num_held_out(dataset, used)
    return {"train": used - held_out, "held_out": held_out, "all": used}[params.evaluation.reference]
