"""Compute accounting against the products that the network makes, and budgets against their promise."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.base.errors import ParamsError
from maskdm.config import ModelConfig, Params, Run, StageConfig, resolve
from maskdm.method.backbones import count_image_flops
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import Diffusion, draw_step, masked_dsm_loss
from maskdm.method.masks import Masking
from tests.factories import tiny_model, tiny_params


@cache
def oracle_flops(model: ModelConfig, num_patches: int, patch_dim: int, num_visible: int) -> int:
    """FLOPs of a training step of one image, product by product as they happen: 2 per multiply-add.

    A linear layer makes a product forward, one for its weights' gradient, and one for its input's if that needs one.
    """
    flops = 0

    def of_linear(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal flops
        (x,) = inputs
        flops += (2 + x.requires_grad) * 2 * x.numel() * layer.out_features

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal flops
        batch, heads, tokens, dim = q.shape
        flops += 3 * 2 * 2 * batch * heads * tokens * tokens * dim  # q·k and weights·v
        return q @ (q.transpose(-1, -2) @ v)  # any value: only its shape and that it needs a gradient matter

    with torch.device("meta"), patch("torch.nn.functional.scaled_dot_product_attention", attention):
        network = UViT(model, num_patches, patch_dim, num_classes=1)
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(of_linear)  # type: ignore[arg-type]
        number = torch.empty(1, dtype=torch.int64)
        network(torch.empty(1, num_visible, patch_dim), number, number.expand(1, num_visible), number)
    return flops


def oracle_of(params: Params, num_visible: int) -> int:
    return oracle_flops(params.model, params.grid.num_patches, params.patch_dim, num_visible)


@pytest.mark.parametrize(
    ("model", "image_size", "channels"),
    [
        ({"patch_size": 2, "dim": 16, "depth": 3, "num_heads": 2}, 8, 1),
        ({"patch_size": 1, "dim": 32, "depth": 1, "num_heads": 4}, 8, 1),
        ({"patch_size": 4, "dim": 512, "depth": 13, "num_heads": 8}, 64, 3),
        ({"patch_size": 2, "dim": 48, "depth": 5, "num_heads": 3, "mlp_ratio": 1.5, "qkv_bias": True}, 16, 3),
        ({"patch_size": 2, "dim": 16, "depth": 3, "num_heads": 2, "class_conditional": True}, 8, 1),
        ({"patch_size": 4, "dim": 64, "depth": 3, "num_heads": 2, "mlp_time_embed": True}, 8, 1),
    ],
    ids=["tiny", "one-block", "celeba", "ratio-bias", "conditional", "time-mlp"],
)
@pytest.mark.parametrize(("batch_size", "rate"), [(1, 0.0), (3, 0.5), (2, 0.75)])
def test_counted_flops_are_the_architectures(
    model: dict[str, Any], image_size: int, channels: int, batch_size: int, rate: float
) -> None:
    params = tiny_params(model=model, dataset={"image_size": image_size, "channels": channels})
    num_visible = round((1 - rate) * params.grid.num_patches)
    counted = batch_size * count_image_flops(params, num_visible)
    assert counted == batch_size * oracle_of(params, num_visible)
    assert batch_size * params.image_flops(num_visible) == counted, "in closed form"


def test_a_masked_step_costs_about_its_share_of_a_full_one() -> None:
    params = tiny_params(model={"patch_size": 1, "dim": 64})
    full, masked = (4 * count_image_flops(params, n) for n in (64, 16))
    assert 0.2 < masked / full < 0.3


def test_counted_flops_are_those_of_a_real_training_step() -> None:
    params = tiny_params(model={"class_conditional": True})
    model, masking, diffusion = tiny_model(params), Masking("patch", params.grid, 0.7), Diffusion(10, "cosine", "v")
    x_0, labels = torch.zeros(6, 1, 8, 8), torch.arange(6)
    draws = draw_step(6, 4, masking, 10, 0.5, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
        masked_dsm_loss(model, diffusion, x_0, draws, 2, labels).backward()
    assert counter.get_total_flops() == 6 * count_image_flops(params, masking.num_visible)


# --- budgets


@st.composite
def experiments(draw: st.DrawFn) -> Params:
    """Any budget, over arms of different masks, batch sizes and splits, each split below the first milestone."""
    milestones = [*sorted(draw(st.sets(st.sampled_from([0.5, 0.6, 0.75, 0.9]), max_size=3))), 1.0]
    splits = st.sampled_from([{"share": share} for share in (0.0, 0.1, 0.3, 0.45)] + [{"steps": n} for n in (1, 20)])
    batches = st.sampled_from([1, 8, 32, 100])
    stage = {"lr": 1e-3, "batch_size": draw(batches)}
    arms: dict[str, Any] = {"scratch": {"strategy": "none"}}
    for index in range(draw(st.integers(1, 3))):
        arms[f"arm{index}"] = {
            "strategy": "patch",
            "mask_rate": draw(st.sampled_from([0.25, 0.5, 0.9])),
            "pretrain": {**draw(splits), "batch_size": draw(batches)},
            "finetune": {"batch_size": draw(batches)},
        }
    return tiny_params(
        budget={
            "match": draw(st.sampled_from(["flops", "images", "steps"])),
            "unmasked_steps": draw(st.sampled_from([5000, 12345])),
            "milestones": milestones,
        },
        pretrain=stage,
        finetune=stage,
        arms=arms,
    )


def cost_of_step(params: Params, stage: StageConfig, num_visible: int) -> float:
    """What `budget.match` counts, for one step."""
    return {
        "flops": stage.batch_size * oracle_of(params, num_visible),
        "images": stage.batch_size,
        "steps": 1,
    }[params.budget.match]


def budget_of(params: Params) -> float:
    return params.budget.unmasked_steps * cost_of_step(params, params.finetune, params.grid.num_patches)


def costs_of(params: Params, arm: str) -> tuple[float, float]:
    """Of one pretraining and one finetuning step of an arm."""
    return (
        cost_of_step(params, params.pretrain_of(arm), params.mask_of(arm).num_visible),
        cost_of_step(params, params.finetune_of(arm), params.grid.num_patches),
    )


def spent(run: Run, pretrain_cost: float, finetune_cost: float) -> float:
    return run.pretrain.num_steps * pretrain_cost + run.finetune.num_steps * finetune_cost


@given(experiments())
@settings(deadline=None, max_examples=40)
def test_every_arm_spends_the_budget_to_within_half_a_step(params: Params) -> None:
    for arm in params.arms:
        costs = costs_of(params, arm)
        assert abs(spent(resolve(params, arm, 0), *costs) - budget_of(params)) <= costs[1] / 2


@given(experiments())
@settings(deadline=None, max_examples=40)
def test_pretraining_takes_its_share_of_the_budget_or_its_steps(params: Params) -> None:
    for arm in params.arms:
        pretrain_cost, _ = costs_of(params, arm)
        num_steps, split = resolve(params, arm, 0).pretrain.num_steps, params.pretrain_of(arm)
        if split.steps is not None:
            assert num_steps == split.steps
            continue
        pretrained, share = num_steps * pretrain_cost, split.share
        assert abs(pretrained - share * budget_of(params)) <= pretrain_cost
        assert (pretrained == 0) == (round(share * budget_of(params) / pretrain_cost) == 0)


@given(experiments())
@settings(deadline=None, max_examples=40)
def test_milestones_lie_where_their_fraction_of_the_budget_is_spent(params: Params) -> None:
    for arm in params.arms:
        run, costs = resolve(params, arm, 0), costs_of(params, arm)
        fractions, steps = zip(*run.milestones, strict=True)
        assert list(fractions) == params.budget.milestones
        assert all(a < b for a, b in pairwise(steps))
        assert steps[-1] == run.finetune.num_steps
        for fraction, step in run.milestones:
            by_then = run.pretrain.num_steps * costs[0] + step * costs[1]
            assert abs(by_then - fraction * budget_of(params)) <= costs[1]


@given(unmasked_steps=st.integers(1, 6), share=st.sampled_from([0.0, 0.3, 0.45, 0.9]))
@example(unmasked_steps=1, share=0.9)
@example(unmasked_steps=2, share=0.0)
@settings(deadline=None, max_examples=20)
def test_milestones_of_a_tiny_budget_are_steps_that_finetuning_makes(unmasked_steps: int, share: float) -> None:
    milestones = [0.95, 1.0] if share == 0.9 else [0.5, 0.75, 1.0]
    budget = {"match": "steps", "unmasked_steps": unmasked_steps, "milestones": milestones}
    try:
        run = resolve(tiny_params(budget=budget, pretrain={"share": share}), "patch-m50", 0)
    except ParamsError as error:
        too_small = r"(the milestones|what pretraining leaves|pretrain\.share) .*; raise budget\.unmasked_steps"
        rounded_up = r"the first milestone .* falls into pretraining"  # e.g. 1.8 of 4 steps are 2, half of the budget
        assert re.search(rf"arms\.[a-z0-9-]+: ({too_small}|{rounded_up})", str(error)), error
        return
    steps = [step for _, step in run.milestones]
    assert steps == sorted(set(steps))
    assert steps[-1] == run.finetune.num_steps


@pytest.mark.parametrize("match", ["flops", "images", "steps"])
def test_scratch_spends_its_whole_budget_unmasked(match: str) -> None:
    params = tiny_params(budget={"match": match, "unmasked_steps": 123})
    run = resolve(params, "scratch", 0)
    assert (run.pretrain.num_steps, run.finetune.num_steps) == (0, 123)
    assert run.finetune.num_visible == params.grid.num_patches
    assert run.flops == 123 * 8 * count_image_flops(params, 16)


def test_pretraining_by_steps_takes_them_and_leaves_the_rest_to_finetuning() -> None:
    params = tiny_params(pretrain={"steps": 7}, arms={"a": {"strategy": "patch", "mask_rate": 0.5}})
    run = resolve(params, "a", 0)
    assert run.pretrain.num_steps == 7
    assert abs(run.flops - 100 * 8 * count_image_flops(params, 16)) <= 8 * count_image_flops(params, 16) / 2


TRIALS = {
    "given": {},
    "lr": {"pretrain.lr": 1e-4, "finetune.lr": 1e-4},
    "larger": {"pretrain.batch_size": 32, "finetune.batch_size": 32},
    "smaller": {"pretrain.batch_size": 4, "finetune.batch_size": 4},
    "pretrained-less": {"pretrain.share": 0.1, "finetune.lr": 2e-4},
    "pretrained-by-steps": {"pretrain.steps": 50, "finetune.lr": 3e-4},
}


@pytest.mark.parametrize("fraction", [0.31, 1.0])
@pytest.mark.parametrize("match", ["flops", "images"])
def test_every_trial_of_every_arm_spends_the_same_to_within_half_a_step(match: str, fraction: float) -> None:
    params = tiny_params(
        budget={"match": match, "unmasked_steps": 200},
        tuning={"budget_fraction": fraction, "trials": TRIALS},
    )
    budget = budget_of(params)
    for arm in params.arms:
        for trial in TRIALS:
            run = resolve(params, arm, 0, trial)
            assert budget_of(run.params) == fraction * budget, "of the shared batch size, whatever the trial's"
            pretrain_cost, finetune_cost = costs_of(run.params, arm)
            assert abs(spent(run, pretrain_cost, finetune_cost) - fraction * budget) <= finetune_cost / 2
            assert run.milestones == ((1.0, run.finetune.num_steps),)
            assert (run.pretrain.num_steps > 0) == (arm != "scratch")


def test_the_batch_size_that_was_chosen_does_not_change_the_budget_of_an_arm() -> None:
    params = tiny_params(arms={"scratch": {"strategy": "none"}})
    larger = resolve(params, "scratch", 0, chosen={"finetune.batch_size": 32})
    assert larger.finetune.num_steps == 25
    assert larger.flops == resolve(params, "scratch", 0).flops


def test_a_share_of_0_is_no_pretraining() -> None:
    run = resolve(tiny_params(pretrain={"share": 0.0}), "block2-m75", 0)
    assert (run.pretrain.num_steps, run.finetune.num_steps) == (0, 100)


def test_flops_of_a_run_are_those_of_its_steps() -> None:
    params = tiny_params()
    run = resolve(params, "block2-m75", 0)
    assert run.pretrain.num_visible == 4
    assert run.pretrain.flops == run.pretrain.num_steps * 8 * count_image_flops(params, 4)
    assert run.flops == run.pretrain.flops + run.finetune.flops
    assert run.pretrain.num_steps > 0


def test_masked_steps_are_more_at_equal_flops_and_as_many_at_equal_steps() -> None:
    flops, steps = (
        resolve(tiny_params(budget={"match": match}), "block2-m75", 0).pretrain.num_steps
        for match in ("flops", "steps")
    )
    assert steps == 30
    assert flops > 3 * steps


def test_an_unknown_arm_is_named() -> None:
    with pytest.raises(ParamsError, match=r"there is no arm 'scrach'.*did you mean 'scratch'"):
        resolve(tiny_params(), "scrach", 0)
