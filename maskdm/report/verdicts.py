"""Each arm against scratch, in a sentence, and the project's question answered in one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from maskdm.config import Params
from maskdm.report.comparison import SIGNIFICANT, Against, Comparison, reference_of
from maskdm.report.numbers import places_of, ratio_text, seeds_text, signed
from maskdm.report.results import Missing
from maskdm.report.statistics import Crossing, Estimate

EQUAL_COMPUTE = 0.02  # arms whose compute differs by less are said to have had equal compute
MATCHED_BY = {"flops": "compute", "images": "images seen", "steps": "steps"}
MAX_NAMES = 3  # of arms in a sentence
Kind = Literal["better", "worse", "undecided", "baseline", "missing"]


@dataclass(frozen=True)
class Verdict:
    """One arm compared with scratch, in plain words.

    Attributes:
        arm: its key.
        text: the sentence, without the arm's name.
        kind: better and worse only where chance is an unlikely reason, all arms considered; all else is undecided.
    """

    arm: str
    text: str
    kind: Kind


def judge_arms(params: Params, compared: list[Comparison], missing: list[Missing]) -> list[Verdict]:
    """A verdict for every arm, scratch and the missing ones, too."""
    reference = next((c for c in compared if c.arm == reference_of(params)), None)
    tests = sum(c.against is not None for c in compared)
    return [_judge(params, c, reference, tests, [m for m in missing if m.arm == c.arm]) for c in compared]


def _judge(
    params: Params, arm: Comparison, reference: Comparison | None, tests: int, missing: list[Missing]
) -> Verdict:
    if not arm.seeds:
        return Verdict(arm.arm, _missing_text(missing), "missing")
    if reference is None:
        parts = [score_text(arm), "there is no arm without pretraining to compare with"]
        return Verdict(arm.arm, _sentence([*parts, _seeds_missing(params, arm)]), "undecided")
    if arm is reference:
        parts = [f"what the others are compared with: {score_text(arm)}", _origin(arm, reference)]
        return Verdict(arm.arm, _sentence([*parts, _seeds_missing(params, arm)]), "baseline")
    if arm.against is None:
        why = "no seed in common with it" if reference.seeds else "which is missing"
        parts = [score_text(arm), f"not compared with {reference.arm}, {why}"]
        return Verdict(arm.arm, _sentence([*parts, _seeds_missing(params, arm)]), "undecided")
    return Verdict(arm.arm, _against_text(params, arm, arm.against, reference, tests), _kind(arm.against))


def _kind(against: Against) -> Kind:
    if not against.is_clear:
        return "undecided"
    return "better" if against.score.difference.mean < 0 else "worse"


def _against_text(params: Params, arm: Comparison, against: Against, reference: Comparison, tests: int) -> str:
    return _sentence(
        [
            *_result_parts(params, arm, against, reference),
            _correction(against, tests),
            _second_text(arm, against, reference.arm),
            _origin(arm, reference),
            _seeds_missing(params, arm),
        ]
    )


def _sentence(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def _result_parts(params: Params, arm: Comparison, against: Against, reference: Comparison) -> list[str]:
    """What the numbers say, the strongest statement that they allow first."""
    score, name, at_equal = arm.headline, reference.arm, matched_text(params, against)
    gap = against.score.difference.times(score.times)
    difference = f"{score.label} {_difference(gap)}"
    if not gap.has_interval:
        return _without_interval(arm, against, name, f"{difference} {at_equal}")
    if gap.high < 0:
        saves = _saves(arm, against, reference)
        return [f"{saves}{_crossing_text(against, f'same {score.name}')}", f"{difference} {at_equal} {_interval(gap)}"]
    if gap.low > 0:
        return [f"{_worse(against, name)}: {difference} {at_equal} {_interval(gap, with_n=True)}"]
    text = f"not distinguishable from {name} {at_equal}: {difference} {_interval(gap, with_n=True)}"
    if against.crossing.at is not None:
        return [text, _crossing_text(against, f"its mean reaches {name}'s {score.name}")]
    never = all(gap >= 0 for gap in against.at_milestones.values())
    return [text, "on average no better at any budget tried"] if never else [text]


def _without_interval(arm: Comparison, against: Against, name: str, said: str) -> list[str]:
    if against.crossing.at is not None:
        return [_crossing_text(against, f"same {arm.headline.name}"), said]
    return [f"{_worse(against, name)}: {said} ({seeds_text(against.score.difference.n)}: no interval)"]


def _worse(against: Against, name: str) -> str:
    """The arm is worse at the end; was it ever better?"""
    better = [f"{fraction:g}" for fraction, gap in against.at_milestones.items() if gap < 0]
    if not better:
        return f"no better than {name} at any budget tried"
    return f"worse than {name} at the end, though better on average at {_names(better)} of the budget"


def matched_text(params: Params, against: Against) -> str:
    """Under which condition two arms are compared at the end of the budget, with the compute if that differs."""
    ratio, equal = against.flops / against.base_flops, f"at equal {MATCHED_BY[params.budget.match]}"
    if abs(ratio - 1) <= EQUAL_COMPUTE:
        return equal if params.budget.match == "flops" else f"{equal} and compute"
    return f"{equal} with {ratio_text(ratio)} the compute"


def _saves(arm: Comparison, against: Against, reference: Comparison) -> str:
    """The word is for what is clear, against a scratch arm that was tuned as much."""
    ratio, high = against.ratio(against.crossing.at), against.ratio(against.crossing.high)
    is_sure = against.is_clear and ratio is not None and high is not None and high <= 1
    if not (_both_tuned(arm, reference) and is_sure):
        return ""
    assert ratio is not None
    most = "at least " if against.crossing.at_most else ""
    return f"saves {most}{100 * (1 - ratio):.0f} % of the compute: "


def _crossing_text(against: Against, claim: str) -> str:
    """Compute at an equal score, in units of scratch's."""
    at, seconds = against.ratio(against.crossing.at), against.seconds_at_equal_score
    assert at is not None and seconds is not None
    most = "at most " if against.crossing.at_most else ""
    text = f"{claim} with {most}{ratio_text(at)} the compute ({_ratio_interval(against)})"
    if against.base_seconds > 0:
        text += f" and {most}{ratio_text(seconds / against.base_seconds)} the device seconds"
    return text


def _ratio_interval(against: Against) -> str:
    crossed: Crossing = against.crossing
    if not crossed.has_interval:
        return f"{seeds_text(crossed.n)}: no interval"
    low, high = against.ratio(crossed.low), against.ratio(crossed.high)
    if low is not None and high is not None:
        span = f"{low:.2f}–{high:.2f}"
    elif low is not None:
        span = f"{low:.2f} to beyond the budget"
    elif high is not None:
        span = f"up to {high:.2f}"
    else:
        span = "anywhere in the budget or beyond"
    return f"95 %: {span}, n = {crossed.n}"


def _difference(gap: Estimate) -> str:
    return signed(gap.mean, places_of(gap))


def _interval(gap: Estimate, with_n: bool = False) -> str:
    places, n = places_of(gap), f", n = {gap.n}" if with_n else ""
    return f"(95 %: {signed(gap.low, places)} to {signed(gap.high, places)}{n})"


def score_text(arm: Comparison) -> str:
    """An arm's final score with its interval, or why it has none."""
    score, label = arm.scores[arm.headline.key].times(arm.headline.times), arm.headline.label
    places = places_of(score)
    if not score.has_interval:
        return f"{label} {score.mean:.{places}f} ({seeds_text(score.n)}: no interval)"
    return f"{label} {score.mean:.{places}f} (95 %: {score.low:.{places}f} to {score.high:.{places}f}, n = {score.n})"


def _correction(against: Against, tests: int) -> str:
    """A difference that is clear by itself and not among all that were looked at."""
    if not against.score.difference.excludes_zero or against.is_clear:
        return ""
    return f"with {tests} arms compared chance cannot be ruled out (Holm-adjusted p = {against.p_holm:.2f})"


def _second_text(arm: Comparison, against: Against, name: str) -> str:
    parts, second = [], arm.headline.second
    if against.second_disagrees:
        gap = against.second.difference.mean * second.times
        parts.append(f"{second.name} orders it and {name} the other way round ({second.label} {signed(gap, 2)})")
    if arm.disputed:
        parts.append(f"{arm.headline.name} and {second.name} dispute its order with {_names(arm.disputed)}")
    return _sentence(parts)


def _names(names: list[str]) -> str:
    shown = names[:MAX_NAMES]
    if len(names) > MAX_NAMES:
        return f"{', '.join(shown)} and {len(names) - MAX_NAMES} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _both_tuned(arm: Comparison, reference: Comparison) -> bool:
    return all(c.choice is not None and c.choice.is_tuned for c in (arm, reference))


def _origin(arm: Comparison, reference: Comparison) -> str:
    """How the hyperparameters of the two came about, where that is not: both were tuned."""
    return "" if _both_tuned(arm, reference) else "hyperparameters given, not tuned"


def _missing_text(missing: list[Missing]) -> str:
    return f"missing: {missing[0].reason}; run `{missing[0].command}`"


def _seeds_missing(params: Params, arm: Comparison) -> str:
    count = len(params.seeds) - arm.num_seeds
    return f"{count} of {len(params.seeds)} seeds missing" if count else ""


def answer(params: Params, compared: list[Comparison]) -> str:
    """The project's question, answered in a sentence or two."""
    name = reference_of(params)
    if name is None:
        return "No comparison is possible: there is no arm without pretraining."
    pretrained = [c for c in compared if params.arm(c.arm).strategy != "none"]
    if not pretrained:
        return "No comparison is possible: no arm was pretrained."
    kind = "masked" if all(params.realised_mask_rate_of(c.arm) for c in pretrained) else "pretrained"
    found = [(c.arm, c.against) for c in pretrained if c.against is not None]
    if not found:
        return f"No comparison is possible yet: {name} or every {kind} arm is missing."
    equal, score = f"at equal {MATCHED_BY[params.budget.match]}", compared[0].headline.name
    sure = [(arm, against) for arm, against in found if against.score.difference.has_interval]
    said = [_sure_answer(sure, kind, score, name, equal) if sure else _unsure_answer(found, kind, score, name, equal)]
    if sure and len(found) > len(sure):
        said.append(f"{len(found) - len(sure)} more had too few seeds to tell.")
    if len(pretrained) > len(found):
        said.append(f"{len(pretrained) - len(found)} of {len(pretrained)} {kind} arms could not be compared.")
    return " ".join(said)


def _sure_answer(found: list[tuple[str, Against]], kind: str, score: str, name: str, equal: str) -> str:
    """With intervals: what is clear among all arms."""
    clear = {arm: against.score.difference.mean < 0 for arm, against in found if against.is_clear}
    better, worse = ([arm for arm, is_better in clear.items() if is_better == wanted] for wanted in (True, False))
    count = f"{len(better)} of {len(found)}" if better else f"None of {len(found)}"
    rest = [
        f"{len(worse)} had a clearly higher one" if worse else "",
        f"{len(found) - len(clear)} could not be distinguished from it" if len(found) > len(clear) else "",
    ]
    seeds = f"{seeds_text(min(against.score.difference.n for _, against in found))}"
    return (
        _sentence(
            [
                f"{count} {kind} arms had a clearly lower {score} than {name} {equal}{_listed(better)} "
                f"({seeds}, Holm-adjusted p < {SIGNIFICANT:g})",
                *rest,
            ]
        )
        + "."
    )


def _unsure_answer(found: list[tuple[str, Against]], kind: str, score: str, name: str, equal: str) -> str:
    """Without intervals for all: what was seen, and that chance may be the reason."""
    better = [arm for arm, against in found if against.score.difference.mean < 0]
    count = f"{len(better)} of {len(found)}" if better else f"None of {len(found)}"
    seeds = seeds_text(max(against.score.difference.n for _, against in found))
    return (
        f"{seeds[0].upper()}{seeds[1:]} cannot tell a difference from chance. What was seen: {count} {kind} arms had a "
        f"lower {score} than {name} {equal}{_listed(better)}."
    )


def _listed(arms: list[str]) -> str:
    return f": {', '.join(arms)}" if 0 < len(arms) <= 2 * MAX_NAMES else ""
