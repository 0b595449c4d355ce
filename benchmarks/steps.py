"""Real training steps, as the stages make them: `maskdm.training.loop.train`, all of it, on random images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.settings import Settings
from benchmarks.shapes import Shape, arm_of
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
    """A training that goes on for as many steps as it is asked for.

    Args:
        params: with the one arm.
        images: the dataset.
        folder: for the trainer; nothing is written.

    Attributes:
        flops: of a step, forward and backward.
        num_visible: S.
    """

    def __init__(self, params: Params, images: ImageArrays, folder: Path) -> None:
        self._run = _training(params)
        self.flops, self.num_visible = self._run.flops_per_step, self._run.num_visible
        self.trainer = Trainer(self._run, images, folder)

    def run(self, num_steps: int) -> float:
        """Make steps; the seconds that the training loop's own clock has counted."""
        state, trainer = self.trainer.state, self.trainer
        before = state.device_seconds
        run = replace(self._run, num_steps=state.step + num_steps)
        train(state, trainer.batches, Objective(state.model, run, trainer.compute), Watcher())
        return state.device_seconds - before

    def update(self) -> None:
        """What ends a step, alone: clipping, AdamW and the average of the weights."""
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
    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.trainer.state.data_wait_seconds


@dataclass(frozen=True)
class StepMaker:
    """Makes `Steps` of a shape.

    Attributes:
        shape: images, network and batch.
        settings: device and threads.
        grad_clip: as in params.yaml.
        num_images: of the random data set.
    """

    shape: Shape
    settings: Settings
    grad_clip: float | None = None
    num_images: int = NUM_IMAGES

    def steps(
        self, mask_rate: float, precision: str = "auto", device_resident: bool | str = "auto", **compute: Any
    ) -> Steps:
        """Steps at a mask rate.

        Args:
            mask_rate: 0 is finetuning.
            precision: `fp32`, `bf16` or the best.
            device_resident: as in params.yaml.
            compute: other knobs of the section `compute`.
        """
        settings = self.settings
        compute = {"device": settings.device.type, "precision": precision, **compute}
        params = self.shape.params(mask_rate, settings.threads, self.grad_clip, device_resident, **compute)
        return Steps(params, self.images(), settings.folder)

    def task(self, steps: Steps) -> Task:
        """A step as something to be timed."""
        return Task(steps.run, self.settings.step_seconds)

    def images(self) -> ImageArrays:
        """Random images of the shape, written once."""
        return random_arrays(self.settings.folder, self.shape.image_size, self.shape.channels, self.num_images)


def random_arrays(folder: Path, image_size: int, channels: int, num_images: int) -> ImageArrays:
    """A dataset of random images on disk, as `prepare` writes it; made where it is not there."""
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
    """The one arm's only stage that matters: finetuning of `scratch`, else pretraining."""
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
