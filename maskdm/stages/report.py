"""Stage `report`: tables, figures and the page over all arms."""

from __future__ import annotations

import sys
from contextlib import suppress

from maskdm import paths
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.report import print_report, write_report
from maskdm.stages.inputs import with_chosen_values
from maskdm.stages.session import stage_session
from maskdm.tracking import flush, publish_report, unsent_note


def run(params: Params) -> None:
    """Write results/report from what there is of all arms, and bring MLflow up to date with results/.

    Raises:
        UserError: no arm has results that can be shown.
    """
    with stage_session(params, "report", output=paths.REPORT) as session:
        report = write_report(params)
        for file in sorted(paths.REPORT.iterdir()):
            session.tracked.figure(file)
    publish_report(params, _params_of_arms(params))
    if params.tracking.enabled and not flush():
        print(f"warning: tracking: {unsent_note()}", file=sys.stderr)
    print_report(report)


def _params_of_arms(params: Params) -> dict[str, Params]:
    """The params that each arm runs with; without those of which that is not known (yet)."""
    found = {}
    for arm in params.arms:
        with suppress(UserError):
            found[arm] = with_chosen_values(params, arm)
    return found
