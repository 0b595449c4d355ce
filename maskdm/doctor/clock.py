"""Files from the future: the clock has jumped back, or another machine's is ahead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import partial

from maskdm import paths
from maskdm.doctor.findings import Finding, counted, files_below, ok, problem
from maskdm.plan.units import duration

TOLERANCE_SECONDS = 60.0


def check() -> list[Finding]:
    """Look at the times of everything in results and work."""
    future = _from_the_future()
    if not future:
        return [ok("no file of results or .work is from the future")]
    first, ahead = max(future.items(), key=lambda item: item[1])
    return [
        problem(
            f"{counted(len(future), 'file or folder', 'files and folders')} in results and .work "
            f"{'has a time' if len(future) == 1 else 'have times'} in the future (the farthest: {first}, by "
            f"{duration(ahead)}): this machine's clock was set back, or another machine wrote them. Snakemake goes by "
            "these times, and runs stages again whose inputs seem newer than their outputs",
            "check the clock (date); then give these files the present time: maskdm doctor --fix. Stages that are "
            "run again nevertheless find their finished work and take a second",
            partial(_set_to_now, future),
        )
    ]


def _from_the_future() -> dict[str, float]:
    """The seconds by which files and folders are ahead."""
    now, ahead = time.time(), {}
    for top in (paths.RESULTS, paths.WORK):
        for entry in files_below(top):
            try:
                seconds = entry.stat(follow_symlinks=False).st_mtime - now
            except FileNotFoundError:
                continue
            if seconds > TOLERANCE_SECONDS:
                ahead[entry.path] = seconds
    return ahead


def _set_to_now(files: Iterable[str]) -> str:
    """Give them all the same time, so that none seems newer than another."""
    now = time.time()
    for file in files:
        try:
            os.utime(file, (now, now), follow_symlinks=False)
        except FileNotFoundError:
            continue
    return "gave them the present time"
