"""Images laid out pixel by pixel, for resampling would blur what is compared: samples of all arms, and their masks."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from maskdm.config import Params
from maskdm.report.comparison import Findings
from maskdm.report.figures.axes import Kind
from maskdm.report.figures.looks import DPI, WIDTH, short
from maskdm.report.numbers import rate_text, score_text
from maskdm.report.results import milestone_key
from maskdm.scoring.headline import flat_scores

GAP = 12  # pixels between panels
LINE_HEIGHT = 25  # pixels of a line of a title of 8 points
PAGE_PIXELS = round(WIDTH * DPI)
# Samples
COLUMNS = 4
PANEL_PIXELS = 336
IMAGE_GAP = 4
# Masks
EXAMPLES = 2
MIN_PIXELS = 192  # along an example's side: seven fit on the page
MAX_PIXELS = 456  # three
MASKED, STRIPE, LINE = (186, 186, 186), (160, 160, 160), (213, 94, 0)
LINE_WEIGHT = 0.6  # of the image under a line there remains the rest
STRIPE_EVERY = 8  # pixels


def lay_out(panels: list[tuple[str, np.ndarray]], columns: int) -> Figure:
    """Panels with titles (one or two lines) in rows, on the page's width, or wider where they need it.

    Args:
        panels: titles, and images (H, W, 3) uint8.
        columns: panels in a row.
    """
    height, width = (max(picture.shape[axis] for _, picture in panels) for axis in (0, 1))
    rows, title = math.ceil(len(panels) / columns), LINE_HEIGHT * max(t.count("\n") + 1 for t, _ in panels) + 8
    gap = max((PAGE_PIXELS - columns * width) // (columns + 1), GAP)
    total = max(columns * (width + gap) + gap, PAGE_PIXELS), rows * (height + title + GAP)
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI))
    for index, (name, picture) in enumerate(panels):
        left = gap + (index % columns) * (width + gap)
        top = title + (index // columns) * (height + title + GAP)
        high, wide = picture.shape[:2]
        axes = figure.add_axes((left / total[0], 1 - (top + high) / total[1], wide / total[0], high / total[1]))
        axes.imshow(picture, interpolation="none", aspect="auto")
        axes.set_axis_off()
        # Line by line: a text of two lines stands lower or higher by its letters.
        for up, line in enumerate(reversed(name.split("\n"))):
            figure.text(left / total[0], 1 - (top - 8 - up * LINE_HEIGHT) / total[1], line, fontsize=8)
    return figure


def _as_color(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 1 or 3) as (N, H, W, 3)."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel of (H, W, …) a square of factor × factor."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _reduced(image: np.ndarray, factor: int) -> np.ndarray:
    """Squares of factor × factor pixels of (H, W, 3) averaged; what is left over at the edges is cut."""
    height, width = (side // factor for side in image.shape[:2])
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def _draw_samples(found: Findings) -> Figure:
    """The real images, and of every arm those of the first seed that it has."""
    last, headline = milestone_key(found.params.budget.milestones[-1]), found.headline
    panels = {"": ("real images", found.results.real)}
    for run in found.results.runs:
        score = headline.times * flat_scores(run.metrics["milestones"][last])[headline.key]
        seed = "" if run.seed == found.params.seeds[0] else f" (seed {run.seed})"
        title = f"{short(run.arm, 26)}\n{headline.label} {score_text(score)}{seed}"
        panels.setdefault(run.arm, (title, run.samples))
    width = found.params.dataset.width
    cells = 8 if width <= 16 else 5 if width <= 64 else 4
    side = min(cells, *(math.isqrt(len(images)) for _, images in panels.values()))
    return lay_out([(title, image_grid(images, side)) for title, images in panels.values()], COLUMNS)


def image_grid(images: np.ndarray, side: int) -> np.ndarray:
    """The first side² images as one picture of about `PANEL_PIXELS`, enlarged by nearest neighbour.

    Args:
        images: (N, H, W, C) uint8, N ≥ side².
        side: images along each side.

    Returns:
        (height, width, 3) uint8, images one gap apart on white.
    """
    size = max(images.shape[1:3])
    space = (PANEL_PIXELS + IMAGE_GAP) // side - IMAGE_GAP
    edge = ((0, IMAGE_GAP), (0, IMAGE_GAP), (0, 0))
    cells = []
    for image in _as_color(images[: side**2]):
        scaled = _enlarged(image, space // size) if space >= size else _reduced(image, math.ceil(size / space))
        cells.append(np.pad(scaled, edge, constant_values=255))
    rows = [np.concatenate(cells[row * side : (row + 1) * side], axis=1) for row in range(side)]
    return np.concatenate(rows)[:-IMAGE_GAP, :-IMAGE_GAP]


def _samples_caption(found: Findings) -> str:
    return (
        f"Real images, and samples at the end of the budget, seed {found.params.seeds[0]}: the same cell holds the "
        "same image seed in every arm; none was selected. Scores are those of this seed."
    )


def _draw_masks(found: Findings) -> Figure:
    """Two images apart from each other, for neighbours may be of one class; and with the masks of every arm."""
    params, real, images = found.params, found.results.real, []
    for image in _as_color(real[np.linspace(0, len(real) - 1, EXAMPLES + 2).astype(int)[1:-1]]):
        size = max(image.shape[:2])
        larger, smaller = max(MIN_PIXELS // size, 1), math.ceil(size / MAX_PIXELS)
        images.append(_enlarged(image, larger) if smaller == 1 else _reduced(image, smaller))
    panels = [("real images", [masked_image(image, np.zeros(params.grid, dtype=bool)) for image in images])]
    for arm in found.masked:
        title = f"{short(arm, 15)}\nmasked {rate_text(params.mask_of(arm).realised_mask_rate)}"
        masks = draw_masks(params, arm)
        panels.append((title, [masked_image(image, mask) for image, mask in zip(images, masks, strict=True)]))
    gap = np.full((GAP // 2, images[0].shape[1], 3), 255, np.uint8)
    stacked = [(title, np.concatenate([part for i in pair for part in (i, gap)][:-1])) for title, pair in panels]
    return lay_out(stacked, columns=min(PAGE_PIXELS // (images[0].shape[1] + GAP), 7))


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
    visible = masking.draw(EXAMPLES, torch.Generator().manual_seed(0))
    return to_mask(visible, grid.num_patches).reshape(EXAMPLES, *grid).numpy()


def masked_image(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) with its masked patches (rows, cols) greyed out, and the lines of the patch grid."""
    height, width = image.shape[:2]
    row_of, col_of = (np.arange(size) * count // size for size, count in zip((height, width), mask.shape, strict=True))
    is_stripe = np.less(np.indices((height, width)).sum(axis=0) % STRIPE_EVERY, 2)
    grey = np.where(is_stripe[..., None], STRIPE, MASKED).astype(np.uint8)
    seen = np.where(mask[row_of[:, None], col_of[None, :], None], grey, image)
    is_line = np.zeros((height, width), dtype=bool)
    is_line[np.flatnonzero(np.diff(row_of)) + 1] = True
    is_line[:, np.flatnonzero(np.diff(col_of)) + 1] = True
    mixed = LINE_WEIGHT * np.array(LINE) + (1 - LINE_WEIGHT) * seen
    return np.where(is_line[..., None], mixed.round().astype(np.uint8), seen)


def _masks_caption(found: Findings) -> str:
    grid, size = found.params.grid, found.params.model.patch_size
    elsewhere = any(found.params.pretrain_of(arm).dataset for arm in found.masked)
    return (
        f"Two real images in patches of {size}×{size} pixels ({grid.rows}×{grid.cols} of them), and what each arm's "
        f"pretraining {'would see' if elsewhere else 'sees'} of them{', were they its data' if elsewhere else ''}; "
        "striped grey is masked. Every step draws anew. The rate is the one that the grid gives."
    )


def _masks_alt(found: Findings) -> str:
    rates = (f"{arm} masks {found.params.mask_of(arm).realised_mask_rate:.0%}" for arm in found.masked)
    return f"Two images with the masked patches greyed out, for every arm: {', '.join(rates)}."


SAMPLES = Kind(
    "samples.png",
    "Samples of every arm from the same seeds",
    _draw_samples,
    _samples_caption,
    lambda found: f"Grids of real images and of samples of {', '.join(found.arms)}.",
    has_scores=True,
)
MASKS = Kind(
    "masks.png", "An example of each mask", _draw_masks, _masks_caption, _masks_alt, lambda found: bool(found.masked)
)
