"""How many patches a mask leaves visible: plain arithmetic without torch, for the schema and for the masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Strategy = Literal["none", "patch", "block", "crop"]
WITH_BLOCKS: tuple[Strategy, ...] = ("block",)  # these need block_size, the side of a block in patches


class Grid(NamedTuple):
    """The token grid: an image of (rows·p) × (cols·p) pixels is divided into patches of p × p pixels."""

    rows: int
    cols: int

    @property
    def num_patches(self) -> int:
        """N = rows × cols."""
        return self.rows * self.cols


class VisibleShape(NamedTuple):
    """What a mask leaves visible: S patches, and for `crop` the (height, width) of their window in patches."""

    num_visible: int
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Mask:
    """What is known of a mask before it is drawn (`maskdm.method.masks` draws it).

    Args:
        strategy: `patch` masks patches uniformly at random, `block` masks blocks of block_size × block_size patches,
            `crop` leaves one window visible, `none` masks nothing.
        grid: the token grid.
        mask_rate: the paper's m, in [0, 1).
        block_size: the side of a block in patches; only for `block`.

    Raises:
        ValueError: the mask is not possible on this grid (see `visible_shape`).
    """

    strategy: Strategy
    grid: Grid
    mask_rate: float = 0.0
    block_size: int | None = None

    def __post_init__(self) -> None:
        _ = self.visible

    @cached_property
    def visible(self) -> VisibleShape:
        """S, and the window if the strategy is `crop`."""
        return visible_shape(self.strategy, self.mask_rate, self.grid, self.block_size)

    @property
    def num_visible(self) -> int:
        """S, the number of visible patches of every image."""
        return self.visible.num_visible

    @property
    def realised_mask_rate(self) -> float:
        """1 − S/N, the mask rate that is possible on this grid."""
        return 1.0 - self.num_visible / self.grid.num_patches


def visible_shape(strategy: Strategy, mask_rate: float, grid: Grid, block_size: int | None = None) -> VisibleShape:
    """The number S of visible patches for a requested mask rate.

    `patch` and `block` leave exactly round((1 − m)·N) patches visible; `block` cuts its last block for that. `crop`
    considers the windows with the aspect ratio of the grid (to within one patch) and takes the one whose area is
    nearest to that number.

    Args:
        strategy: how the mask is drawn; `none` leaves all patches visible.
        mask_rate: the paper's m, in [0, 1).
        grid: the token grid.
        block_size: the side of a block in patches; only for `block`.

    Raises:
        ValueError: the rate is outside [0, 1), leaves no patch visible, is positive but masks no patch, or the block
            does not fit on the grid.

    Source: MaskDM (arXiv 2306.11363), section 3.2; m = 1 − S/N.
    Differs: the authors' code masks ⌊m·N⌋ patches (231 of 256 are visible at 0.1, here 230), crops to squares (11×11
    at 0.5; here 11×12, which is nearer) and never cuts blocks, so that "10 %" of 4×4 blocks masks 6.25 %.
    """
    if not 0.0 <= mask_rate < 1.0:
        raise ValueError(f"mask_rate {mask_rate} is outside [0, 1)")
    if strategy == "none":
        return VisibleShape(grid.num_patches)
    num_visible = round((1.0 - mask_rate) * grid.num_patches)
    if num_visible < 1:
        raise ValueError(
            f"mask_rate {mask_rate} leaves no patch visible on a {grid.rows}×{grid.cols} grid; "
            f"the highest possible is {1 - 1 / grid.num_patches:.4g}"
        )
    if strategy in WITH_BLOCKS and (block_size is None or block_size < 1):
        raise ValueError(f"strategy {strategy!r} needs block_size ≥ 1 (in patches), got {block_size}")
    if strategy in WITH_BLOCKS and block_size is not None and block_size > min(grid):
        raise ValueError(f"block_size {block_size} is larger than the {grid.rows}×{grid.cols} token grid")
    shape = _crop_window(num_visible, grid) if strategy == "crop" else VisibleShape(num_visible)
    if mask_rate > 0 and shape.num_visible == grid.num_patches:
        raise ValueError(f"mask_rate {mask_rate} masks nothing on a {grid.rows}×{grid.cols} grid with {strategy}")
    return shape


def _crop_window(num_visible: int, grid: Grid) -> VisibleShape:
    windows = [
        (h, w)
        for h in range(1, grid.rows + 1)
        for w in range(1, grid.cols + 1)
        if abs(h * grid.cols - w * grid.rows) <= max(grid)  # the aspect ratio of the grid, to within one patch
    ]
    # The nearest area; among equals a window that masks something, then the squarer, the larger, the wider one.
    h, w = min(
        windows,
        key=lambda s: (abs(s[0] * s[1] - num_visible), s == tuple(grid), abs(s[0] - s[1]), -s[0] * s[1], s[0]),
    )
    assert abs(h * w - num_visible) <= max(h, w), "every area is within one row of a window"
    return VisibleShape(h * w, (h, w))
