"""FLOPs of drawing images."""

from __future__ import annotations

from maskdm.compute import image_flops
from maskdm.config import Params


def forward_flops(params: Params) -> float:
    """FLOPs of one evaluation of the network on one whole image.

    Training costs three times that, but for the first layers, whose inputs need no gradient.
    """
    model, num_patches = params.model, params.grid.num_patches
    first = num_patches * params.patch_dim * model.dim + (4 * model.dim**2 if model.mlp_time_embed else 0)
    return (image_flops(params, num_patches) + 2 * first) / 3
