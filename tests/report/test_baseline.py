"""Whether scratch is trained enough to be a baseline, and what the report says if it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from maskdm.config import Params
from maskdm.report.baseline import distance_to_data
from maskdm.report.comparison import Findings
from maskdm.report.results import Results
from maskdm.report.tables import display_table, verdict_frame
from maskdm.report.verdicts import answer, judge_arms
from tests.report.made_up_results import findings, make_params, make_results, seven_arms

PARAMS = make_params(seven_arms(), seeds=(0, 1, 2))


def changed(params: Params, arm: str, milestone: str | None = None, **scores: Any) -> Results:
    """Made-up results with other scores of an arm: multiplied, at one milestone or all."""
    results = make_results(params)
    runs = []
    for run in results.runs:
        milestones = dict(run.metrics["milestones"])
        for key, old in milestones.items():
            if run.arm == arm and milestone in (None, key):
                milestones[key] = {**old, **{name: old[name] * factor for name, factor in scores.items()}}
        runs.append(replace(run, metrics={**run.metrics, "milestones": milestones}))
    return replace(results, runs=runs)


def said_of(found: Findings) -> dict[str, str]:
    return {verdict.arm: verdict.text for verdict in judge_arms(found)}


@pytest.mark.parametrize(
    ("score", "floor", "untrained", "expected"),
    [
        (0.088, 0.088, 51.0, 0.0),
        (51.0, 0.088, 51.0, 1.0),
        (17.7, 0.19, 102.1, 0.721),  # mosaics of unrelated patches
        (0.50, 0.088, 51.0, 0.273),  # the default experiment
        (0.259, 0.088, 50.9, 0.170),  # digits-seeds
    ],
)
def test_the_distance_to_the_data_is_logarithmic(score: float, floor: float, untrained: float, expected: float) -> None:
    assert distance_to_data(score, floor, untrained) == pytest.approx(expected, abs=1e-3)


def test_a_trained_scratch_is_a_baseline() -> None:
    found = findings(PARAMS, make_results(PARAMS))
    assert found.no_baseline == ""
    assert "Nothing can be concluded" not in answer(found)


@pytest.mark.parametrize(
    ("milestone", "scores", "why"),
    [
        (
            None,
            {"fid": 10.0},
            r"scratch is still far from the data (FID 4.56; real images 0.087, untrained network 31.4; ",
        ),
        (None, {"recall": 0.05}, "recall 0.04)"),
        ("1.000", {"fid": 3.0}, "scratch's FID rises between its last two milestones ("),
    ],
    ids=["far", "recall", "rising"],
)
def test_nothing_is_concluded_from_a_scratch_that_is_not_trained(
    milestone: str | None, scores: dict[str, float], why: str
) -> None:
    found = findings(PARAMS, changed(PARAMS, "scratch", milestone, **scores))
    said = answer(found)
    assert said.startswith("Nothing can be concluded yet: scratch") and why in said
    assert said.endswith("Train longer (budget.unmasked_steps).")
    verdicts = judge_arms(found)
    assert {verdict.kind for verdict in verdicts} == {"baseline", "undecided"}
    for arm, text in said_of(found).items():
        if arm != "scratch":
            assert text.startswith("undecided, because scratch is not trained enough to be a baseline: FID difference")
            assert "×" not in text and "saves" not in text
    frame = verdict_frame(found, verdicts)
    assert frame["compute_ratio"].isna().all() and frame["flops_at_equal_fid"].isna().all()
    table = display_table(frame, found.summary)
    assert not [column for column in table if column.startswith("same FID")], "a column of dashes is not shown"


def test_another_arm_may_be_untrained() -> None:
    found = findings(PARAMS, changed(PARAMS, "patch-m50", None, fid=10.0, recall=0.01))
    assert found.no_baseline == ""
    assert said_of(found)["patch-m50"].startswith("no better than scratch")
