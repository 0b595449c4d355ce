"""`data`: the loader against PIL behind a DataLoader, and the share of a step that is spent waiting for data."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import CELEBA, RATES, SHAPES, Shape
from benchmarks.steps import StepMaker, Steps
from benchmarks.timing import Spread, Task, interleave, looped
from maskdm.config import Params, parse_params
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches, to_model_range
from maskdm.data.prepare import prepare

NUM_IMAGES, QUICK_IMAGES = 4096, 256
NUM_WORKERS = 2
WAIT_SECONDS = 0.4  # of training steps, at least, behind a share of waiting
TARGETS = {
    name: Target(f"{name}: share of a step spent waiting for data, the largest over rates", None, 0.02)
    for name in SHAPES
}


def run(settings: Settings) -> Outcome:
    """Measure the loader, then waiting in real steps."""
    shares = {shape.name: _waiting(shape, settings) for shape in settings.shapes}
    rows: list[dict[str, Cell]] = [
        {"shape": name, "mask rate": rate, "share of a step": share}
        for name, by_rate in shares.items()
        for rate, share in by_rate.items()
    ]
    note = "counted by the training loop's own clock over real steps, from arrays on disk as `prepare` writes them"
    tables = [_loaders(settings), Table("waiting for data in training steps", rows, note)]
    targets = [
        TARGETS[name].measured(max(share.median for share in by_rate.values())) for name, by_rate in shares.items()
    ]
    return Outcome(tables, targets)


def write_jpegs(folder: Path, num_images: int, side: int) -> Path:
    """Random images, smooth as photographs are, as JPEG files.

    Args:
        folder: gets them; made.
        num_images: how many.
        side: in pixels.
    """
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for i in range(num_images):
        coarse = Image.fromarray(numbers.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.jpg", quality=90)
    return folder


def folder_params(root: Path, side: int, threads: int, limit: int | None = None) -> Params:
    """An experiment on a folder of images.

    Args:
        root: the folder.
        side: in pixels.
        threads: of decoding.
        limit: use only the first so many images.
    """
    content = CELEBA.params(0.0, threads).model_dump(mode="json", exclude_unset=True)
    content["dataset"] = {"source": "image_folder", "root": str(root), "image_size": side, "channels": 3}
    return parse_params(content if limit is None else {**content, "dataset": {**content["dataset"], "limit": limit}})


class Decoded(Dataset[Tensor]):
    """Image files, decoded whenever they are asked for: what is usual.

    Args:
        files: of equal size.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._files[index]) as image:
            pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels)


def _loaders(settings: Settings) -> Table:
    side, batch = CELEBA.image_size, 128
    num_images = QUICK_IMAGES if settings.is_quick else NUM_IMAGES
    jpegs = write_jpegs(settings.folder / "jpegs", num_images, side)
    started = time.perf_counter()
    prepare(folder_params(jpegs, side, settings.threads), settings.folder / "prepared")
    prepared_in = time.perf_counter() - started
    batches = Batches(ImageArrays.open(settings.folder / "prepared"), batch, 0, "benchmark", settings.device)
    loader = DataLoader(
        Decoded(sorted(jpegs.iterdir())),
        batch,
        shuffle=True,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    tasks = {
        "maskdm": Task(looped(lambda: [batches(step) for step in range(num_images // batch)]), least_seconds=0.2),
        "DataLoader": Task(looped(lambda: [to_model_range(images).to(settings.device) for images in loader])),
    }
    rounds = interleave(tasks, settings.rounds, "data")
    rows: list[dict[str, Cell]] = [
        {
            "what": what,
            "images/s": rounds.rate(name, num_images),
            "over the DataLoader": rounds.ratio("DataLoader", name),
        }
        for name, what in (
            ("maskdm", "maskdm.data.batches.Batches"),
            ("DataLoader", f"PIL, DataLoader with {NUM_WORKERS} workers"),
        )
    ]
    title = f"{num_images} JPEGs of {side}×{side}, batches of {batch}"
    return Table(title, rows, f"preparing them, once: {num_images / prepared_in:,.0f} images/s")


def _waiting(shape: Shape, settings: Settings) -> dict[float, Spread]:
    """Mask rate → the share of a step spent waiting, one for every round; the rates take turns."""
    steps = {rate: StepMaker(shape, settings).steps(rate) for rate in RATES}
    num_steps, shares = dict[float, int](), dict[float, list[float]]()
    for rate, own in steps.items():
        own.run(1)
        num_steps[rate] = 1 if settings.is_quick else math.ceil(WAIT_SECONDS / own.run(1))
        shares[rate] = []
    for _ in range(settings.rounds):
        for rate, own in steps.items():
            shares[rate].append(_share_of_waiting(own, num_steps[rate]))
    return {rate: Spread(tuple(of_rate)) for rate, of_rate in shares.items()}


def _share_of_waiting(steps: Steps, num_steps: int) -> float:
    before = steps.waited
    seconds = steps.run(num_steps)
    return (steps.waited - before) / seconds
