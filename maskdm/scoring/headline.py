"""The score that arms are compared by: FID, but a distance that sees their shape where points are scored."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

DISTANCE = "distance_"  # what columns and metrics of the distances of points begin with


@dataclass(frozen=True)
class Score:
    """A score of which lower is better.

    Attributes:
        key: its column in summary.csv, and its metric in MLflow.
        name: as it is called.
        times: what it is multiplied by before it is shown.
    """

    key: str
    name: str
    times: float = 1.0

    @property
    def label(self) -> str:
        """What stands beside its numbers: `KID×1000`."""
        return self.name if self.times == 1 else f"{self.name}×{self.times:.0f}"


@dataclass(frozen=True)
class Headline(Score):
    """The score that verdicts, tables and figures go by.

    Attributes:
        second: another opinion on the order of two arms.
        also: what stands beside the two in the table.
    """

    second: Score = Score("kid", "KID", 1000.0)
    also: tuple[Score, ...] = ()

    @property
    def shown(self) -> tuple[Score, ...]:
        """The scores of the table, in its order."""
        return self, self.second, *self.also


FID = Headline("fid", "FID")
SLICED_WASSERSTEIN = Headline(
    f"{DISTANCE}sliced_wasserstein",
    "sliced W₁",
    1000.0,
    second=Score(f"{DISTANCE}energy", "energy", 1000.0),
    also=(FID,),
)
HEADLINES = (FID, SLICED_WASSERSTEIN)


def headline_of(columns: Container[str]) -> Headline:
    """The headline of results that have these scores.

    Args:
        columns: of summary.csv or verdicts.csv, or the scores of a milestone.
    """
    return SLICED_WASSERSTEIN if SLICED_WASSERSTEIN.key in columns else FID


def flat_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """A milestone's scores by one name each: its distances of points beside the others."""
    of_points = {f"{DISTANCE}{name}": value for name, value in scores.get("distances", {}).items()}
    return {**{key: value for key, value in scores.items() if key != "distances"}, **of_points}
