"""When the device seconds of two arms compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from maskdm.report.cautions import cautions
from maskdm.report.results import Results
from maskdm.report.seconds import why_seconds_differ
from maskdm.report.verdicts import judge_arms
from tests.report.made_up_results import findings, make_params, make_results, seven_arms

PARAMS = make_params(seven_arms(), seeds=(0, 1, 2))
ALIKE = {"precision": "bf16", "threads": 1, "devices": 1, "device_name": "cpu"}


def results_with(seconds: dict[str, np.ndarray] | None = None, **records: dict[str, Any]) -> Results:
    """Made-up results whose unmasked steps take a second each, or by arm the seconds given; records by arm."""
    results, runs = make_results(PARAMS), []
    for run in results.runs:
        steps = 10.0 * np.arange(1, 101)
        took = (seconds or {}).get(run.arm, np.ones(100))
        curve = pd.DataFrame({**run.finetune_curve, "step": steps, "images_seen": 64 * steps})
        curve["device_seconds"] = 10 * np.cumsum(took)
        record = {**run.finetune_record, **ALIKE, **records.get(run.arm.replace("-", "_"), {})}
        runs.append(replace(run, finetune_curve=curve, finetune_record=record))
    return replace(results, runs=runs)


def test_equal_steps_on_a_free_machine_compare() -> None:
    results = results_with()
    assert why_seconds_differ(results, "patch-m50", "scratch") == ""
    found = findings(PARAMS, results)
    assert not [text for text in cautions(found) if "equally fast" in text]
    assert any("device seconds" in verdict.text for verdict in judge_arms(found))


@pytest.mark.parametrize(
    ("seconds", "records", "why"),
    [
        ({"patch-m50": np.full(100, 1.3)}, {}, "the same unmasked step took 1.30 times as long as for scratch"),
        (
            {"patch-m50": np.tile([1.0, 2.0], 50)},
            {},
            "the time of a step of patch-m50, seed 0, varied by a factor of 2.0",
        ),
        ({}, {"patch_m50": {"precision": "fp32"}}, "precision differs"),
        ({}, {"scratch": {"threads": 4}}, "threads differs"),
    ],
    ids=["slower", "busy", "precision", "threads"],
)
def test_unequal_runs_do_not_compare(seconds: dict[str, np.ndarray], records: dict[str, Any], why: str) -> None:
    results = results_with(seconds, **records)
    assert why_seconds_differ(results, "patch-m50", "scratch").startswith(why)
    found = findings(PARAMS, results)
    assert found.against["patch-m50"].seconds_at_equal_score is None
    (text,) = [verdict.text for verdict in judge_arms(found) if verdict.arm == "patch-m50"]
    assert "device seconds" not in text
    assert any("equally fast" in text and f"patch-m50: {why}" in text for text in cautions(found))


def test_another_batch_size_is_another_step() -> None:
    results = results_with({"patch-m50": np.full(100, 2.0)})
    runs = [
        replace(run, finetune_curve=run.finetune_curve.assign(images_seen=lambda curve: curve["images_seen"] * 2))
        if run.arm == "patch-m50"
        else run
        for run in results.runs
    ]
    assert why_seconds_differ(replace(results, runs=runs), "patch-m50", "scratch") == ""
