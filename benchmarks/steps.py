"""Real training steps, as the stages make them: all of `maskdm.training.loop.train`, on random images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import Settings, Shape, arm_of
from benchmarks.timing import Task
from maskdm.config import Params, Training
from maskdm.data.arrays import ImageArrays, ShardWriter
from maskdm.training.loop import Watcher, train
from maskdm.training.objective import Objective
from maskdm.training.optimizer import clip_gradients
from maskdm.training.trainer import Trainer

NUM_IMAGES = 2048
SEED = 0


class Steps:
    """A training run that continues for as many steps as requested.

    Args:
        params: an experiment with one arm.
        images: the dataset.
        folder: for the trainer; nothing is written.

    Attributes:
        flops: FLOPs of a step, forward and backward.
        num_visible: S, the patches of an image that enter the network.
    """

    def __init__(self, params: Params, images: ImageArrays, folder: Path) -> None:
        self._run = _training(params)
        self.flops, self.num_visible = self._run.flops_per_step, self._run.num_visible
        self.trainer = Trainer(self._run, images, folder)

    def run(self, num_steps: int) -> float:
        """Make steps; returns the seconds by the training loop's own clock."""
        state, trainer = self.trainer.state, self.trainer
        before = state.device_seconds
        run = replace(self._run, num_steps=state.step + num_steps)
        train(state, trainer.batches, Objective(state.model, run, trainer.compute), Watcher())
        return state.device_seconds - before

    def update(self) -> None:
        """The end of a step alone: clipping, AdamW and the average of the weights."""
        state = self.trainer.state
        clip_gradients(state.model.parameters(), self._run.params.training.grad_clip)
        state.optimizer.step()
        assert state.ema is not None, "one process averages weights"
        state.ema.update(state.step)

    def fill_gradients(self) -> None:
        """Give every weight a gradient, for `update`."""
        for parameter in self.trainer.state.model.parameters():
            parameter.grad = parameter.detach().clone()

    @property
    def waiting_share(self) -> float:
        """The fraction of all steps' time so far that was spent waiting for data."""
        state = self.trainer.state
        return state.data_wait_seconds / state.device_seconds


def make_steps(
    shape: Shape,
    settings: Settings,
    mask_rate: float,
    precision: str = "auto",
    grad_clip: float | None = None,
    device_resident: bool | str = "auto",
    num_images: int = NUM_IMAGES,
    **compute: Any,
) -> Steps:
    """Training steps of a shape.

    Args:
        shape: images, network and batch.
        settings: device, threads and folder.
        mask_rate: 0 is finetuning.
        precision: `fp32`, `bf16` or `auto`, the fastest.
        grad_clip: as in params.yaml.
        device_resident: as in params.yaml.
        num_images: size of the random dataset.
        compute: other keys of the section `compute`.
    """
    compute = {"device": settings.device.type, "precision": precision, **compute}
    params = shape.params(mask_rate, settings.threads, grad_clip, device_resident, **compute)
    images = random_arrays(settings.folder, shape.image_size, shape.channels, num_images)
    return Steps(params, images, settings.folder)


def step_task(steps: Steps, settings: Settings) -> Task:
    """A training step as a task to time."""
    return Task(steps.run, settings.step_seconds)


def random_arrays(folder: Path, image_size: int, channels: int, num_images: int = NUM_IMAGES) -> ImageArrays:
    """A dataset of random images on disk, as `prepare` writes it; written once."""
    place = folder / f"images-{image_size}-{channels}-{num_images}"
    if not place.exists():
        place.mkdir(parents=True)
        writer = ShardWriter(place, (image_size, image_size, channels), shard_images=num_images)
        numbers = np.random.default_rng(SEED)
        for _ in range(num_images):
            writer.add(numbers.integers(0, 256, (image_size, image_size, channels), dtype=np.uint8))
        writer.finish(None, {}, {}, [])
    return ImageArrays.open(place)


def _training(params: Params) -> Training:
    """The stage to time: finetuning of `scratch`, or pretraining of a masked arm."""
    (arm,) = params.arms
    is_masked = arm != arm_of(0.0)
    return Training(
        stage="pretrain" if is_masked else "finetune",
        params=params,
        arm=arm,
        seed=SEED,
        config=params.pretrain_of(arm) if is_masked else params.finetune_of(arm),
        mask=params.mask_of(arm),
        num_steps=10**9,
    )
