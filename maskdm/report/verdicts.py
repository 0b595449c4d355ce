"""Each arm against scratch in a sentence, and the answer to the project's question."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from maskdm.config import Params
from maskdm.report.comparison import SIGNIFICANT, Against, Comparison, Findings
from maskdm.report.numbers import names_text, places_of, seeds_text, signed
from maskdm.report.statistics import Estimate

EQUAL_COMPUTE = 0.02  # a relative difference: below it, two arms are said to have had equal compute
MATCHED_BY = {"flops": "compute", "images": "images seen", "steps": "steps"}
MAX_NAMES = 3  # of arms in a sentence
Kind = Literal["better", "worse", "undecided", "baseline", "missing"]


@dataclass(frozen=True)
class Verdict:
    """One arm compared with scratch, in plain words.

    Attributes:
        arm: its key.
        text: the sentence, without the arm's name.
        kind: better or worse only where chance is an unlikely reason, all arms considered; otherwise undecided.
    """

    arm: str
    text: str
    kind: Kind


def judge_arms(found: Findings) -> list[Verdict]:
    """A verdict for every arm, also for scratch and for missing arms."""
    return [_judge(found, arm) for arm in found.compared.values()]


def _judge(found: Findings, arm: Comparison) -> Verdict:
    params, reference = found.params, found.compared.get(found.reference or "")
    if not arm.num_seeds:
        first = next(one for one in found.results.missing if one.arm == arm.arm)
        return Verdict(arm.arm, f"missing: {first.reason}; run `{first.command}`", "missing")
    kind: Kind = "undecided"
    if reference is None:
        parts = [_score(arm), "there is no arm without pretraining to compare it with"]
    elif arm is reference:
        kind = "baseline"
        parts = [f"the arm that the others are compared with: {_score(arm)}", _origin(arm, reference)]
    elif arm.against is None:
        why = "they have no seed in common" if reference.num_seeds else f"{reference.arm} is missing"
        parts = [_score(arm), f"not compared with {reference.arm}, because {why}"]
    else:
        if arm.against.is_clear:
            kind = "better" if arm.against.score.difference.mean < 0 else "worse"
        parts = _result(params, arm, arm.against, reference)
        parts += [*_doubts(arm, arm.against, reference.arm, len(found.against)), _origin(arm, reference)]
    if lost := len(params.seeds) - arm.num_seeds:
        parts.append(f"{lost} of {len(params.seeds)} seeds missing")
    return Verdict(arm.arm, _joined(parts), kind)


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def _score(arm: Comparison) -> str:
    """An arm's final score with its interval, or why it has none."""
    score, label = arm.scores[arm.headline.key].times(arm.headline.times), arm.headline.label
    places = places_of(score)
    if not score.has_interval:
        return f"{label} {score.mean:.{places}f} ({seeds_text(score.n)}: no interval)"
    return f"{label} {score.mean:.{places}f} (95 %: {score.low:.{places}f} to {score.high:.{places}f}, n = {score.n})"


def _is_tuned(*arms: Comparison) -> bool:
    return all(arm.choice is not None and arm.choice.trials for arm in arms)


def _origin(arm: Comparison, reference: Comparison) -> str:
    """Where the hyperparameters come from, unless both arms were tuned."""
    return "" if _is_tuned(arm, reference) else "hyperparameters given, not tuned"


def _result(params: Params, arm: Comparison, against: Against, reference: Comparison) -> list[str]:
    """What the numbers say, the strongest statement that they allow first."""
    score, name = arm.headline, reference.arm
    gap, is_there = against.score.difference.times(score.times), against.crossing.at is not None
    difference = f"{score.label} difference {signed(gap.mean, places_of(gap))}"
    at_equal, reaches = _matched(params, against), f"reaches {name}'s final {score.name}"
    if not against.is_conclusive:
        return [f"undecided, because {name} is not trained enough to be a baseline: {difference} {at_equal}"]
    if not gap.has_interval:  # no ratio: it would be taken for a result
        return [f"undecided: {difference} {at_equal}, but {seeds_text(gap.n)} cannot tell a difference from chance"]
    if gap.high < 0:
        saves = _saves(against) if _is_tuned(arm, reference) else ""
        return [f"{saves}{_crossing(against, reaches)}", f"{difference} {at_equal} ({_interval(gap)})"]
    if gap.low > 0:
        return [f"{_worse(against, name)}: {difference} {at_equal} ({_interval(gap)}, n = {gap.n})"]
    text = f"not distinguishable from {name} {at_equal}: {difference} ({_interval(gap)}, n = {gap.n})"
    if is_there:
        return [text, _crossing(against, f"its mean {reaches}")]
    never = all(gap >= 0 for gap in against.at_milestones.values())
    return [text, "on average no better at any milestone"] if never else [text]


def _interval(gap: Estimate) -> str:
    return f"95 %: {signed(gap.low, places_of(gap))} to {signed(gap.high, places_of(gap))}"


def _worse(against: Against, name: str) -> str:
    """The arm is worse at the end of the budget; it may have been better before."""
    better = [f"{fraction:g}" for fraction, gap in against.at_milestones.items() if gap < 0]
    if not better:
        return f"no better than {name} at any milestone"
    earlier = names_text(better, MAX_NAMES, " and ")
    return f"worse than {name} at the end, though better on average at {earlier} of the budget"


def _matched(params: Params, against: Against) -> str:
    """What is equal between two arms at the end of the budget, with the compute if that differs."""
    ratio, equal = against.flops / against.base_flops, f"at equal {MATCHED_BY[params.budget.match]}"
    if abs(ratio - 1) <= EQUAL_COMPUTE:
        return equal if params.budget.match == "flops" else f"{equal} and compute"
    return f"{equal} with {ratio:.2f}× the compute"


def _saves(against: Against) -> str:
    """Said only of a clear difference to a scratch arm that was tuned too."""
    ratio, _, high = against.ratios
    if not against.is_clear or ratio is None or high is None or high > 1:
        return ""
    return f"saves {'at least ' if against.crossing.at_most else ''}{100 * (1 - ratio):.0f} % of the compute: "


def _crossing(against: Against, claim: str) -> str:
    """The compute at an equal score as a fraction of scratch's, and its interval."""
    crossed, (at, low, high) = against.crossing, against.ratios
    assert at is not None
    if not crossed.has_interval:
        interval = f"{seeds_text(crossed.n)}: no interval"
    else:
        span = "anywhere in the budget or beyond" if high is None else f"up to {high:.2f}"
        if low is not None:
            span = f"{low:.2f} to beyond the budget" if high is None else f"{low:.2f}–{high:.2f}"
        interval = f"95 %: {span}, n = {crossed.n}"
    most = "at most " if crossed.at_most else ""
    text = f"{claim} with {most}{at:.2f}× the compute ({interval})"
    if against.base_seconds > 0 and against.seconds_at_equal_score is not None:
        text += f" and {most}{against.seconds_at_equal_score / against.base_seconds:.2f}× the device seconds"
    return text


def _doubts(arm: Comparison, against: Against, name: str, tests: int) -> list[str]:
    """Doubts: a difference that is clear alone but not among all arms, and a second opinion that disagrees."""
    said, second, gap = [], arm.headline.second, against.second.difference.mean
    if against.score.difference.excludes_zero and not against.is_clear:
        said.append(f"with {tests} arms compared, chance cannot be ruled out (Holm-adjusted p = {against.p_holm:.2f})")
    if against.score.difference.mean * gap < 0:
        difference = f"{second.label} difference {signed(gap * second.times, 2)}"
        said.append(f"{second.name} ranks it and {name} the other way round ({difference})")
    if arm.disputed:
        others = names_text(arm.disputed, MAX_NAMES, " and ")
        said.append(f"{arm.headline.name} and {second.name} disagree on whether it is better than {others}")
    return said


def answer(found: Findings) -> str:
    """The project's question, answered in a sentence or two."""
    params, name, masked = found.params, found.reference, found.masked
    if name is None:
        return "No comparison is possible: there is no arm without pretraining."
    if not masked:
        return "No comparison is possible: no arm was pretrained."
    kind = "masked" if all(params.mask_of(arm).realised_mask_rate for arm in masked) else "pretrained"
    against = {arm: one for arm, one in found.against.items() if arm in masked}
    if not against:
        return f"No comparison is possible yet: {name} or every {kind} arm is missing."
    if found.no_baseline:
        return f"Nothing can be concluded yet: {found.no_baseline}. Train longer (budget.unmasked_steps)."
    sure = {arm: one for arm, one in against.items() if one.score.difference.has_interval}
    than = f"{found.headline.name} than {name} at equal {MATCHED_BY[params.budget.match]}"
    said = [_sure_answer(sure, kind, than, name) if sure else _unsure_answer(against, kind, than)]
    if sure and len(against) > len(sure):
        said.append(f"{len(against) - len(sure)} more had too few seeds to tell.")
    if len(masked) > len(against):
        said.append(f"{len(masked) - len(against)} of {len(masked)} {kind} arms could not be compared.")
    return " ".join(said)


def _sure_answer(found: dict[str, Against], kind: str, than: str, name: str) -> str:
    """With intervals: the differences that are clear among all arms."""
    clear = {arm: one.score.difference.mean < 0 for arm, one in found.items() if one.is_clear}
    better, worse = [arm for arm, is_better in clear.items() if is_better], len(clear) - sum(clear.values())
    rest, seeds = len(found) - len(clear), min(one.score.difference.n for one in found.values())
    parts = [
        f"{len(better) or 'None'} of {len(found)} {kind} arms had a clearly lower {than}{_listed(better)} "
        f"({seeds_text(seeds)}, Holm-adjusted p < {SIGNIFICANT:g})",
        f"{worse} had a clearly higher one" if worse else "",
        f"{rest} could not be distinguished from {name}" if rest else "",
    ]
    return f"{_joined(parts)}."


def _unsure_answer(found: dict[str, Against], kind: str, than: str) -> str:
    """Without any interval: what was observed, and that chance may be the reason."""
    better = [arm for arm, against in found.items() if against.score.difference.mean < 0]
    seeds = seeds_text(max(against.score.difference.n for against in found.values()))
    return (
        f"{seeds[0].upper()}{seeds[1:]} cannot tell a difference from chance. Observed: {len(better) or 'none'} of "
        f"{len(found)} {kind} arms had a lower {than}{_listed(better)}."
    )


def _listed(arms: list[str]) -> str:
    return f": {', '.join(arms)}" if 0 < len(arms) <= 2 * MAX_NAMES else ""
