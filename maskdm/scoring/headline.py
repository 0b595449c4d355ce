"""The scores: what they are called, which direction is better, and by which of them arms are compared.

A new metric of samples is a field of `scores.Metrics`, its value in `scores.compute_metrics` and a row of `SCORES`
here; a test compares the three. results/metrics, summary.csv, the report and MLflow go by this table.
A new distance of points is a line of `points.distances`; it needs no row: it is `distance_NAME` everywhere.

Nothing here imports torch or NumPy: MLflow's tags and the commands that only read are made with it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

DISTANCE = "distance_"  # what columns and metrics of the distances of points begin with
ENDS = ("floor", "untrained")  # of the scale: real images against real ones, and the network before any training


@dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
        key: its column in summary.csv, and its metric in MLflow.
        name: as it is called.
        times: what it is multiplied by before it is shown.
        is_lower_better: whether it falls as samples get better.
        has_std: whether its standard deviation over random subsets of the images stands beside it, as `KEY_std`.
        has_scale: whether its value at both ends of the scale stands beside those of the arms, as `KEY_floor` and
            `KEY_untrained`.
    """

    key: str
    name: str
    times: float = 1.0
    is_lower_better: bool = True
    has_std: bool = False
    has_scale: bool = False

    @property
    def label(self) -> str:
        """What stands beside its numbers: `KID×1000`."""
        return self.name if self.times == 1 else f"{self.name}×{self.times:.0f}"


KID = Score("kid", "KID", 1000.0, has_std=True, has_scale=True)


@dataclass(frozen=True)
class Headline(Score):
    """The score that verdicts, tables and figures go by; lower is better.

    Attributes:
        second: another opinion on the order of two arms.
        also: what stands beside the two in the table.
    """

    second: Score = KID
    also: tuple[Score, ...] = ()

    @property
    def shown(self) -> tuple[Score, ...]:
        """The scores of the table, in its order."""
        return self, self.second, *self.also


FID = Headline("fid", "FID", has_scale=True)
PRECISION = Score("precision", "precision", is_lower_better=False)
RECALL = Score("recall", "recall", is_lower_better=False)
SLICED_WASSERSTEIN = Headline(
    f"{DISTANCE}sliced_wasserstein",
    "sliced W₁",
    1000.0,
    second=Score(f"{DISTANCE}energy", "energy", 1000.0),
    also=(FID,),
)
HEADLINES = (FID, SLICED_WASSERSTEIN)

SCORES = (FID, KID, PRECISION, RECALL)
# What a milestone, a trial and an end of the scale have of them; and what stands beside an arm's of the scale.
SCORE_KEYS = (*(key for s in SCORES for key in (s.key, *([f"{s.key}_std"] if s.has_std else []))), "num_samples")
SCALE_KEYS = tuple(f"{score.key}_{end}" for end in ENDS for score in SCORES if score.has_scale)


def headline_of(columns: Container[str]) -> Headline:
    """The headline of results: FID, but where points are scored a distance that sees their shape.

    Args:
        columns: the scores that they have, of summary.csv or verdicts.csv, or of a milestone.
    """
    return SLICED_WASSERSTEIN if SLICED_WASSERSTEIN.key in columns else FID


def scale_scores(scale: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Both ends of the scale as they stand beside the scores of arms, by `fid_floor`, `fid_untrained` and so on.

    Args:
        scale: the content of scale.json.
    """
    return {f"{score.key}_{end}": scale[end][score.key] for end in ENDS for score in SCORES if score.has_scale}


def flat_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """A milestone's scores by one name each: its distances of points beside the others."""
    of_points = {f"{DISTANCE}{name}": value for name, value in scores.get("distances", {}).items()}
    return {**{key: value for key, value in scores.items() if key != "distances"}, **of_points}
