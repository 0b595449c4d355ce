"""Each arm's scores over its seeds, and what sets it apart from scratch: the numbers behind the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from maskdm.config import Params
from maskdm.report.results import Choice, Results
from maskdm.report.statistics import Crossing, Estimate, Paired, crossing, estimate, holm, paired
from maskdm.scoring.headline import SCORES, Headline, headline_of

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Against:
    """An arm compared with scratch, on the seeds that both have.

    Attributes:
        score: differences of the headline's score at the end of the budget, the arm's less scratch's.
        second: likewise, of the second opinion.
        p_holm: the p-value of `score`, adjusted for all arms of the report.
        at_milestones: by milestone, the mean difference of the headline's scores.
        crossing: the compute at which the arm's score is scratch's final one.
        base_flops: what scratch spent.
        base_seconds: device seconds that scratch spent.
        flops: what the arm spent, on these seeds.
        seconds_at_equal_score: device seconds that the arm had spent at the crossing; None: it never got there.
    """

    score: Paired
    second: Paired
    p_holm: float
    at_milestones: dict[float, float]
    crossing: Crossing
    base_flops: float
    base_seconds: float
    flops: float
    seconds_at_equal_score: float | None

    @property
    def is_clear(self) -> bool:
        """Whether chance is an unlikely reason for the difference, all arms of the report considered."""
        return self.score.difference.excludes_zero and self.p_holm < SIGNIFICANT

    def ratio(self, flops: float | None) -> float | None:
        """Compute in units of what scratch spent."""
        return None if flops is None else flops / self.base_flops


@dataclass(frozen=True)
class Comparison:
    """One arm.

    Attributes:
        arm: its key.
        headline: the score that all arms are compared by.
        num_seeds: those with results; 0: the arm is missing.
        scores: at the end of the budget, by name, over seeds.
        flops: spent at the end of the budget, mean over seeds; NaN without any.
        images_seen: likewise.
        device_seconds: likewise.
        choice: how it came by its hyperparameters; None: it is missing, and not tuned yet.
        against: None for the reference itself and where there is none to compare with.
        disputed: other arms but the reference whose order with this one score and second opinion see differently.
    """

    arm: str
    headline: Headline
    num_seeds: int
    scores: dict[str, Estimate]
    flops: float
    images_seen: float
    device_seconds: float
    choice: Choice | None
    against: Against | None = None
    disputed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Findings:
    """What verdicts, sentences, tables and figures are made from.

    Attributes:
        params: the experiment.
        results: what was read of it.
        summary: a row per arm, seed and milestone, as in summary.csv.
        compared: every arm of params.yaml, in its order, those without results, too.
    """

    params: Params
    results: Results
    summary: pd.DataFrame
    compared: dict[str, Comparison]

    @property
    def headline(self) -> Headline:
        """The score that arms are compared by."""
        return headline_of(self.summary)

    @property
    def reference(self) -> str | None:
        """The arm that the others are compared with, with results or without; None where there is none."""
        return reference_of(self.params)

    @property
    def baseline(self) -> str | None:
        """The same; None also where it has no results."""
        return self.reference if self.reference in self.arms else None

    @property
    def arms(self) -> list[str]:
        """Those with results."""
        return [arm for arm, one in self.compared.items() if one.num_seeds]

    @property
    def against(self) -> dict[str, Against]:
        """The arms that could be compared with scratch, by arm."""
        return {arm: one.against for arm, one in self.compared.items() if one.against is not None}

    @property
    def masked(self) -> list[str]:
        """The arms that are pretrained, with results or without."""
        return [arm for arm, config in self.params.arms.items() if config.strategy != "none"]

    @property
    def num_seeds(self) -> int:
        """The most seeds that an arm has results of."""
        return max(one.num_seeds for one in self.compared.values())


def reference_of(params: Params) -> str | None:
    """The arm that the others are compared with: `scratch`, else the first without pretraining, else none."""
    unmasked = [key for key, arm in params.arms.items() if arm.strategy == "none"]
    return "scratch" if "scratch" in unmasked else next(iter(unmasked), None)


def compare_arms(params: Params, results: Results, summary: pd.DataFrame) -> Findings:
    """Compare every arm with scratch, on all scores of the summary."""
    reference, headline = reference_of(params), headline_of(summary)
    rows = {arm: summary[summary["arm"] == arm] for arm in params.arms}
    finals = {arm: final(of_arm).set_index("seed") for arm, of_arm in rows.items()}
    against: dict[str, Against] = {}
    for arm in params.arms:
        if reference not in (None, arm) and (found := _compare(rows[arm], rows[str(reference)], headline)):
            against[arm] = found
    adjusted = holm([one.score.p_value for one in against.values()])
    against = {arm: replace(one, p_holm=p) for (arm, one), p in zip(against.items(), adjusted, strict=True)}
    names = (*(score.key for score in SCORES), *results.distances)
    compared = {
        arm: Comparison(
            arm,
            headline,
            num_seeds=len(last),
            scores={name: estimate(last[name].to_numpy()) for name in names},
            flops=float(last["flops"].mean()),
            images_seen=float(last["images_seen"].astype("float64").mean()),
            device_seconds=float(last["device_seconds"].mean()),
            choice=results.choices.get(arm),
            against=against.get(arm),
            disputed=[
                other for other in params.arms if other != reference and _is_disputed(last, finals[other], headline)
            ],
        )
        for arm, last in finals.items()
    }
    return Findings(params, results, summary, compared)


def final(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows at the end of the budget."""
    return rows[rows["milestone"] == rows["milestone"].max()]


def _compare(rows: pd.DataFrame, base: pd.DataFrame, headline: Headline) -> Against | None:
    """An arm's rows against scratch's; None where they have no seed in common."""
    common = sorted(set(rows["seed"]) & set(base["seed"]))
    if not common:
        return None
    ours, theirs = rows[rows["seed"].isin(common)], base[base["seed"].isin(common)]
    key, second = headline.key, headline.second.key
    scores, base_scores = (r.pivot(index="seed", columns="milestone", values=key) for r in (ours, theirs))
    flops, seconds = (ours.groupby("milestone")[name].mean().to_numpy() for name in ("flops", "device_seconds"))
    last, base_last = (final(r).set_index("seed").loc[common] for r in (ours, theirs))
    crossed = crossing(flops, scores.to_numpy(), base_last[key].to_numpy())
    score = paired(last[key].to_numpy(), base_last[key].to_numpy())
    return Against(
        score=score,
        second=paired(last[second].to_numpy(), base_last[second].to_numpy()),
        p_holm=score.p_value,
        at_milestones={float(at): float(gap) for at, gap in (scores - base_scores).mean().items()},
        crossing=crossed,
        base_flops=float(base_last["flops"].mean()),
        base_seconds=float(base_last["device_seconds"].mean()),
        flops=float(flops[-1]),
        # Between milestones every step costs the same, so that seconds are linear in compute.
        seconds_at_equal_score=None if crossed.at is None else float(np.interp(crossed.at, flops, seconds)),
    )


def _is_disputed(last: pd.DataFrame, other: pd.DataFrame, headline: Headline) -> bool:
    """Whether score and second opinion order two arms differently, on the seeds that both have."""
    both = [headline.key, headline.second.key]
    score, second = (last[both] - other[both]).dropna().sum()
    return bool(score * second < 0)
