"""Each arm's scores over its seeds, and what sets it apart from scratch: the numbers behind the verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pandas as pd

from maskdm.config import Params
from maskdm.report.results import Results
from maskdm.report.statistics import Crossing, Estimate, Paired, crossing, estimate, holm, paired
from maskdm.report.tuning import Choice
from maskdm.scoring.headline import Headline, headline_of

SCORES = ("fid", "kid", "precision", "recall")
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
    def second_disagrees(self) -> bool:
        """Whether the headline's score and the second opinion order the two differently."""
        return self.score.difference.mean * self.second.difference.mean < 0

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
        seeds: those with results; none: the arm is missing.
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
    seeds: tuple[int, ...]
    scores: dict[str, Estimate]
    flops: float
    images_seen: float
    device_seconds: float
    choice: Choice | None
    against: Against | None = None
    disputed: list[str] = field(default_factory=list)

    @property
    def num_seeds(self) -> int:
        """Seeds with results."""
        return len(self.seeds)


def reference_of(params: Params) -> str | None:
    """The arm that the others are compared with: `scratch`, else the first without pretraining, else none."""
    unmasked = [key for key, arm in params.arms.items() if arm.strategy == "none"]
    return "scratch" if "scratch" in unmasked else next(iter(unmasked), None)


def compare_arms(params: Params, results: Results, summary: pd.DataFrame) -> list[Comparison]:
    """Every arm of params.yaml, in its order, those without results, too."""
    rows = {arm: summary[summary["arm"] == arm] for arm in params.arms}
    reference, headline = reference_of(params), headline_of(summary)
    base = rows[reference] if reference is not None else summary.iloc[:0]
    names = (*SCORES, *results.distances)
    finals = {arm: _final(rows[arm]) for arm in params.arms}
    disputes = _disputes(finals, headline)
    compared = [
        replace(
            _scored(arm, headline, finals[arm], names, results.choices.get(arm)),
            against=None if arm == reference else _against(rows[arm], base, headline),
            disputed=[other for other in params.arms if other != reference and frozenset((arm, other)) in disputes],
        )
        for arm in params.arms
    ]
    return _adjusted(compared)


def _scored(
    arm: str, headline: Headline, last: pd.DataFrame, names: Iterable[str], choice: Choice | None
) -> Comparison:
    return Comparison(
        arm,
        headline,
        seeds=tuple(int(seed) for seed in last.index),
        scores={name: estimate(last[name].to_numpy()) for name in names},
        flops=float(last["flops"].mean()),
        images_seen=float(last["images_seen"].astype("float64").mean()),
        device_seconds=float(last["device_seconds"].mean()),
        choice=choice,
    )


def _final(rows: pd.DataFrame) -> pd.DataFrame:
    """The last milestone, indexed by seed."""
    return rows[rows["milestone"] == rows["milestone"].max()].set_index("seed")


def _against(rows: pd.DataFrame, base: pd.DataFrame, headline: Headline) -> Against | None:
    common = sorted(set(rows["seed"]) & set(base["seed"]))
    if not common:
        return None
    ours, theirs = rows[rows["seed"].isin(common)], base[base["seed"].isin(common)]
    key, second = headline.key, headline.second.key
    scores, base_scores = (r.pivot(index="seed", columns="milestone", values=key) for r in (ours, theirs))
    flops, seconds = (ours.groupby("milestone")[name].mean().to_numpy() for name in ("flops", "device_seconds"))
    final, base_final = _final(ours).loc[common], _final(theirs).loc[common]
    crossed = crossing(flops, scores.to_numpy(), base_final[key].to_numpy())
    score = paired(final[key].to_numpy(), base_final[key].to_numpy())
    return Against(
        score=score,
        second=paired(final[second].to_numpy(), base_final[second].to_numpy()),
        p_holm=score.p_value,
        at_milestones={float(key): float(gap) for key, gap in (scores - base_scores).mean().items()},
        crossing=crossed,
        base_flops=float(base_final["flops"].mean()),
        base_seconds=float(base_final["device_seconds"].mean()),
        flops=float(flops[-1]),
        # Between milestones every step costs the same, so that seconds are linear in compute.
        seconds_at_equal_score=None if crossed.at is None else float(np.interp(crossed.at, flops, seconds)),
    )


def _disputes(finals: dict[str, pd.DataFrame], headline: Headline) -> set[frozenset[str]]:
    """The pairs of arms that score and second opinion order differently, on the seeds that both have."""
    both = [headline.key, headline.second.key]
    scores = {arm: dict(zip(last.index, last[both].to_numpy(), strict=True)) for arm, last in finals.items()}
    disputes = set()
    for (one, ours), (other, theirs) in combinations(scores.items(), 2):
        gaps = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        score, second = np.sum(gaps or [[0.0, 0.0]], axis=0)
        if score * second < 0:
            disputes.add(frozenset((one, other)))
    return disputes


def _adjusted(compared: list[Comparison]) -> list[Comparison]:
    p_values = [math.nan if c.against is None else c.against.score.p_value for c in compared]
    return [
        c if c.against is None else replace(c, against=replace(c.against, p_holm=p))
        for c, p in zip(compared, holm(p_values), strict=True)
    ]
