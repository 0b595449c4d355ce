"""FLOPs in closed form: what the stages count on the real network, without the seconds of counting."""

from __future__ import annotations

from functools import partial

from maskdm.compute import plan_arm
from maskdm.config import Params


def image_flops(params: Params, num_visible: int) -> int:
    """FLOPs of forward and backward of one image with S visible patches."""
    return params.model.training_flops(num_visible, params.patch_dim)


plan_of = partial(plan_arm, image_flops=image_flops)


def forward_flops(params: Params) -> float:
    """FLOPs of one evaluation of the network on one whole image.

    Training costs three times that, but for the first layers, whose inputs need no gradient.
    """
    model, num_patches = params.model, params.grid.num_patches
    first = num_patches * params.patch_dim * model.dim + (4 * model.dim**2 if model.mlp_time_embed else 0)
    return (image_flops(params, num_patches) + 2 * first) / 3
