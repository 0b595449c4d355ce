"""Select the images of a source: by class, by number, and which of them to hold out."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from maskdm.base.errors import UserError
from maskdm.config import DatasetConfig
from maskdm.config.image_counts import num_held_out, num_used
from maskdm.data.arrays import Labels
from maskdm.data.collection import Collection, Numbers

USED, HELD_OUT = 0, 1  # random streams of a dataset's seed
MAX_NAMES = 20  # of classes, in a message


@dataclass(frozen=True)
class Selection:
    """The selected images, by number in their source, in its order.

    Attributes:
        train: (N,) images to train on.
        held_out: (M,) images never to train on.
        class_names: the selected classes, in the source's order, or None.
        labels: one label per image of the source, in [0, number of selected classes), −1 for other classes; or None.
        counts: numbers of images: in the source, of the selected classes, used.
    """

    train: Numbers
    held_out: Numbers
    class_names: tuple[str, ...] | None
    labels: Labels | None
    counts: dict[str, int]


def select(collection: Collection, dataset: DatasetConfig) -> Selection:
    """Apply `classes`, then `limit` or `fraction`, then `held_out`.

    The draw depends only on `dataset.seed` and on the number of images to draw from; a smaller draw is a subset of a
    larger one. (For `swissroll`, `limit` is the number of points that are generated.)

    Raises:
        UserError: there are no images, no such classes, or too few images to hold some out.
    """
    if not len(collection):
        raise UserError(f"dataset: {collection.origin} holds no images")
    class_names, labels = _of_classes(collection, dataset.classes)
    everything = np.arange(len(collection)) if labels is None else np.flatnonzero(labels >= 0)
    if not len(everything):
        raise UserError(f"dataset.classes: no image belongs to {', '.join(dataset.classes or ())}")
    used = everything[_drawn(len(everything), num_used(dataset, len(everything)), dataset.seed, USED)]
    number = num_held_out(dataset, len(used))
    if dataset.held_out and not 0 < number < len(used):
        raise UserError(
            f"dataset.held_out {dataset.held_out:g} of {len(used)} images is {number}: expected at least one to hold "
            "out and one to train on; change it, or use more images"
        )
    is_held_out = np.zeros(len(used), dtype=bool)
    is_held_out[_drawn(len(used), number, dataset.seed, HELD_OUT)] = True
    counts = {"available": len(collection), "of_classes": len(everything), "used": len(used)}
    return Selection(used[~is_held_out], used[is_held_out], class_names, labels, counts)


def facts(selection: Selection, dataset: DatasetConfig) -> dict[str, Any]:
    """How the images were selected, for the manifest."""
    knobs = dataset.model_dump(mode="json", include={"split", "classes", "limit", "fraction", "held_out", "seed"})
    return {**knobs, "counts": {**selection.counts, "held_out": len(selection.held_out)}}


def _of_classes(collection: Collection, wanted: list[str] | None) -> tuple[tuple[str, ...] | None, Labels | None]:
    """Names and labels of the requested classes."""
    names, labels = collection.class_names, collection.labels
    if wanted is None:
        return names, labels
    if names is None or labels is None:
        raise UserError(f"dataset.classes: {collection.origin} has no classes: remove dataset.classes")
    for name in wanted:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names[:MAX_NAMES])}{more}"
            raise UserError(f"dataset.classes: {collection.origin} has no class {name!r}; {hint}")
    kept = [number for number, name in enumerate(names) if name in wanted]
    new = np.full(len(names), -1, dtype=np.int64)
    new[kept] = np.arange(len(kept))
    return tuple(names[number] for number in kept), new[labels]


def _drawn(available: int, number: int, seed: int, stream: int) -> Numbers:
    """Draw `number` of `available` images, sorted: those with the smallest random keys.

    The keys are a bit generator's raw output, which NumPy keeps the same in all versions.
    """
    keys = np.random.PCG64([seed, stream]).random_raw(available)
    return np.sort(np.argsort(keys, kind="stable")[:number])
