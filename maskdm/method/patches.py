"""Images as patches: the only place that knows the order of pixels in a patch and of patches in an image."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from maskdm.config.geometry import Grid


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, N, p·p·C), patches in row-major order, pixels in the order (row, column, channel)."""
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch_size, p2=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: Grid) -> Tensor:
    """(B, N, p·p·C) → (B, C, H, W): the inverse of `patchify`."""
    return rearrange(
        patches,
        "b (h w) (p1 p2 c) -> b c (h p1) (w p2)",
        p1=patch_size,
        p2=patch_size,
        h=grid.rows,
        w=grid.cols,
    )


def gather_patches(patches: Tensor, visible_idx: Tensor) -> Tensor:
    """The visible patches: (B, N, P), (B, S) → (B, S, P)."""
    return patches.gather(1, visible_idx[:, :, None].expand(-1, -1, patches.shape[2]))
