"""Compute accounting: FLOPs per step, and how an arm's budget becomes steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch

from maskdm.backbone import UViT
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


def count_image_flops(params: Params, num_visible: int) -> int:
    """FLOPs of training on one image with S visible patches: forward and backward, attention included, no optimizer.

    Counted by `torch.utils.flop_counter` on the real network without data (the meta device), with attention as
    plain matrix products, so that the number does not depend on the kernel or the machine, and nothing computed twice
    to save memory. Every product has the batch as a factor, so that a step costs B times as much.
    """
    return _count_image_flops(params.model, params.grid.num_patches, params.patch_dim, num_visible)


def image_flops(params: Params, num_visible: int) -> int:
    """FLOPs of training on one image with S visible patches, in closed form.

    The same number as `count_image_flops`, which the tests compare; PyTorch's counter takes two seconds to import.
    """
    return params.model.training_flops(num_visible, params.patch_dim)


def plan_arm(params: Params, arm: str) -> ArmPlan:
    """Split an arm's budget into steps.

    Pretraining takes its share, finetuning what pretraining really left, so that all arms spend the same to within
    half a step.

    Args:
        params: the experiment.
        arm: its key.

    Raises:
        ParamsError: there is no such arm, or the budget is too small for it.
    """
    flops_of = partial(image_flops, params)
    try:
        split = params.split_of(arm, flops_of)
    except ValueError as error:
        raise ParamsError(f"arms.{arm}: {error}") from None

    def stage(config: StageConfig, num_visible: int, num_steps: int) -> StagePlan:
        return StagePlan(num_steps, config.batch_size, num_visible, config.batch_size * flops_of(num_visible))

    return ArmPlan(
        pretrain=stage(params.pretrain_of(arm), params.visible_of(arm).num_visible, split.pretrain_steps),
        finetune=stage(params.finetune_of(arm), params.grid.num_patches, split.finetune_steps),
        milestones=tuple(zip(params.budget.milestones, split.milestone_steps, strict=True)),
    )


@cache
def _count_image_flops(config: ModelConfig, num_patches: int, patch_dim: int, num_visible: int) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

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
    compute = params.compute
    return UViT(
        params.model,
        params.grid.num_patches,
        params.patch_dim,
        num_classes,
        compute.attention,
        compute.activation_checkpointing,
    )
