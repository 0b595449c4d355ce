"""What a figure is: how it is drawn, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from maskdm.config import Params
from maskdm.report.comparison import Comparison, reference_of
from maskdm.report.results import Results
from maskdm.scoring.headline import Headline, headline_of


@dataclass(frozen=True)
class Shown:
    """What the figures are drawn from.

    Attributes:
        params: the experiment.
        results: what was read of it.
        summary: a row per arm, seed and milestone, as in summary.csv.
        compared: every arm of params.yaml against scratch, in its order, the missing ones, too.
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
        """The arm that the others are compared with; None where there is none, or none with results."""
        reference = reference_of(self.params)
        return reference if reference in self.arms else None

    @property
    def arms(self) -> list[str]:
        """The arms with results, in the order of params.yaml."""
        present = set(self.summary["arm"])
        return [arm for arm in self.params.arms if arm in present]

    @property
    def missing_arms(self) -> list[str]:
        """The arms without any."""
        return [arm for arm in self.params.arms if arm not in self.arms]

    @property
    def num_seeds(self) -> int:
        """The most seeds that an arm has results of."""
        return max(one.num_seeds for one in self.compared.values())

    @property
    def final(self) -> pd.DataFrame:
        """The summary's rows at the end of the budget."""
        return self.summary[self.summary["milestone"] == self.summary["milestone"].max()]


@dataclass(frozen=True)
class Kind:
    """A figure of the report.

    Attributes:
        file: its name.
        title: a short one; `{score}` in it stands for the headline's name.
        draw: draws it.
        caption: what it shows, and what it doesn't.
        alt: what it says, for those who can't see it.
        applies: whether there is anything to draw.
        has_scores: whether it shows scores, whose protocol is to stand under it.
    """

    file: str
    title: str
    draw: Callable[[Shown], Figure]
    caption: Callable[[Shown], str]
    alt: Callable[[Shown], str]
    applies: Callable[[Shown], bool] = lambda _: True
    has_scores: bool = False
