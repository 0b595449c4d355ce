"""Images drawn pixel by pixel, because resampling would blur what is compared: samples of all arms, and masks."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

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
PANELS = 7  # in a row
ENLARGED_PIXELS = 300  # along the longer side of an example that is enlarged, at most
MAX_PIXELS = 456  # of one that is reduced
MASKED, STRIPE, LINE = (186, 186, 186), (160, 160, 160), (213, 94, 0)
LINE_WEIGHT = 0.6  # of a line over the image below it
STRIPE_EVERY = 8  # pixels


def lay_out(panels: list[tuple[str, np.ndarray]], columns: int) -> Figure:
    """Panels with titles of one or two lines, in rows as wide as the page, or wider if the panels need it.

    Args:
        panels: titles, and images (H, W, 3) uint8.
        columns: panels in a row.
    """
    height, width = (max(picture.shape[axis] for _, picture in panels) for axis in (0, 1))
    rows, title = math.ceil(len(panels) / columns), LINE_HEIGHT * max(t.count("\n") + 1 for t, _ in panels) + 8
    gap = max((PAGE_PIXELS - columns * width) // (columns + 1), GAP)
    total = max(columns * (width + gap) + gap, PAGE_PIXELS), rows * (height + title + GAP)
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)
    for index, (name, picture) in enumerate(panels):
        left = gap + (index % columns) * (width + gap)
        top = title + (index // columns) * (height + title + GAP)
        figure.figimage(picture, left, total[1] - top - len(picture), origin="upper")
        # Line by line: a text of two lines would stand lower or higher depending on its letters.
        for up, line in enumerate(reversed(name.split("\n"))):
            figure.text(left / total[0], 1 - (top - 8 - up * LINE_HEIGHT) / total[1], line, fontsize=8)
    return figure


def _sized(image: np.ndarray, enlarged: int, most: int) -> Image.Image:
    """An image (H, W, C) whose pixels are enlarged, or averaged, by a whole factor.

    Args:
        image: uint8, C = 1 or 3.
        enlarged: the longer side is enlarged to at most so many pixels.
        most: pixels of the longer side; above that the image is reduced.
    """
    picture = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    size = max(picture.size)
    if size > most:
        return picture.reduce(math.ceil(size / most))
    factor = max(enlarged // size, 1)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _draw_samples(found: Findings) -> Figure:
    """The real images, and the samples of every arm with the first seed that it has."""
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
    """The first side² images as one picture of about `PANEL_PIXELS`.

    Args:
        images: (N, H, W, C) uint8, N ≥ side².
        side: images along each side.

    Returns:
        (height, width, 3) uint8, images one gap apart on white.
    """
    space = (PANEL_PIXELS + IMAGE_GAP) // side - IMAGE_GAP
    cells = [_sized(image, space, space) for image in images[: side**2]]
    width, height = (length + IMAGE_GAP for length in cells[0].size)
    grid = Image.new("RGB", (side * width - IMAGE_GAP, side * height - IMAGE_GAP), "white")
    for index, cell in enumerate(cells):
        grid.paste(cell, (index % side * width, index // side * height))
    return np.asarray(grid)


def _draw_masks(found: Findings) -> Figure:
    """Two images far apart, because neighbours may be of one class, and what the masks of every arm leave of them."""
    params, real, masked = found.params, found.results.real, found.masked
    enlarged = min(PAGE_PIXELS // min(len(masked) + 1, PANELS) - GAP, ENLARGED_PIXELS)
    examples = real[np.linspace(0, len(real) - 1, EXAMPLES + 2).astype(int)[1:-1]]
    images = [np.asarray(_sized(image, enlarged, MAX_PIXELS)) for image in examples]
    panels = [("real images", np.zeros((EXAMPLES, *params.grid), dtype=bool))]
    for arm in masked:
        rate = rate_text(params.mask_of(arm).realised_mask_rate)
        panels.append((f"{short(arm, 15)}\nmasked {rate}", draw_masks(params, arm)))
    gap = np.full((GAP // 2, images[0].shape[1], 3), 255, np.uint8)
    stacked = []
    for title, masks in panels:
        above, below = (masked_image(image, mask) for image, mask in zip(images, masks, strict=True))
        stacked.append((title, np.concatenate([above, gap, below])))
    return lay_out(stacked, columns=min(PAGE_PIXELS // (images[0].shape[1] + GAP), PANELS, len(stacked)))


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


SAMPLES = Kind("samples.png", _draw_samples, has_scores=True)
MASKS = Kind("masks.png", _draw_masks, lambda found: bool(found.masked))
