"""Stage `prepare`: the datasets as uint8 arrays in shards."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.config.image_counts import most_real
from maskdm.config.preflight import check_num_real
from maskdm.data.arrays import ImageArrays
from maskdm.data.prepare import check_apart, prepare
from maskdm.data.selection import Selection
from maskdm.stages.runner import Task


def run(task: Task, folder: Path) -> None:
    """Write the datasets of params.yaml.

    Raises:
        UserError: the images can't be read, or there are too few to score samples against.
    """
    params = task.params
    check_num_real(params, most_real(params))
    check_apart(params, paths.DATA)
    manifest = prepare(params, folder, check=partial(_check_selection, params))
    facts = {"num_images": manifest["count"], "shape": manifest["shape"]}
    task.record.update(facts)
    _warn_of_too_few(params, folder)


def _check_selection(params: Params, selection: Selection) -> None:
    train, held_out = len(selection.train), len(selection.held_out)
    counts = {"train": train, "held_out": held_out, "all": train + held_out}
    check_num_real(params, counts[params.evaluation.reference])


def _warn_of_too_few(params: Params, folder: Path) -> None:
    """Warn if skipped bad images left too few; the arrays can still be used with smaller subsets."""
    held_out = folder / paths.HELD_OUT.name
    counts = {"train": len(ImageArrays.open(folder))}
    counts["held_out"] = len(ImageArrays.open(held_out)) if held_out.is_dir() else 0
    counts["all"] = sum(counts.values())
    try:
        check_num_real(params, counts[params.evaluation.reference])
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
