"""The scores: their names, which direction is better, and which one decides how arms compare.

To add a metric, add a field to `scores.Metrics`, its value to `scores.compute_metrics` and a row to `SCORES` here; a
test compares the three. results/metrics, summary.csv, the report and MLflow follow this table. To add a distance of
points, add a line to `points.distances`; it is called `distance_NAME` everywhere.

Nothing here imports torch or NumPy, so that commands that only read results start fast.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

DISTANCE = "distance_"  # prefix of the distances of points in columns and metrics
ENDS = ("floor", "untrained")  # ends of the scale: real images against real ones, and the untrained network


@dataclass(frozen=True)
class Score:
    """A score and how it is shown.

    Attributes:
        key: its column in summary.csv and its metric in MLflow.
        name: its name for people.
        times: the factor it is multiplied by before it is shown.
        is_lower_better: whether it falls as samples get better.
        has_std: whether `KEY_std`, its standard deviation over random subsets of the images, is recorded too.
        has_scale: whether its values at both ends of the scale, `KEY_floor` and `KEY_untrained`, are recorded too.
    """

    key: str
    name: str
    times: float = 1.0
    is_lower_better: bool = True
    has_std: bool = False
    has_scale: bool = False

    @property
    def label(self) -> str:
        """The name with its factor: `KID×1000`."""
        return self.name if self.times == 1 else f"{self.name}×{self.times:.0f}"


KID = Score("kid", "KID", 1000.0, has_std=True, has_scale=True)


@dataclass(frozen=True)
class Headline(Score):
    """The score that decides verdicts and that tables and figures show; lower is better.

    Attributes:
        second: a second score, to check the order of two arms.
        also: further scores that the table shows.
    """

    second: Score = KID
    also: tuple[Score, ...] = ()

    @property
    def shown(self) -> tuple[Score, ...]:
        """The scores in the table, in its order."""
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
# Keys of the scores of a milestone, a trial or an end of the scale; and keys of both ends in an arm's row.
SCORE_KEYS = (*(key for s in SCORES for key in (s.key, *([f"{s.key}_std"] if s.has_std else []))), "num_samples")
SCALE_KEYS = tuple(f"{score.key}_{end}" for end in ENDS for score in SCORES if score.has_scale)


def headline_of(columns: Container[str]) -> Headline:
    """The score that decides: FID, or for points a distance that depends on the shape of the distribution.

    Args:
        columns: the scores that exist: columns of summary.csv or verdicts.csv, or keys of a milestone.
    """
    return SLICED_WASSERSTEIN if SLICED_WASSERSTEIN.key in columns else FID


def scale_scores(scale: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Both ends of the scale as columns of an arm's row: `fid_floor`, `fid_untrained` and so on.

    Args:
        scale: the content of scale.json.
    """
    return {f"{score.key}_{end}": scale[end][score.key] for end in ENDS for score in SCORES if score.has_scale}


def flat_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """A milestone's scores in one flat mapping, distances of points included."""
    of_points = {f"{DISTANCE}{name}": value for name, value in scores.get("distances", {}).items()}
    return {**{key: value for key, value in scores.items() if key != "distances"}, **of_points}
