"""A stage's work shared by several processes, one per device: the first leads, the others follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maskdm.base.interrupts import Stopped
from maskdm.config import Run
from maskdm.config.jobs import Job
from maskdm.stages.runner import is_follower
from maskdm.training import devices
from maskdm.training.company import Company
from maskdm.training.loop import NonFiniteLossError
from maskdm.training.ranks import Ranks


@contextmanager
def sharing(job: Job, is_shared: bool = True) -> Iterator[Ranks]:
    """Let `compute.devices` processes run the block together.

    Only the first one writes the output. For another one the block is all that it does: its process ends with it.

    Args:
        job: what they work on.
        is_shared: whether there is enough work for more than one.

    Raises:
        UserError: another process has ended before its time.
        SystemExit: this process follows, and its part is done.
    """
    company = _company(job.run)
    if is_follower():
        with company.follow() as ranks, _ending_with_the_first():
            yield ranks
        return
    with company.lead(job.words, is_shared) as ranks:
        yield ranks


def dismiss(run: Run) -> None:
    """Tell the processes that a launcher has started that there is no work."""
    with _company(run).lead((), is_work=False):
        pass


def _company(run: Run) -> Company:
    compute = run.params.compute
    return Company(compute.devices, devices.resolve(compute, compute.devices).device)


@contextmanager
def _ending_with_the_first() -> Iterator[None]:
    """What ends the work of all ranks is said by the first one."""
    try:
        yield
    except (NonFiniteLossError, Stopped):
        raise SystemExit(0) from None
