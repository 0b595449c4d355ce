"""Each arm against scratch, in a sentence, and the project's question answered in one."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from maskdm.config import Params
from maskdm.report.tables import decimals, reference_arm, spread_text

EQUAL_COMPUTE = 0.02  # arms whose compute differs by less are said to have had equal compute
MATCHED_BY = {"flops": "compute", "images": "images seen", "steps": "steps"}


@dataclass(frozen=True)
class Finding:
    """One arm compared with scratch: a plain sentence and its verdict."""

    arm: str
    text: str
    verdict: str


def compare_arms(summary: pd.DataFrame, final: pd.DataFrame) -> list[Finding]:
    """One finding for every arm but scratch; none without scratch."""
    reference = reference_arm(summary)
    if reference is None:
        return []
    rows = {row["arm"]: row for _, row in final.iterrows()}
    base = rows.pop(reference)
    return [_finding(row, base, _overtakes_at(summary, arm, base)) for arm, row in rows.items()]


def _finding(row: pd.Series, base: pd.Series, overtakes_at: float | None) -> Finding:
    places = decimals(pd.Series([row["fid"], base["fid"]]))
    ours, theirs = (spread_text(r["fid"], r["fid_std"], places) for r in (row, base))
    text = f"fid {ours} against {base['arm']}'s {theirs} {_compute_text(row, base)}; {_kid_text(row, base)}"
    if overtakes_at is not None and overtakes_at < 1.0:
        text += f"; at or below {base['arm']}'s final fid from {overtakes_at:.3g} of the budget on"
    return Finding(row["arm"], text, _verdict(row))


def _compute_text(row: pd.Series, base: pd.Series) -> str:
    ratio = row["tflops"] / base["tflops"]
    return "at equal compute" if abs(ratio - 1) <= EQUAL_COMPUTE else f"at {ratio:.2f}× its compute"


def _kid_text(row: pd.Series, base: pd.Series) -> str:
    places = decimals(pd.Series([row["kid_x1000"], base["kid_x1000"]]))
    agrees = (row["kid_x1000"] - base["kid_x1000"]) * row["delta_fid"] >= 0
    numbers = f"kid×1000 {row['kid_x1000']:.{places}f} against {base['kid_x1000']:.{places}f}"
    return f"{numbers} {'agrees' if agrees else 'says the opposite'}"


def _verdict(row: pd.Series) -> str:
    """Better or worse by FID, and, with several seeds, whether every seed says so."""
    word = "better" if row["delta_fid"] < 0 else "worse" if row["delta_fid"] > 0 else "equal"
    seeds, better = int(row["num_seeds"]), int(row["seeds_better"])
    if seeds == 1 or word == "equal":
        return word
    if better not in (0, seeds):
        return f"undecided ({word} on average, better with {better} of {seeds} seeds)"
    return f"{word} with {seeds} of {seeds} seeds"


def _overtakes_at(summary: pd.DataFrame, arm: str, base: pd.Series) -> float | None:
    """The first milestone from which an arm's mean FID stays at or below scratch's final one."""
    means = summary[summary["arm"] == arm].groupby("milestone")["fid"].mean()
    above = means[means > base["fid"]]
    reached = means if above.empty else means[means.index > above.index.max()]
    return None if reached.empty else float(reached.index.min())


def answer(params: Params, findings: list[Finding]) -> str:
    """The project's question, answered in a sentence."""
    if all(arm.strategy != "none" for arm in params.arms.values()):
        return "No comparison is possible: there is no arm without pretraining."
    masked = [finding for finding in findings if params.arm(finding.arm).strategy != "none"]
    if not masked:
        return "No comparison is possible: no arm was pretrained."
    better = [finding.arm for finding in masked if finding.verdict.startswith("better")]
    undecided = sum(finding.verdict.startswith("undecided") for finding in masked)
    count = f"{len(better)} of {len(masked)}" if better else f"None of {len(masked)}"
    names = f": {', '.join(better)}" if 0 < len(better) <= 6 else ""
    seeds = f"; for {undecided} the seeds disagree" if undecided else ""
    equal = MATCHED_BY[params.budget.match]
    return f"{count} masked arms had a lower FID than scratch at equal {equal}{names}{seeds}."
