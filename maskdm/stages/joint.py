"""A stage's session shared by several processes, one per device: the first leads, the others follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskdm import device, paths
from maskdm.company import Company, is_follower
from maskdm.config import Params
from maskdm.interrupts import Stopped
from maskdm.parallel import Ranks
from maskdm.stages.session import Session, stage_session
from maskdm.training import NonFiniteLossError


@contextmanager
def joint_session(
    params: Params,
    stage: str,
    arm: str,
    seed: int | None = None,
    trial: str | None = None,
    *,
    output: Path,
    inputs: Mapping[str, Any],
    is_shared: bool = True,
) -> Iterator[tuple[Session, Ranks]]:
    """`stage_session`, and `training.devices` processes that work in it; all run the block.

    Only the first one has the stage's lock, work folder, MLflow run and record, and only it may publish. For another
    one the block is all that it does: its process ends with it.

    Args:
        params: the experiment.
        stage: its name.
        arm: that it works on.
        seed: of the arm's run.
        trial: of the arm's tuning.
        output: what the stage publishes.
        inputs: all that the output depends on.
        is_shared: whether there is enough work for more than one.

    Raises:
        UserError: a place can't be written, or another process has ended before its time.
        SystemExit: this process follows, and its part is done.
    """
    company = Company(params.training.devices, device.resolve(params.compute, params.training.devices).device)
    if is_follower():
        with company.follow() as ranks, _ending_with_the_first():
            yield Session(True, paths.WORK), ranks
        return
    with stage_session(params, stage, arm, seed, trial, inputs=inputs, output=output) as session:
        which = ("--seed", str(seed)) if trial is None else ("--trial", trial)
        with company.lead((stage, "--arm", arm, *which), session.is_to_do and is_shared) as ranks:
            yield session, ranks


@contextmanager
def _ending_with_the_first() -> Iterator[None]:
    """What ends the work of all ranks is said by the first one."""
    try:
        yield
    except (NonFiniteLossError, Stopped):
        raise SystemExit(0) from None
