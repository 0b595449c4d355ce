"""Stage `prepare`: the datasets as sharded uint8 arrays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from maskdm import paths
from maskdm.config import Params
from maskdm.data.prepare import prepare, prepare_part
from maskdm.data.selection import Selection
from maskdm.errors import ParamsError, UserError
from maskdm.image_counts import most_real
from maskdm.preflight import check_num_real
from maskdm.publishing import one_writer
from maskdm.stages.real_images import open_dataset
from maskdm.stages.session import stage_session
from maskdm.stages.versions import STAGE_VERSIONS

KEPT = paths.WORK / "prepare"  # finished shards, until all of them are


def run(params: Params, part: int | None = None) -> None:
    """Prepare the datasets of params into results/data; or make one part of their shards ahead.

    Args:
        params: the experiment.
        part: of `data.prepare_jobs`, from 0; None for all that is not there yet, and the result.

    Raises:
        UserError: the images can't be read, or are too few to score samples against.
        ParamsError: there is no such part.
    """
    check_num_real(params, most_real(params))
    if part is not None:
        _run_part(params, part)
        return
    with stage_session(params, "prepare", output=paths.DATA) as session:
        if session.is_to_do:
            kept = KEPT if params.data.prepare_jobs > 1 or KEPT.exists() else None
            with nullcontext() if kept is None else _no_part_at_work(params.data.prepare_jobs):
                manifest = prepare(
                    params, kept=kept, version=STAGE_VERSIONS["prepare"], check=partial(_check_selection, params)
                )
            facts = {"num_images": manifest["count"], "shape": manifest["shape"]}
            session.record.update(facts)
            session.tracked.params(**facts)
            session.tracked.figure(paths.DATA / "preview.png")
    try:  # bad ones may have been skipped
        check_num_real(params, len(open_dataset(params).reference(params.evaluation.reference)))
    except UserError as error:  # what was made serves for smaller subsets
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _check_selection(params: Params, selection: Selection) -> None:
    train, held_out = len(selection.train), len(selection.held_out)
    counts = {"train": train, "held_out": held_out, "all": train + held_out}
    check_num_real(params, counts[params.evaluation.reference])


def _run_part(params: Params, part: int) -> None:
    jobs = params.data.prepare_jobs
    if not 0 <= part < jobs:
        raise ParamsError(f"--part {part}: data.prepare_jobs {jobs} has the parts 0 to {jobs - 1}")
    with one_writer(_lock(part), f"prepare part {part}"):
        made = prepare_part(params, part, KEPT, STAGE_VERSIONS["prepare"])
    print(f"prepare: part {part} of {jobs}: made {made} shards, kept in {KEPT}", file=sys.stderr, flush=True)


@contextmanager
def _no_part_at_work(jobs: int) -> Iterator[None]:
    """Wait for the parts that are being made, and let none begin: their shards are taken, and their folder goes."""
    locks = {_lock(part) for part in range(jobs)} | set(_lock(0).parent.glob(_lock("*").name))
    with ExitStack() as stack:
        for lock in sorted(locks):
            stack.enter_context(one_writer(lock, "prepare"))
        yield


def _lock(part: int | str) -> Path:
    """Held by the process that makes a part."""
    return paths.lock(f"prepare-part-{part}")
