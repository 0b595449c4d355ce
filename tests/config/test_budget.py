"""How a budget becomes steps: that it is spent, that milestones lie in it, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from maskdm.config.flops import Split, split_budget

COSTS = st.floats(0.1, 100.0) | st.sampled_from([1.0, 3.0, 1e12])
MILESTONES = st.sets(st.integers(1, 99), max_size=4).map(lambda percents: [*(p / 100 for p in sorted(percents)), 1.0])


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, float | int | list[float] | None]:
    """Any budget, from less than a step to a thousand of them, split by a share or by steps."""
    finetune_cost = draw(COSTS)
    by_steps = draw(st.booleans())
    return {
        "budget": finetune_cost * draw(st.floats(0.1, 1000.0) | st.integers(1, 1000)),
        "share": 0.3 if by_steps else draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]) | st.floats(0, 0.99)),
        "steps": draw(st.integers(1, 300)) if by_steps else None,
        "pretrain_cost": finetune_cost * draw(st.floats(0.01, 10.0)),
        "finetune_cost": finetune_cost,
        "milestones": draw(MILESTONES),
    }


# many random budgets are refused: that is what other tests are about
FILTERED = settings(suppress_health_check=[HealthCheck.filter_too_much])


def split_of(budget: dict) -> Split:
    """The split, where there is one; an error is what other tests are about."""
    try:
        return split_budget(**budget)
    except ValueError:
        assume(False)
        raise


@FILTERED
@given(budgets())
def test_the_budget_is_spent_to_within_half_a_finetuning_step(budget: dict) -> None:
    split = split_of(budget)
    spent = split.pretrain_steps * budget["pretrain_cost"] + split.finetune_steps * budget["finetune_cost"]
    assert abs(spent - budget["budget"]) <= (0.5 + 1e-9) * budget["finetune_cost"]


@FILTERED
@given(budgets())
def test_pretraining_takes_its_share_to_within_half_a_step_or_its_steps(budget: dict) -> None:
    split = split_of(budget)
    if budget["steps"] is not None:
        assert split.pretrain_steps == budget["steps"]
        return
    cost = budget["pretrain_cost"]
    assert abs(split.pretrain_steps * cost - budget["share"] * budget["budget"]) <= (0.5 + 1e-9) * cost
    assert (split.pretrain_steps > 0) == (budget["share"] > 0)


@FILTERED
@given(budgets())
def test_milestones_are_steps_in_order_up_to_the_last_one(budget: dict) -> None:
    split = split_of(budget)
    assert len(split.milestone_steps) == len(budget["milestones"])
    assert all(a < b for a, b in pairwise((0, *split.milestone_steps)))
    assert split.milestone_steps[-1] == split.finetune_steps


@FILTERED
@given(budgets())
def test_milestones_lie_where_their_fraction_is_spent(budget: dict) -> None:
    """To half a step; the first step, where the fraction is spent before it is over."""
    split, cost = split_of(budget), budget["finetune_cost"]
    for fraction, step in zip(budget["milestones"], split.milestone_steps, strict=True):
        off = split.pretrain_steps * budget["pretrain_cost"] + step * cost - fraction * budget["budget"]
        assert abs(off) <= (0.5 + 1e-9) * cost or (step == 1 and 0 < off <= cost)


@FILTERED
@given(budgets())
def test_what_is_refused_is_refused_with_a_reason(budget: dict) -> None:
    """Independently: less than a step of a stage, a milestone in pretraining, or two on one step."""
    total, cost, share = budget["budget"], budget["finetune_cost"], budget["share"]
    steps = budget["steps"] or round(share * total / budget["pretrain_cost"])
    left = total - steps * budget["pretrain_cost"]
    at = [round((left - (1 - fraction) * total) / cost) for fraction in budget["milestones"]]
    well = left >= cost and all(a < b for a, b in pairwise((0, *at)))
    well = well and budget["milestones"][0] > max(
        steps * budget["pretrain_cost"] / total, share * (not budget["steps"])
    )
    well = well and (bool(budget["steps"]) or share == 0 or share * total >= budget["pretrain_cost"])
    try:
        split_budget(**budget)
    except ValueError as error:
        assert not well, error
    else:
        assert left >= cost


UNITS = {"pretrain_cost": 0.5, "finetune_cost": 1.0, "milestones": [0.6, 1.0]}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"budget": 20, "share": 0.3, "steps": None}, Split(12, 14, (6, 14))),
        ({"budget": 20, "share": 0.0, "steps": None}, Split(0, 20, (12, 20))),
        ({"budget": 20, "share": 0.3, "steps": 4}, Split(4, 18, (10, 18))),
        ({"budget": 2, "share": 0.25, "steps": None, "milestones": [1.0]}, Split(1, 2, (2,))),  # 1.5 steps are left
    ],
)
def test_splits_by_hand(budget: dict, expected: Split) -> None:
    assert split_budget(**{**UNITS, **budget}) == expected


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (
            {"budget": 1, "share": 0.3, "steps": None},
            r"pretrain\.share 0\.3 of the budget pays for 0\.6 of one pretrain",
        ),
        ({"budget": 1, "share": 0.49, "steps": None}, r"pays for 0\.98 of one pretraining step; raise budget\."),
        (
            {"budget": 20, "share": 0.6, "steps": None},
            r"first milestone \(0\.6 .*into pretraining, which takes 0\.6",
        ),
        ({"budget": 20, "share": 0.3, "steps": 24}, r"first milestone \(0\.6 .*into pretraining, which takes 0\.6"),
        ({"budget": 20, "share": 0.3, "steps": 100}, r"into pretraining, which takes 2\.5 of it"),
        ({"budget": 0.9, "share": 0.0, "steps": None}, r"pays for 0\.9 of one finetuning step; raise budget\."),
        ({"budget": 2, "share": 0.3, "steps": 3, "milestones": [0.9, 1.0]}, r"pays for 0\.5 of one finetuning step"),
        ({"budget": 1, "share": 0.0, "steps": None}, r"milestones \[0\.6, 1\.0\] fall on finetuning steps \[1, 1\]"),
        ({"budget": 20, "share": 0, "steps": None, "milestones": [0.9, 0.91, 1.0]}, r"finetuning steps \[18, 18, 20\]"),
    ],
)
def test_impossible_budgets_say_why(budget: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_budget(**{**UNITS, **budget})


def test_it_is_plain_arithmetic_that_imports_nothing_heavy() -> None:
    code = "import sys, maskdm.config.flops, maskdm.config; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
