"""Compute accounting: FLOPs per step, counted on the real network, and how an arm's budget becomes steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.backbone import UViT
from maskdm.budget import split_budget
from maskdm.config import ModelConfig, Params, StageConfig
from maskdm.errors import ParamsError


@dataclass(frozen=True)
class StagePlan:
    """What one training stage does.

    Attributes:
        num_steps: optimizer updates.
        batch_size: images per update.
        num_visible: S, tokens of an image that enter the network.
        flops_per_step: forward and backward of a whole batch, 2 FLOPs per multiply-add.
    """

    num_steps: int
    batch_size: int
    num_visible: int
    flops_per_step: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole stage."""
        return self.num_steps * self.flops_per_step


@dataclass(frozen=True)
class ArmPlan:
    """What an arm does with its budget.

    Attributes:
        pretrain: masked pretraining (no step for strategy `none`).
        finetune: unmasked finetuning.
        milestones: (fraction of the budget, finetuning steps done by then).
    """

    pretrain: StagePlan
    finetune: StagePlan
    milestones: tuple[tuple[float, int], ...]

    @property
    def flops(self) -> int:
        """FLOPs of both stages."""
        return self.pretrain.flops + self.finetune.flops


def plan_arm(params: Params, arm: str) -> ArmPlan:
    """Split an arm's budget into steps.

    The budget is the cost of `budget.unmasked_steps` finetuning steps as `finetune` describes them; `budget.match`
    says what cost means. Pretraining takes its share, finetuning what pretraining really left, so that all arms
    spend the same to within half a step.

    Raises:
        ParamsError: there is no such arm, or the budget is too small to tell its milestones apart.
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
        pretrain=_stage_plan(params, pretrain, num_visible, split.pretrain_steps),
        finetune=_stage_plan(params, finetune, num_patches, split.finetune_steps),
        milestones=tuple(zip(params.budget.milestones, split.milestone_steps, strict=True)),
    )


def count_step_flops(params: Params, batch_size: int, num_visible: int) -> int:
    """FLOPs of one training step: forward and backward, attention included, optimizer excluded.

    Counted by `torch.utils.flop_counter` on the real network without data (the meta device), with attention as
    plain matrix products, so that the number does not depend on the kernel or the machine. Every product has the
    batch as a factor, so one image is counted, once per S.

    Args:
        params: gives the architecture.
        batch_size: B.
        num_visible: S.
    """
    shape = (params.grid.num_patches, patch_dim(params), num_visible)
    return batch_size * _count_image_flops(params.model, *shape)


@cache
def _count_image_flops(config: ModelConfig, num_patches: int, patch_dim: int, num_visible: int) -> int:
    with torch.device("meta"):
        model = UViT(config, num_patches, patch_dim, num_classes=1)
        patches = torch.empty(1, num_visible, patch_dim)
        t = torch.empty(1, dtype=torch.int64)
        visible_idx = torch.empty(1, num_visible, dtype=torch.int64)
        labels = torch.empty(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            model(patches, t, visible_idx, labels).sum().backward()
    return counter.get_total_flops()


def build_model(params: Params, num_classes: int) -> UViT:
    """The network that params describe, weights not yet initialised."""
    return UViT(params.model, params.grid.num_patches, patch_dim(params), num_classes)


def patch_dim(params: Params) -> int:
    """P, the pixels of a patch: p·p·C."""
    return params.model.patch_size**2 * params.dataset.channels


def _cost(params: Params, stage: StageConfig, num_visible: int) -> float:
    if params.budget.match == "steps":
        return 1.0
    if params.budget.match == "images":
        return float(stage.batch_size)
    return float(count_step_flops(params, stage.batch_size, num_visible))


def _stage_plan(params: Params, stage: StageConfig, num_visible: int, num_steps: int) -> StagePlan:
    flops_per_step = count_step_flops(params, stage.batch_size, num_visible)
    return StagePlan(num_steps, stage.batch_size, num_visible, flops_per_step)
