"""What is timed: real pieces of a training step and of sampling, on random data, a few seconds in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import torch

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches, Images
from maskdm.method.backbones.building import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import Diffusion, draw_step, masked_dsm_loss
from maskdm.method.masks import Masking
from maskdm.method.sampling import on_images
from maskdm.plan.store import Measurement
from maskdm.training.devices import Compute
from maskdm.training.memory import NUM_CLASSES
from maskdm.training.optimizer import Ema, clip_gradients, make_optimizer

SYNTHETIC_IMAGES = 8192  # in memory, where no dataset is prepared
MAX_REPETITIONS = 50


class Bench:
    """Builds what a stage builds, once, and times its pieces.

    Args:
        params: the experiment.
        compute: device, threads and precision, as stages resolve them.
        seconds: how long one measurement may go on after its first, untimed call.
    """

    def __init__(self, params: Params, compute: Compute, seconds: float) -> None:
        self._params, self._compute, self._seconds = params, compute, seconds
        pretraining = [params.for_pretraining(arm) for arm in params.arms]
        self._largest = max([params, *pretraining], key=lambda p: p.grid.num_patches)
        self._generator = torch.Generator(compute.device).manual_seed(0)

    def step(self, num_images: int, num_visible: int) -> Measurement:
        """Draws, loss and backward of a (micro-)batch of images with so many visible patches."""
        params, (height, width, channels) = self._largest, self._largest.dataset.shape
        config = params.diffusion
        diffusion = Diffusion(config.num_timesteps, config.schedule, config.prediction, self._compute.device)
        masking = _masking(params, num_visible)
        x_0 = torch.rand(num_images, channels, height, width, device=self._compute.device)
        labels = torch.zeros(num_images, dtype=torch.int64, device=self._compute.device)

        def run() -> None:
            self._model.zero_grad()
            draws = draw_step(
                num_images, params.patch_dim, masking, config.num_timesteps, params.training.flip, self._generator
            )
            with self._compute.context():
                loss = masked_dsm_loss(self._model, diffusion, x_0, draws, params.model.patch_size, labels)
            loss.backward()

        return self._time(run)

    def update(self) -> Measurement:
        """Clipping, AdamW and the average of the weights."""
        training = self._params.training
        model, parameters = self._model, list(self._model.parameters())
        optimizer, ema = make_optimizer(model, training, self._params.finetune.lr), Ema(model, training.ema_decay)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)

        def run() -> None:
            clip_gradients(parameters, training.grad_clip)
            optimizer.step()
            ema.update(0)

        return self._time(run)

    def gather(self, batch_size: int) -> Measurement:
        """Getting a batch of images from the dataset to the device; where several are made together, a share of it."""
        batches = Batches(self._images, batch_size, 0, "plan", self._compute.device)
        together = batches.steps_at_once
        steps = iter(range(0, 10**9, together))
        measured = self._time(lambda: batches(next(steps)))
        return replace(measured, value=measured.value / together)

    def evaluation(self, num_images: int) -> Measurement:
        """One evaluation of the network while sampling."""
        params, device = self._params, self._compute.device
        height, width, channels = params.dataset.shape
        t, labels = torch.zeros(2, num_images, dtype=torch.int64, device=device)
        predict = on_images(self._model, params.model.patch_size, params.grid, labels)
        x_t = torch.rand(num_images, channels, height, width, device=device)
        with self._compute.context(), torch.inference_mode():
            return self._time(lambda: predict(x_t, t))

    @cached_property
    def _model(self) -> UViT:
        return build_model(self._largest, NUM_CLASSES).to(self._compute.device)

    @cached_property
    def _images(self) -> Images:
        shape = (SYNTHETIC_IMAGES, *self._params.dataset.shape)
        return open_images(self._params) or _Zeros(np.zeros(shape, dtype=np.uint8))

    def _time(self, run: Callable[[], object]) -> Measurement:
        """Once untimed, then again and again until the time is up."""
        run()
        self._wait()
        seconds: list[float] = []
        while not seconds or (sum(seconds) < self._seconds and len(seconds) < MAX_REPETITIONS):
            started = time.perf_counter()
            run()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return Measurement(*_typical(seconds), datetime.now(UTC).date().isoformat())

    def _wait(self) -> None:
        if self._compute.device.type == "cuda":
            torch.cuda.synchronize(self._compute.device)


def open_images(params: Params) -> ImageArrays | None:
    """The prepared dataset, if it is there and of the params' shape."""
    try:
        images = ImageArrays.open(paths.DATA)
    except UserError:
        return None
    return images if images.shape == params.dataset.shape else None


class _Zeros:
    """Images in memory, as `Batches` wants them."""

    labels: np.ndarray | None = None

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self._pixels.shape
        return height, width, channels

    def gather(self, indices: np.ndarray) -> np.ndarray:
        return self._pixels[indices]


def _masking(params: Params, num_visible: int) -> Masking:
    """A mask that leaves so many patches; how they are drawn costs next to nothing."""
    num_patches = params.grid.num_patches
    if num_visible == num_patches:
        return Masking("none", params.grid)
    return Masking("patch", params.grid, 1 - num_visible / num_patches)


def _typical(seconds: list[float]) -> tuple[float, float]:
    """The lower quartile, as other work on the machine only ever adds, and half the middle half's width as a share."""
    ranked, count = sorted(seconds), len(seconds)
    low, high = ranked[count // 4], ranked[3 * count // 4]
    return low, round((high - low) / 2 / low, 3)
