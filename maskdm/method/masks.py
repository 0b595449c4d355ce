"""Images as patches, and masks: which patches stay visible, drawn on the device for a whole batch at once.

Only this file knows the order of pixels in a patch and of patches in an image.

A mask is the indices of the visible patches, (B, S), with the same S for every image: shapes are static, so the host
never waits for the device.

Source: MaskDM (arXiv 2306.11363), section 3.2 "Masking configuration".
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from maskdm.config.geometry import Grid, Mask


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches of p×p pixels: (B, C, H, W) → (B, N, p·p·C).

    Patches are in row-major order, the values of a patch in the order (row, column, channel).

    Source: Dosovitskiy et al. 2020 (ViT, arXiv 2010.11929), section 3.1.
    """
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=patch_size, p2=patch_size)


def unpatchify(patches: Tensor, patch_size: int, grid: Grid) -> Tensor:
    """Put all patches of images together, the inverse of `patchify`: (B, N, p·p·C) → (B, C, H, W)."""
    return rearrange(
        patches,
        "b (h w) (p1 p2 c) -> b c (h p1) (w p2)",
        p1=patch_size,
        p2=patch_size,
        h=grid.rows,
        w=grid.cols,
    )


def gather_patches(patches: Tensor, visible_idx: Tensor) -> Tensor:
    """The visible patches: all patches (B, N, P), their indices (B, S) → (B, S, P)."""
    return patches.gather(1, visible_idx[:, :, None].expand(-1, -1, patches.shape[2]))


class Masking(Mask):
    """A mask strategy with its size, and how its masks M are drawn.

    Source: MaskDM, section 3.2.
    """

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw a mask for each image of a batch.

        Args:
            batch_size: B.
            generator: on the device that the masks are needed on.

        Returns:
            visible_idx (B, S) int64: indices into the grid in row-major order, ascending in each row.
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
            raise NotImplementedError(f"masks of strategy {self.strategy!r} can't be drawn")
        return order[:, : self.num_visible].sort(dim=1).values


def all_visible(batch_size: int, grid: Grid, device: torch.device) -> Tensor:
    """The indices of all patches, for mask rate 0: (B, N) int64."""
    return torch.arange(grid.num_patches, device=device).expand(batch_size, -1)


def to_mask(visible_idx: Tensor, num_patches: int) -> Tensor:
    """The paper's mask M as booleans: visible_idx (B, S) int64 → (B, N) bool, True = masked (removed).

    Source: MaskDM, section 3.2.
    """
    mask = torch.ones(visible_idx.shape[0], num_patches, dtype=torch.bool, device=visible_idx.device)
    return mask.scatter(1, visible_idx, False)


def _patch_order(batch_size: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Patches in a uniformly random order: (B, N)."""
    return _uniform(batch_size, grid.num_patches, generator).argsort(dim=1)


def _block_order(batch_size: int, block_size: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Patches block by block, the blocks in random order: (B, N).

    Inside a block the order is random too, so that in the last block, of which only some patches are visible, each
    patch is equally likely to be; P(visible) = S/N for every patch when the blocks tile the grid. At the border of a
    grid that block_size does not divide, blocks are narrower.
    """
    block_of_patch, num_blocks = _blocks(block_size, grid, generator.device)
    block_rank = _uniform(batch_size, num_blocks, generator).argsort(dim=1).argsort(dim=1)  # (B, blocks)
    within = _uniform(batch_size, grid.num_patches, generator)
    return (block_rank[:, block_of_patch].double() + within).argsort(dim=1)  # (B, N)


def _blocks(block_size: int, grid: Grid, device: torch.device) -> tuple[Tensor, int]:
    """The block of each patch, (N,), and the number of blocks."""
    blocks_across = -(-grid.cols // block_size)
    row = torch.arange(grid.rows, device=device) // block_size
    col = torch.arange(grid.cols, device=device) // block_size
    block_of_patch = (row[:, None] * blocks_across + col[None, :]).flatten()
    return block_of_patch, -(-grid.rows // block_size) * blocks_across


def _draw_window(batch_size: int, window: tuple[int, int], grid: Grid, generator: torch.Generator) -> Tensor:
    """One window of h×w patches per image, uniform over all positions in the grid: (B, h·w).

    Patches at the border are in fewer windows than those in the middle, as in the paper.
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
