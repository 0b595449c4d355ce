"""An arm's steps and FLOPs in closed form: what the stages count on the real network, without the seconds of counting.

`compute.plan_arm` is what a stage does; a test holds that the numbers here are the same.
"""

from __future__ import annotations

from maskdm.budget import split_budget
from maskdm.compute import ArmPlan, StagePlan, patch_dim
from maskdm.config import Params, StageConfig
from maskdm.errors import ParamsError


def plan_of(params: Params, arm: str) -> ArmPlan:
    """Split an arm's budget into steps, as `compute.plan_arm` does.

    Raises:
        ParamsError: there is no such arm, or the budget is too small for it.
    """
    pretrain, finetune = params.pretrain_of(arm), params.finetune_of(arm)
    num_visible, num_patches = params.visible_of(arm).num_visible, params.grid.num_patches
    try:
        split = split_budget(
            params.budget.unmasked_steps * _cost(params, params.finetune, num_patches),
            pretrain.share,
            pretrain.steps,
            _cost(params, pretrain, num_visible),
            _cost(params, finetune, num_patches),
            params.budget.milestones,
        )
    except ValueError as error:
        raise ParamsError(f"arms.{arm}: {error}") from None
    return ArmPlan(
        pretrain=_stage(params, pretrain.batch_size, num_visible, split.pretrain_steps),
        finetune=_stage(params, finetune.batch_size, num_patches, split.finetune_steps),
        milestones=tuple(zip(params.budget.milestones, split.milestone_steps, strict=True)),
    )


def image_flops(params: Params, num_visible: int) -> int:
    """FLOPs of forward and backward of one image with S visible patches."""
    return params.model.training_flops(num_visible, patch_dim(params))


def forward_flops(params: Params) -> float:
    """FLOPs of one evaluation of the network on one whole image.

    Training costs three times that, but for the first layers, whose inputs need no gradient.
    """
    model, num_patches = params.model, params.grid.num_patches
    first = num_patches * patch_dim(params) * model.dim + (4 * model.dim**2 if model.mlp_time_embed else 0)
    return (image_flops(params, num_patches) + 2 * first) / 3


def _stage(params: Params, batch_size: int, num_visible: int, num_steps: int) -> StagePlan:
    return StagePlan(num_steps, batch_size, num_visible, batch_size * image_flops(params, num_visible))


def _cost(params: Params, stage: StageConfig, num_visible: int) -> int:
    if params.budget.match == "steps":
        return 1
    return stage.batch_size * (image_flops(params, num_visible) if params.budget.match == "flops" else 1)
