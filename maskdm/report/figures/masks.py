"""What pretraining sees: an example of each arm's mask, drawn as training draws it."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from maskdm.config import Params
from maskdm.report.figures.kind import Kind, Shown
from maskdm.report.figures.pixels import GAP, PAGE_PIXELS, as_color, enlarged, lay_out, reduced
from maskdm.report.looks import short
from maskdm.report.numbers import rate_text

EXAMPLES = 2
MIN_PIXELS = 192  # along an example's side: seven fit on the page
MAX_PIXELS = 456  # three
SEED = 0
MASKED, STRIPE, LINE = (186, 186, 186), (160, 160, 160), (213, 94, 0)
LINE_WEIGHT = 0.6  # of the image under a line there remains the rest
STRIPE_EVERY = 8  # pixels


def _draw(shown: Shown) -> Figure:
    images = [_fitted(image) for image in as_color(_examples(shown.results.real))]
    panels = [("real images", _stacked([_with_grid(image, shown.params) for image in images]))]
    for arm in _masked(shown.params):
        title = f"{short(arm, 15)}\nmasked {rate_text(_rate(shown.params, arm))}"
        masks = draw_masks(shown.params, arm)
        panels.append((title, _stacked([masked_image(i, m) for i, m in zip(images, masks, strict=True)])))
    return lay_out(panels, columns=min(PAGE_PIXELS // (panels[0][1].shape[1] + GAP), 7))


def _masked(params: Params) -> list[str]:
    return [arm for arm, config in params.arms.items() if config.strategy != "none"]


def _rate(params: Params, arm: str) -> float:
    return params.realised_mask_rate_of(arm)


def _examples(real: np.ndarray) -> np.ndarray:
    """Some of the real images, apart from each other: neighbours may be of one class."""
    return real[np.linspace(0, len(real) - 1, EXAMPLES + 2).astype(int)[1:-1]]


def _fitted(image: np.ndarray) -> np.ndarray:
    """Enlarged to `MIN_PIXELS` or a little less, or reduced to `MAX_PIXELS`."""
    size = max(image.shape[:2])
    return reduced(image, -(-size // MAX_PIXELS)) if size > MAX_PIXELS else enlarged(image, max(MIN_PIXELS // size, 1))


def draw_masks(params: Params, arm: str) -> np.ndarray:
    """Masks of an arm's pretraining for the examples, from a generator of their own.

    Returns:
        (EXAMPLES, rows, cols) bool, True = masked.
    """
    # torch takes seconds to import, and nothing else here needs it.
    import torch

    from maskdm.method.masks import Masking, to_mask

    config, grid = params.arm(arm), params.grid
    masking = Masking(config.strategy, grid, config.mask_rate or 0.0, config.block_size)
    visible = masking.draw(EXAMPLES, torch.Generator().manual_seed(SEED))
    return to_mask(visible, grid.num_patches).reshape(EXAMPLES, *grid).numpy()


def masked_image(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) with its masked patches greyed out, and the lines of the patch grid."""
    rows, cols = _patch_of_pixel(image, mask.shape)
    height, width = np.indices(image.shape[:2])
    is_stripe = np.less((height + width) % STRIPE_EVERY, 2)
    grey = np.where(is_stripe[..., None], STRIPE, MASKED).astype(np.uint8)
    return _lined(np.where(mask[rows[:, None], cols[None, :], None], grey, image), rows, cols)


def _patch_of_pixel(image: np.ndarray, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The patch row of every row of pixels, and the patch column of every column."""
    rows, cols = (np.arange(size) * count // size for size, count in zip(image.shape[:2], grid, strict=False))
    return rows, cols


def _lined(image: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    is_line = np.zeros(image.shape[:2], dtype=bool)
    is_line[np.flatnonzero(np.diff(rows)) + 1] = True
    is_line[:, np.flatnonzero(np.diff(cols)) + 1] = True
    mixed = LINE_WEIGHT * np.array(LINE) + (1 - LINE_WEIGHT) * image
    return np.where(is_line[..., None], mixed.round().astype(np.uint8), image)


def _with_grid(image: np.ndarray, params: Params) -> np.ndarray:
    return _lined(image, *_patch_of_pixel(image, params.grid))


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    gap = np.full((GAP // 2, images[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, gap)][:-1])


def _caption(shown: Shown) -> str:
    grid, size = shown.params.grid, shown.params.model.patch_size
    elsewhere = any(shown.params.pretrain_of(arm).dataset for arm in _masked(shown.params))
    return (
        f"Two real images in patches of {size}×{size} pixels ({grid.rows}×{grid.cols} of them), and what each arm's "
        f"pretraining {'would see' if elsewhere else 'sees'} of them{', were they its data' if elsewhere else ''}; "
        "striped grey is masked. Every step draws anew. The rate is the one that the grid gives."
    )


def _alt(shown: Shown) -> str:
    rates = (f"{arm} masks {_rate(shown.params, arm):.0%}" for arm in _masked(shown.params))
    return f"Two images with the masked patches greyed out, for every arm: {', '.join(rates)}."


MASKS = Kind("masks.png", "An example of each mask", _draw, _caption, _alt, lambda shown: bool(_masked(shown.params)))
