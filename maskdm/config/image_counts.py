"""How many images of a source are used and held out: of those that are there, or as far as that is known before."""

from __future__ import annotations

from maskdm.config import DatasetConfig, Params

# Of the whole sources, by split.
NUM_IMAGES = {
    "digits": {"train": 1_797},
    "mnist": {"train": 60_000, "test": 10_000, "all": 70_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000, "all": 70_000},
    "svhn": {"train": 73_257, "test": 26_032, "extra": 531_131},
}


def num_used(dataset: DatasetConfig, available: int) -> int:
    """How many of the images of the classes used `limit` or `fraction` leave."""
    if dataset.fraction is not None:
        return max(1, round(dataset.fraction * available))
    return available if dataset.limit is None else min(dataset.limit, available)


def num_held_out(dataset: DatasetConfig, used: int) -> int:
    """How many of the images used are kept from training."""
    return round(dataset.held_out * used)


def most_real(params: Params) -> int | None:
    """How many images samples are compared with at most; None where only the images tell."""
    dataset = params.dataset
    available = NUM_IMAGES.get(dataset.source, {}).get(dataset.split or "train")
    used = dataset.limit if available is None else num_used(dataset, available)
    if used is None:
        return None
    held_out = num_held_out(dataset, used)
    return {"train": used - held_out, "held_out": held_out, "all": used}[params.evaluation.reference]
