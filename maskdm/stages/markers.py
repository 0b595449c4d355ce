"""Empty files that Snakemake sees instead of the stages' outputs: they exist if the output is up to date.

Snakemake does not see results/: it would delete an output before its job, and after a failed job restore an older
output and treat it as up to date. Instead the Snakefile sets the markers by the outputs' stamps while it is parsed,
and every job creates its own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from maskdm.base.publishing import remove
from maskdm.config import paths
from maskdm.config.jobs import Jobs
from maskdm.config.stamps import read_stamp

LONG_AGO = 1_000_000_000  # the time of every marker set here, so that none is newer than another
REPORT_COPY = paths.WORK / "report"  # for `snakemake --report`
TIMESTAMP = ".snakemake_timestamp"  # a file by which Snakemake knows the time of a folder
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # has a folder for each GPU, on Linux


def set_markers(jobs: Jobs) -> None:
    """Create the markers of outputs that are up to date, and remove the others."""
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
    """Copy the report for `snakemake --report`, whichever engine made it."""
    if read_stamp(REPORT_COPY) != read_stamp(paths.REPORT):
        remove(REPORT_COPY)
        if paths.REPORT.is_dir():
            shutil.copytree(paths.REPORT, REPORT_COPY)
    if REPORT_COPY.is_dir():
        (REPORT_COPY / TIMESTAMP).unlink(missing_ok=True)
        os.utime(REPORT_COPY, (LONG_AGO, LONG_AGO))


def stages_use_a_gpu(device: str) -> bool:
    """Whether stages will compute on a GPU, found without importing PyTorch.

    Args:
        device: the value of `compute.device`.
    """
    return device == "cuda" or (device == "auto" and any(NVIDIA_GPUS.glob("*")))
