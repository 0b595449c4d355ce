"""Images as patches, and masks: which patches stay visible, drawn on the device for a whole batch at once.

This is the only place that knows the order of pixels in a patch and of patches in an image.

A mask is kept as the indices of the visible patches, (B, S) with the same S for every image: gathering by index
has static shapes, so nothing synchronises with the host.

Source: MaskDM (arXiv 2306.11363), section 3.2 "Masking configuration".
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from maskdm.config.geometry import Grid, Mask


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


class Masking(Mask):
    """How M is drawn for an arm."""

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw masks for a batch.

        Args:
            batch_size: B.
            generator: lives on the device on which the masks are wanted.

        Returns:
            visible_idx: (B, S) int64, ascending in each row, into the grid in row-major order.
        """
        if self.num_visible == self.grid.num_patches:
            return all_visible(batch_size, self.grid, generator.device)
        if self.visible.window is not None:
            return _draw_window(batch_size, self.visible.window, self.grid, generator)
        if self.strategy == "patch":
            order = _patch_order(batch_size, self.grid, generator)
        elif self.strategy == "block" and self.block_size is not None:
            order = _block_order(batch_size, self.block_size, self.grid, generator)
        else:
            raise NotImplementedError(f"strategy {self.strategy!r} has a size, but no way to be drawn")
        return order[:, : self.num_visible].sort(dim=1).values


def all_visible(batch_size: int, grid: Grid, device: torch.device) -> Tensor:
    """The visible_idx (B, N) of mask rate 0."""
    return torch.arange(grid.num_patches, device=device).expand(batch_size, -1)


def to_mask(visible_idx: Tensor, num_patches: int) -> Tensor:
    """The paper's M as booleans.

    Args:
        visible_idx: (B, S) int64.
        num_patches: N.

    Returns:
        mask: (B, N) bool, True = masked (removed).
    """
    mask = torch.ones(visible_idx.shape[0], num_patches, dtype=torch.bool, device=visible_idx.device)
    return mask.scatter(1, visible_idx, False)


def _patch_order(batch_size: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Patches in uniformly random order: (B, N)."""
    return _uniform(batch_size, grid.num_patches, generator).argsort(dim=1)


def _block_order(batch_size: int, block_size: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Patches block after block, blocks in random order: (B, N).

    Inside a block the order is random too, so that in the block that S cuts every patch is equally likely to
    stay, and P(visible) = S/N for every patch when the blocks tile the grid. At the border of a grid that
    block_size does not divide, blocks are narrower.
    """
    block_of_patch, num_blocks = _blocks(block_size, grid, generator.device)
    block_rank = _uniform(batch_size, num_blocks, generator).argsort(dim=1).argsort(dim=1)  # (B, blocks)
    within = _uniform(batch_size, grid.num_patches, generator)
    return (block_rank[:, block_of_patch].double() + within).argsort(dim=1)  # (B, N)


def _blocks(block_size: int, grid: Grid, device: torch.device) -> tuple[Tensor, int]:
    """The block that each patch lies in (N,), and the number of blocks."""
    blocks_across = -(-grid.cols // block_size)
    row = torch.arange(grid.rows, device=device) // block_size
    col = torch.arange(grid.cols, device=device) // block_size
    block_of_patch = (row[:, None] * blocks_across + col[None, :]).flatten()
    return block_of_patch, -(-grid.rows // block_size) * blocks_across


def _draw_window(batch_size: int, window: tuple[int, int], grid: Grid, generator: torch.Generator) -> Tensor:
    """One h×w window per image, its place uniform over those that fit: (B, h·w).

    Patches at the border fall into fewer windows than those in the middle, as in the paper.
    """
    h, w = window
    device = generator.device
    top = torch.randint(grid.rows - h + 1, (batch_size, 1, 1), generator=generator, device=device)
    left = torch.randint(grid.cols - w + 1, (batch_size, 1, 1), generator=generator, device=device)
    row = top + torch.arange(h, device=device)[None, :, None]  # (B, h, 1)
    col = left + torch.arange(w, device=device)[None, None, :]  # (B, 1, w)
    return (row * grid.cols + col).flatten(1)  # (B, h·w)


def _uniform(batch_size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch_size, count, generator=generator, device=generator.device)
