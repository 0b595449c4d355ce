"""How each arm's hyperparameters came about: every trial in a table, the choice in words, and where it is doubtful."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from maskdm.config import ArmConfig, Params
from maskdm.report.numbers import decimals
from maskdm.report.results import Results
from maskdm.report.tuning import Choice, Trial

METRIC_NAMES = {"kid": "KID", "fid": "FID"}
MAX_NAMES = 4  # of arms in a sentence


def trials_table(params: Params, results: Results) -> pd.DataFrame:
    """Every trial of every arm as text, the chosen one marked; empty where nothing was tuned."""
    trials = [(choice, trial) for choice in results.choices.values() for trial in choice.trials]
    kids, fids = ([getattr(trial, name) for _, trial in trials] for name in ("kid", "fid"))
    columns = {
        "arm": [trial.arm for _, trial in trials],
        "trial": [trial.name for _, trial in trials],
        "values": [values_text(trial.values) for _, trial in trials],
        "KID×1000": _scores([None if kid is None else 1000 * kid for kid in kids]),
        "FID": _scores(fids),
        "": [_remark(choice, trial) for choice, trial in trials],
    }
    return pd.DataFrame(columns)


def _scores(values: list[float | None]) -> list[str]:
    places = decimals(pd.Series(values, dtype="float64"))
    return ["–" if value is None else f"{value:.{places}f}".replace("-", "−") for value in values]


def _remark(choice: Choice, trial: Trial) -> str:
    if trial.failed is not None:
        return f"failed: {trial.failed}"
    return "chosen" if trial.name == choice.trial else ""


def values_text(values: dict[str, Any]) -> str:
    """What a trial overrides."""
    return ", ".join(f"{path} {_plain(value)}" for path, value in values.items()) or "as in params.yaml"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tuning_note(params: Params, results: Results) -> str:
    """How the hyperparameters came about, in words."""
    return _tuned_note(params, results) if params.tuning.enabled else _given_note(params)


def _tuned_note(params: Params, results: Results) -> str:
    tuning, name = params.tuning, METRIC_NAMES[params.tuning.metric]
    chosen = "; ".join(map(_chosen_text, results.choices.values()))
    return (
        f"Every arm tried the same {len(tuning.trials)} trials, each with {tuning.budget_fraction:.0%} of the budget, "
        f"on seed {tuning.seed}, which no score of this report comes from; the one with the lowest {name} was chosen. "
        "One seed cannot tell trials apart that lie close together, and the best values for a part of the budget need "
        "not be those for all of it; the intervals over seeds do not contain the chance in this choice. The compute of "
        f"the trials is not part of the compute in this report. Chosen: {chosen}."
    )


def _chosen_text(choice: Choice) -> str:
    what = "none, all have failed" if choice.trial is None else f"{choice.trial} ({values_text(choice.values)})"
    return f"{choice.arm}: {what}"


def _given_note(params: Params) -> str:
    own = {
        key: {f"{stage}.{name}": value for stage in ("pretrain", "finetune") for name, value in _own(arm, stage)}
        for key, arm in params.arms.items()
    }
    differing = "; ".join(f"{key}: {values_text(values)}" for key, values in own.items() if values)
    note = "Every arm ran with hyperparameters as given in params.yaml; none was tuned by this pipeline."
    return f"{note} Those that differ from the common ones: {differing}." if differing else note


def _own(arm: ArmConfig, stage: str) -> list[tuple[str, Any]]:
    values: dict[str, Any] = getattr(arm, stage)
    return list(values.items())


def edge_caution(params: Params, results: Results) -> str:
    """Which chosen values are the smallest or largest tried, so that the best may lie outside; empty: none."""
    arms: dict[str, list[str]] = {}
    for arm, choice in results.choices.items():
        for edge in _edges(params, choice):
            arms.setdefault(edge, []).append(arm)
    if not arms:
        return ""
    found = "; ".join(f"{edge} ({_names(names)})" for edge, names in arms.items())
    return f"Tuning chose values at the edge of what it tried; better ones may lie outside: {found}."


def _edges(params: Params, choice: Choice) -> Iterator[str]:
    """The numeric axes along which the chosen trial is at an end."""
    for path in dict.fromkeys(path for trial in choice.trials for path in trial.values):
        if choice.trial is None or (path.startswith("pretrain.") and params.arm(choice.arm).strategy == "none"):
            continue  # all have failed, or it has no pretraining
        tried = {trial.name: _number(_value(params, choice.arm, trial, path)) for trial in choice.trials}
        numbers = sorted({number for number in tried.values() if number is not None})
        chosen = tried[choice.trial]
        if len(numbers) > 1 and chosen in (numbers[0], numbers[-1]):
            which = "smallest" if chosen == numbers[0] else "largest"
            yield f"{path} {chosen:g}, the {which} of {len(numbers)}"


def _value(params: Params, arm: str, trial: Trial, path: str) -> Any:
    """What a trial ran with: its own value, or the one it did not override."""
    section, _, key = path.partition(".")
    common = {"pretrain": params.pretrain_of, "finetune": params.finetune_of}
    given = common[section](arm) if section in common else params.training
    return trial.values.get(path, getattr(given, key, None))


def _number(value: Any) -> float | None:
    """A number, also as YAML 1.1 gives `2e-3`: as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
