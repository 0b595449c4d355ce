"""How numbers are written for people: in tables, sentences and figures alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from maskdm.report.statistics import Estimate


def decimals(values: pd.Series) -> int:
    """Decimal places that show a typical value of a column with three digits, at least two places."""
    size = values.abs().median()
    return 2 if not size > 0 else min(max(2 - math.floor(math.log10(size)), 2), 6)


def score_text(value: float) -> str:
    """A FID, or another score, with three digits, at least two of them decimals."""
    return f"{value:,.{decimals(pd.Series([value]))}f}"


def number_text(value: float) -> str:
    """Three significant digits, no exponent, thousands separated."""
    places = 0 if value == 0 else max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{min(places, 6)}f}"


def rate_text(rate: float) -> str:
    """A mask rate with two decimals, three where they are needed."""
    return f"{rate:.2f}" if round(rate, 2) == round(rate, 3) else f"{rate:.3f}"


def signed(value: float, places: int) -> str:
    """A difference: with its sign, a true minus, and none before a zero."""
    text = f"{value:+.{places}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def places_of(value: Estimate) -> int:
    """Decimal places for a mean and its interval: a digit of the half width; without interval, three of the mean."""
    half = value.high - value.mean
    if not math.isfinite(half):
        return min(decimals(pd.Series([value.mean])), 4)
    return 2 if half <= 0 else min(max(-math.floor(math.log10(half)), 2), 4)


def seeds_text(count: int) -> str:
    """How many seeds: one seed, two seeds, 3 seeds."""
    return {1: "one seed", 2: "two seeds"}.get(count, f"{count} seeds")


def names_text(names: Sequence[str], most: int, last: str = ", ") -> str:
    """Names in a sentence, the first `most` of them; `last` stands between the last two where all are named."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return last.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
