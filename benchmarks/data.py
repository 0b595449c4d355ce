"""`data`: the loader against PIL behind a DataLoader, and the share of a step that is spent waiting for data."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import CELEBA, RATES, Shape
from benchmarks.steps import StepMaker
from benchmarks.timing import Task, interleave, looped
from maskdm.config import Params, parse_params
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches, to_model_range
from maskdm.data.prepare import prepare

NUM_IMAGES, QUICK_IMAGES = 4096, 256
NUM_WORKERS = 2
MOST_WAITING = 0.02
WAIT_SECONDS = 2.0  # of training steps, at least, behind a share of waiting


def run(settings: Settings) -> Outcome:
    """Measure the loader, then waiting in real steps."""
    waiting = [row for shape in settings.shapes for row in _waiting(shape, settings)]
    note = "counted by the training loop's own clock over real steps, from arrays on disk as `prepare` writes them"
    tables = [_loaders(settings), Table("waiting for data in training steps", waiting, note)]
    targets = [
        Target(f"{row['shape']}: share of a step spent waiting for data, at most over rates", share, MOST_WAITING)
        for row, share in _longest(waiting)
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


def _waiting(shape: Shape, settings: Settings) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for rate in RATES:
        steps = StepMaker(shape, settings).steps(rate)
        steps.run(1)
        num_steps = 1 if settings.is_quick else max(2, round(WAIT_SECONDS / steps.run(1)))
        before = steps.waited
        seconds = steps.run(num_steps)
        share = (steps.waited - before) / seconds
        rows.append({"shape": shape.name, "mask rate": rate, "steps": num_steps, "share of a step": share})
    return rows


def _longest(rows: list[dict[str, Cell]]) -> list[tuple[dict[str, Cell], float]]:
    """Of every shape the row with the largest share, and the share."""
    by_shape: dict[Cell, list[dict[str, Cell]]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"], []).append(row)
    longest = [max(own, key=_share) for own in by_shape.values()]
    return [(row, _share(row)) for row in longest]


def _share(row: dict[str, Cell]) -> float:
    share = row["share of a step"]
    assert isinstance(share, float), "it is a plain number"
    return share
