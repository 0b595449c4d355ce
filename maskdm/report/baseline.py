"""Whether scratch is trained enough to be a baseline. If it is not, nothing can be concluded about the other arms.

Three rules, in numbers from the results themselves:

1. **Distance.** On the logarithmic scale from "real vs real" (0) to "untrained" (1), scratch's final score lies above
   `MAX_DISTANCE`. A network that draws mosaics of unrelated patches is at 0.7, the default experiment at 0.3.
2. **Recall.** Scratch's samples cover less than `MIN_RECALL` of the variety of the real images.
3. **Rising.** Scratch's mean score at the last milestone is more than `MAX_RISE` above the one before: the compute at
   which another arm reaches it then says more about scratch's noise than about that arm.
"""

from __future__ import annotations

import math

import pandas as pd

from maskdm.report.results import Results
from maskdm.scoring.headline import RECALL, Headline

MAX_DISTANCE = 0.5
MIN_RECALL = 0.1
MAX_RISE = 0.02  # relative


def distance_to_data(score: float, floor: float, untrained: float) -> float:
    """Where a score lies between "real vs real" (0) and "untrained" (1), on a logarithmic scale.

    Args:
        score: above 0; lower is better.
        floor: of real images against real images, above 0.
        untrained: of the untrained network, above `floor`.
    """
    return math.log(score / floor) / math.log(untrained / floor)


def why_no_baseline(name: str, headline: Headline, results: Results, rows: pd.DataFrame) -> str:
    """Why nothing can be concluded from a comparison with scratch; empty if it is trained enough.

    Args:
        name: of the arm that the others are compared with.
        headline: the score by which they are compared.
        results: with the scale of the scores.
        rows: that arm's rows of the summary, one per seed and milestone.
    """
    means = rows.groupby("milestone")[[headline.key, RECALL.key]].mean()
    curve, recall, scale = means[headline.key], float(means[RECALL.key].iloc[-1]), results.scale_of(headline.key)
    score, floor, untrained = float(curve.iloc[-1]), scale["floor"], scale["untrained"]

    def shown(value: float) -> str:
        return f"{value * headline.times:.3g}"

    is_far = 0 < floor < min(score, untrained) and distance_to_data(score, floor, untrained) > MAX_DISTANCE
    if is_far or recall < MIN_RECALL:
        ends = f"real images {shown(floor)}, untrained network {shown(untrained)}"
        return f"{name} is still far from the data ({headline.label} {shown(score)}; {ends}; recall {recall:.2f})"
    if len(curve) > 1 and curve.iloc[-1] > (1 + MAX_RISE) * curve.iloc[-2]:
        before = f"{shown(curve.iloc[-2])} at {curve.index[-2]:.0%} of the budget"
        what = f"{name}'s {headline.name} rises between its last two milestones"
        return f"{what} ({before}, {shown(score)} at the end)"
    return ""
