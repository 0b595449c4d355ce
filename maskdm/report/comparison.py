"""Each arm's scores over its seeds, and how it differs from scratch: the numbers behind the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from maskdm.config import Params
from maskdm.report.baseline import why_no_baseline
from maskdm.report.results import Choice, Results
from maskdm.report.seconds import why_seconds_differ
from maskdm.report.statistics import Crossing, Estimate, Paired, crossing, estimate, holm, paired
from maskdm.scoring.headline import SCORES, Headline, headline_of

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Against:
    """An arm compared with scratch, on the seeds that both have.

    Attributes:
        score: differences of the headline's score at the end of the budget, the arm's minus scratch's.
        second: the same of the second opinion.
        p_holm: the p-value of `score`, adjusted for all arms of the report.
        at_milestones: by milestone, the mean difference of the headline's scores.
        crossing: the compute at which the arm reaches scratch's final score.
        base_flops: FLOPs that scratch spent.
        base_seconds: device seconds that scratch spent.
        flops: FLOPs that the arm spent, on these seeds.
        seconds_at_equal_score: device seconds that the arm had spent at the crossing; None: it has none, or the seconds
            of the two arms do not compare.
        why_seconds_differ: why the two arms' device seconds do not compare; empty if they do.
        is_conclusive: whether scratch is trained enough to be a baseline; if not, no ratio is given.
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
    why_seconds_differ: str = ""
    is_conclusive: bool = True

    @property
    def is_clear(self) -> bool:
        """Whether chance is an unlikely reason for the difference, all arms of the report considered."""
        return self.is_conclusive and self.score.difference.excludes_zero and self.p_holm < SIGNIFICANT

    @property
    def ratios(self) -> tuple[float | None, float | None, float | None]:
        """The crossing and its interval's ends as fractions of scratch's compute; None as in `Crossing`."""
        if not self.is_conclusive:
            return None, None, None
        at, low, high = (
            None if flops is None else flops / self.base_flops
            for flops in (self.crossing.at, self.crossing.low, self.crossing.high)
        )
        return at, low, high


@dataclass(frozen=True)
class Comparison:
    """One arm.

    Attributes:
        arm: its key.
        headline: the score by which all arms are compared.
        num_seeds: seeds with results; 0: the arm is missing.
        scores: by name, at the end of the budget, over seeds.
        flops: spent at the end of the budget, mean over seeds; NaN without any.
        images_seen: likewise.
        device_seconds: likewise.
        choice: where its hyperparameters come from; None: it is missing, and not tuned yet.
        against: None for scratch itself and where there is nothing to compare with.
        disputed: arms other than scratch that the headline's score and the second opinion rank differently against it.
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
    """What verdicts, texts, tables and figures are made from.

    Attributes:
        params: the experiment.
        results: its results.
        summary: a row per arm, seed and milestone, as in summary.csv.
        compared: every arm of params.yaml, in its order, also those without results.
        reference: the arm that the others are compared with, with results or without; None where there is none.
        no_baseline: why nothing can be concluded from a comparison with it; empty if it is trained enough.
    """

    params: Params
    results: Results
    summary: pd.DataFrame
    compared: dict[str, Comparison]
    reference: str | None
    no_baseline: str = ""

    @property
    def headline(self) -> Headline:
        """The score by which arms are compared."""
        return headline_of(self.summary)

    @property
    def baseline(self) -> str | None:
        """The reference, if it has results."""
        return self.reference if self.reference in self.arms else None

    @property
    def arms(self) -> list[str]:
        """The arms with results."""
        return [arm for arm, one in self.compared.items() if one.num_seeds]

    @property
    def against(self) -> dict[str, Against]:
        """By arm, the comparisons with scratch that are possible."""
        return {arm: one.against for arm, one in self.compared.items() if one.against is not None}

    @property
    def masked(self) -> list[str]:
        """The arms that are pretrained, with results or without."""
        return [arm for arm, config in self.params.arms.items() if config.strategy != "none"]

    @property
    def num_seeds(self) -> int:
        """The largest number of seeds with results that an arm has."""
        return max(one.num_seeds for one in self.compared.values())


def compare_arms(params: Params, results: Results, summary: pd.DataFrame) -> Findings:
    """Compare every arm with `scratch`, or if there is none, with the first arm without pretraining."""
    unmasked = [key for key, arm in params.arms.items() if arm.strategy == "none"]
    reference = "scratch" if "scratch" in unmasked else next(iter(unmasked), None)
    headline = headline_of(summary)
    rows = {arm: summary[summary["arm"] == arm] for arm in params.arms}
    finals = {arm: final(of_arm).set_index("seed") for arm, of_arm in rows.items()}
    against: dict[str, Against] = {}
    for arm in params.arms:
        if reference not in (None, arm) and (found := _compare(rows[arm], rows[str(reference)], headline)):
            against[arm] = found
    no_baseline = ""
    if reference is not None and len(rows[reference]):
        no_baseline = why_no_baseline(reference, headline, results, rows[reference])
    adjusted = holm([one.score.p_value for one in against.values()])
    against = {
        arm: replace(one, p_holm=p, is_conclusive=not no_baseline)
        for (arm, one), p in zip(against.items(), adjusted, strict=True)
    }
    for arm, one in against.items():
        if why := why_seconds_differ(results, arm, str(reference)):
            against[arm] = replace(one, why_seconds_differ=why, seconds_at_equal_score=None)
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
    return Findings(params, results, summary, compared, reference, no_baseline)


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
        # Between milestones every step costs the same, so seconds are linear in compute.
        seconds_at_equal_score=None if crossed.at is None else float(np.interp(crossed.at, flops, seconds)),
    )


def _is_disputed(last: pd.DataFrame, other: pd.DataFrame, headline: Headline) -> bool:
    """Whether score and second opinion order two arms differently, on the seeds that both have."""
    both = [headline.key, headline.second.key]
    score, second = (last[both] - other[both]).dropna().sum()
    return bool(score * second < 0)
