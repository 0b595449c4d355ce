"""Stage `tune`: one trial of one arm; where tuning is not enabled, a file that says so, made without torch."""

from __future__ import annotations

from typing import Any

from maskdm import paths
from maskdm.config import Params
from maskdm.formats import ORIGIN_KEYS
from maskdm.publishing import publish_description
from maskdm.stages.session import stage_session

SPENT = ("images_seen", "tokens_seen", "flops")
SCORES = ("fid", "kid", "kid_std", "precision", "recall", "num_samples")


def run(params: Params, arm: str, trial: str) -> None:
    """Try a trial into results/tuning/ARM/TRIAL.json; without tuning it says that nothing was run.

    A trial whose loss becomes non-finite has failed, which is a result: another one will be chosen.

    Raises:
        UserError: data or features are missing or do not fit.
    """
    result: dict[str, Any] = {
        "arm": arm,
        "trial": trial,
        "values": params.tuning.trials[trial],
        "seed": params.tuning.seed,
        "budget_fraction": params.tuning.budget_fraction,
        "trained": params.tuning.enabled,
        "failed": None,
        **dict.fromkeys((*SPENT, *SCORES, *ORIGIN_KEYS, "protocol")),
    }
    output = paths.trial(arm, trial)
    if not params.tuning.enabled:
        print(f"tuning is not enabled: nothing to try, {arm} runs with the values as given")
        with stage_session(params, "tune", arm, trial=trial, output=output):
            publish_description(output, result)
        return
    from maskdm.stages.joint import joint_session
    from maskdm.stages.trial import Trial

    tried = Trial(params.for_trial(arm, params.tuning.trials[trial]), arm, trial)
    inputs = {"given": result, **tried.inputs}
    with joint_session(params, "tune", arm, trial=trial, inputs=inputs, output=output) as (session, ranks):
        if session.is_to_do:
            outcome = tried.run(session, ranks)
            if ranks.is_first:
                publish_description(output, result | outcome)
