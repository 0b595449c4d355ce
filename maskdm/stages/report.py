"""Stage `report`: tables, figures and the page over all arms."""

from __future__ import annotations

import sys
from pathlib import Path

from maskdm.base.errors import UserError
from maskdm.config.jobs import Jobs
from maskdm.report import Report, print_report, write_report
from maskdm.stages.runner import Task

MAX_SECONDS = 60.0  # of publishing: with a slow server it may take longer, and is left to `maskdm track`


def run(task: Task, folder: Path) -> Report:
    """Write tables, figures and pages from the results of all arms that have some.

    Raises:
        UserError: no arm has results yet.
    """
    return write_report(task.params, folder)


def after(task: Task) -> None:
    """Bring MLflow up to date with results/, and print the table."""
    if task.params.tracking.enabled:
        from maskdm.tracking.publishing import LATER, track

        try:
            track(Jobs(task.params), MAX_SECONDS)
        except UserError as error:
            print(f"warning: tracking: {error}; {LATER}", file=sys.stderr, flush=True)
    print_report(task.result)
