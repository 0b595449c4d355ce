"""Stage `report`: tables, figures and the page over all arms."""

from __future__ import annotations

import sys
from pathlib import Path

from maskdm.config.jobs import Jobs
from maskdm.report import Report, print_report, write_report
from maskdm.stages.runner import Task
from maskdm.tracking import flush, publish_report, unsent_note


def run(task: Task, folder: Path) -> Report:
    """Write tables, figures and pages from the results of all arms that have some.

    Raises:
        UserError: no arm has results yet.
    """
    report = write_report(task.params, folder)
    for file in sorted(folder.iterdir()):
        task.tracked.figure(file)
    return report


def after(task: Task) -> None:
    """Bring MLflow up to date with results/, and print the table."""
    params = task.params
    publish_report(Jobs(params))
    if params.tracking.enabled and not flush():
        print(f"warning: tracking: {unsent_note()}", file=sys.stderr)
    print_report(task.result)
