"""The networks: building one from params.yaml, and its FLOPs as PyTorch counts them.

A backbone is a module that maps noised visible patches (B, S, P), timesteps (B,), the indices of these patches (B, S)
and labels (B,) to predictions (B, S, P). It takes the arguments of `UViT`, and has `initialise(generator)`, which draws
its weights, and `blocks`, the modules that are compiled one by one where several ranks share the batch.
"""

from __future__ import annotations

from functools import cache

import torch

from maskdm.config import ModelConfig, Params
from maskdm.method.backbones.uvit import UViT


def count_image_flops(params: Params, num_visible: int) -> int:
    """FLOPs of training on one image with S visible patches: forward and backward, without the optimizer.

    A multiply-add counts as 2. `torch.utils.flop_counter` counts on the network without data (the meta device), with
    attention as plain matrix products and without activation checkpointing, so that the number depends on neither
    kernel nor machine. A batch of B images costs B times as much.
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
    """The network of params.yaml, its weights not yet initialised."""
    compute = params.compute
    return UViT(
        params.model,
        params.grid.num_patches,
        params.patch_dim,
        num_classes,
        compute.attention,
        compute.activation_checkpointing,
    )
