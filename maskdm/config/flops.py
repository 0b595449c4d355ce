"""FLOPs of a training step in closed form, and the split of a budget into steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def training_flops(
    num_visible: int,
    patch_dim: int,
    dim: int,
    depth: int,
    hidden_dim: int,
    num_tokens: int,
    mlp_time_embed: bool = False,
) -> int:
    """FLOPs of forward and backward for one image in a U-ViT, without the optimizer; a multiply-add counts as 2.

    Backward costs twice as much as forward, but only once as much for layers whose input needs no gradient. The tests
    compare this with what PyTorch counts on the real network (`maskdm.method.backbones.count_image_flops`).

    Args:
        num_visible: S, the number of visible patches.
        patch_dim: P, the number of values in a patch.
        dim: D, the width of a token.
        depth: the number of blocks.
        hidden_dim: the hidden width of the blocks' MLPs.
        num_tokens: S plus the extra tokens of time and class.
        mlp_time_embed: whether an MLP makes the time token.
    """
    linear = depth * num_tokens * (4 * dim**2 + 2 * dim * hidden_dim)  # qkv, proj, fc1, fc2
    skips = depth // 2 * num_tokens * 2 * dim**2
    attention = depth * 2 * num_tokens**2 * dim  # q·k and weights·v, over all heads
    head = num_visible * dim * patch_dim
    time_mlp = 4 * dim**2 if mlp_time_embed else 0
    whole = linear + skips + attention + head + time_mlp
    without_input_gradient = num_visible * patch_dim * dim + time_mlp  # the embeddings of patches and time
    return 2 * (3 * whole + 2 * without_input_gradient)


class Split(NamedTuple):
    """The budget of an arm in steps.

    Attributes:
        pretrain_steps: steps of masked pretraining.
        finetune_steps: steps of finetuning, up to the end of the budget.
        milestone_steps: finetuning steps done at each milestone; the last one is `finetune_steps`.
    """

    pretrain_steps: int
    finetune_steps: int
    milestone_steps: tuple[int, ...]


def split_budget(
    budget: float,
    share: float,
    steps: int | None,
    pretrain_cost: float,
    finetune_cost: float,
    milestones: Sequence[float],
) -> Split:
    """Split a budget: pretraining takes its share, or a number of steps; finetuning spends what is left.

    Args:
        budget: what the arm may spend, in the unit of the costs.
        share: the fraction of the budget for pretraining.
        steps: the number of pretraining steps, instead of the share.
        pretrain_cost: the cost of a pretraining step.
        finetune_cost: the cost of a finetuning step.
        milestones: increasing fractions of the budget; the last is 1.

    Raises:
        ValueError: the budget pays for less than one step of a stage, a milestone falls into pretraining, or two
            milestones fall on one step.
    """
    if steps is None:
        steps = round(share * budget / pretrain_cost)
        if share * budget < pretrain_cost and share > 0:
            raise ValueError(
                f"pretrain.share {share:g} of the budget pays for {share * budget / pretrain_cost:.2g} of one "
                "pretraining step; raise budget.unmasked_steps or the share, or lower pretrain.batch_size"
            )
        spent = max(share, steps * pretrain_cost / budget)
    else:
        spent = steps * pretrain_cost / budget
    left = budget - steps * pretrain_cost
    if milestones[0] <= spent:
        raise ValueError(
            f"the first milestone ({milestones[0]:g} of the budget) falls into pretraining, which takes {spent:.3g} "
            "of it; milestones are taken during finetuning"
        )
    if left < finetune_cost:
        raise ValueError(
            f"what pretraining leaves of the budget pays for {left / finetune_cost:.2g} of one finetuning step; raise "
            "budget.unmasked_steps or lower finetune.batch_size"
        )
    at = [max(1, round((left - (1 - fraction) * budget) / finetune_cost)) for fraction in milestones]
    if at != sorted(set(at)):
        raise ValueError(
            f"the milestones {list(milestones)} fall on finetuning steps {at}, which are not all different; raise "
            "budget.unmasked_steps or name fewer milestones"
        )
    return Split(steps, round(left / finetune_cost), tuple(at))
