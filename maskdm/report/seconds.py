"""Whether the device seconds of two arms compare: both must have run alike, and on an equally loaded machine."""

from __future__ import annotations

import numpy as np
import pandas as pd

from maskdm.report.results import Results, Run

MAX_SPREAD = 1.5  # within a run: the upper quartile of the seconds per step over the lower one
MAX_DIFFERENCE = 1.15  # between two arms: of the seconds of the same unmasked step
# What changes rounding and seconds, but is no reason to run a stage again: by its key in records, its name in texts.
RAN_WITH = {
    "device_name": "device",
    "precision": "precision",
    "compile": "compile",
    "attention": "attention",
    "activation_checkpointing": "activation checkpointing",
    "threads": "threads",
    "devices": "devices",
}


def why_seconds_differ(results: Results, arm: str, reference: str) -> str:
    """Why the device seconds of two arms say nothing about their cost; empty if they compare.

    Finetuning is the same unmasked step for every arm. So its seconds per step show whether the machine was as fast,
    and as free, for one arm as for the other.

    Args:
        results: of all arms.
        arm: one arm.
        reference: the other one.
    """
    runs = [run for run in results.runs if run.arm in (arm, reference)]
    for key, name in RAN_WITH.items():
        if key != "attention" and len({str(run.finetune_record.get(key)) for run in runs}) > 1:
            return f"{name} differs"
    for run in runs:
        seconds = _seconds_per_step(run.finetune_curve)
        if len(seconds) and (spread := float(np.quantile(seconds, 0.75) / np.quantile(seconds, 0.25))) > MAX_SPREAD:
            return f"the time of a step of {run.arm}, seed {run.seed}, varied by a factor of {spread:.1f}"
    ours, theirs = (_typical([run for run in runs if run.arm == one]) for one in (arm, reference))
    if ours and theirs and not 1 / MAX_DIFFERENCE < (ratio := ours / theirs) < MAX_DIFFERENCE:
        return f"the same unmasked step took {ratio:.2f} times as long as for {reference}"
    return ""


def _typical(runs: list[Run]) -> float | None:
    """The median seconds of an unmasked step over all runs of an arm; None if it has other batch sizes, or no rows."""
    sizes = {round(float(size)) for run in runs for size in _images_per_step(run.finetune_curve)}
    seconds = [value for run in runs for value in _seconds_per_step(run.finetune_curve)]
    return float(np.median(seconds)) / sizes.pop() if len(sizes) == 1 and seconds else None


def _seconds_per_step(curve: pd.DataFrame) -> np.ndarray:
    """Between the rows of a curve; the steps before its first row are left out, because they hold the warm-up."""
    changes = curve[["step", "device_seconds"]].diff().iloc[1:]
    return (changes["device_seconds"] / changes["step"]).dropna().to_numpy()


def _images_per_step(curve: pd.DataFrame) -> np.ndarray:
    changes = curve[["step", "images_seen"]].diff().iloc[1:]
    return (changes["images_seen"] / changes["step"]).dropna().to_numpy()
