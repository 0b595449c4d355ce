"""Stage `report`: tables, figures and the page over all arms."""

from __future__ import annotations

import sys

from maskdm import paths
from maskdm.config import Params
from maskdm.report import print_report, write_report
from maskdm.stages.session import stage_session
from maskdm.tracking import flush, publish_arm, unsent_note


def run(params: Params) -> None:
    """Write results/report from what there is of all arms, and bring MLflow up to date with results/.

    Raises:
        UserError: no arm has results that can be shown.
    """
    with stage_session(params, "report") as (tracked, _):
        report = write_report(params)
        for figure in sorted(paths.REPORT.glob("*.png")):
            tracked.figure(figure)
    for arm in params.arms:
        for seed in params.seeds:
            publish_arm(params, arm, seed)
    if params.tracking.enabled and not flush():
        print(f"warning: tracking: {unsent_note()}", file=sys.stderr)
    print_report(report)
