"""Empty files that Snakemake takes for the stages' outputs: there exactly where the output is up to date.

Snakemake is not shown results/: before a job it would delete its output, and after a failed one restore an older one
and take that for done. Instead the Snakefile sets the markers while it is read, by the outputs' stamps, and every job
touches its own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from maskdm.base.publishing import remove
from maskdm.config import paths
from maskdm.config.jobs import Jobs
from maskdm.config.stamps import read_stamp

LONG_AGO = 1_000_000_000  # of every marker that is set here: none is newer than another
REPORT_COPY = paths.WORK / "report"  # for `snakemake --report`
SNAKEMAKES = ".snakemake_timestamp"  # in a folder: its time, for Snakemake
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each, on Linux


def set_markers(jobs: Jobs) -> None:
    """Have a marker for every output that is up to date, and for no other."""
    paths.MARKERS.mkdir(parents=True, exist_ok=True)
    for job in jobs.all():
        marker = paths.MARKERS / job.name
        if job.why_outdated():
            marker.unlink(missing_ok=True)
        else:
            marker.touch()
            os.utime(marker, (LONG_AGO, LONG_AGO))
    _copy_report()


def _copy_report() -> None:
    """Have a copy of the report for `snakemake --report`, whichever engine made it."""
    if read_stamp(REPORT_COPY) != read_stamp(paths.REPORT):
        remove(REPORT_COPY)
        if paths.REPORT.is_dir():
            shutil.copytree(paths.REPORT, REPORT_COPY)
    if REPORT_COPY.is_dir():
        (REPORT_COPY / SNAKEMAKES).unlink(missing_ok=True)
        os.utime(REPORT_COPY, (LONG_AGO, LONG_AGO))


def stages_use_a_gpu(device: str) -> bool:
    """Whether stages will compute on a GPU, told without PyTorch.

    Args:
        device: `compute.device`.
    """
    return device == "cuda" or (device == "auto" and any(NVIDIA_GPUS.glob("*")))
