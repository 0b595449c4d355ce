"""The networks: how one is built from params, and its FLOPs as PyTorch counts them.

A backbone maps noised visible patches (B, S, P), timesteps (B,), the indices of these patches (B, S) and labels (B,) to
predictions (B, S, P).
"""

from __future__ import annotations

from functools import cache

import torch

from maskdm.config import ModelConfig, Params
from maskdm.method.backbones.uvit import UViT


def count_image_flops(params: Params, num_visible: int) -> int:
    """FLOPs of training on one image with S visible patches: forward and backward, attention included, no optimizer.

    Counted by `torch.utils.flop_counter` on the real network without data (the meta device), with attention as
    plain matrix products, so that the number does not depend on the kernel or the machine, and nothing computed twice
    to save memory. Every product has the batch as a factor, so that a step costs B times as much.
    """
    return _count_image_flops(params.model, params.grid.num_patches, params.patch_dim, num_visible)


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
