"""The loss of a training step, compiled or not, in micro-batches, on one rank or several."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskdm.base import rng
from maskdm.config import Training
from maskdm.data.batches import Batches
from maskdm.method.diffusion import Diffusion, Draws, draw_step, masked_dsm_loss
from maskdm.method.masks import Masking
from maskdm.training.devices import Compute, explain_compiler
from maskdm.training.ranks import ALONE, Ranks

STEPS_TO_RECORD = 3  # before CUDA graphs are replayed


class Objective:
    """The masked denoising score matching loss of a run's steps.

    On one rank the loss of a micro-batch is compiled as a whole. On several the trainer compiles the network block by
    block, so that averaging gradients over the ranks starts with the last block's while the others are computed.

    Args:
        model: the network.
        run: the training stage.
        compute: device, precision, compilation.
        ranks: the processes that share every batch.

    Attributes:
        masked_dsm_loss: (x_0, draws, labels=…) → the mean loss of a micro-batch, a scalar.
        micro_batches: slices of this rank's rows of a batch; each enters the network at once.
        share: the fraction of this rank's rows in a micro-batch.
        keeps_gradients: whether gradients are zeroed rather than freed, because CUDA graphs write to their memory.
    """

    def __init__(self, model: nn.Module, run: Training, compute: Compute, ranks: Ranks = ALONE) -> None:
        self.model, self.run, self.compute, self.ranks = model, run, compute, ranks
        config = run.params.diffusion
        diffusion = Diffusion(config.num_timesteps, config.schedule, config.prediction, compute.device)
        self._masking = Masking(run.mask.strategy, run.grid, run.mask.mask_rate, run.mask.block_size)
        self._generator, self._exchanges = torch.Generator(compute.device), True
        self.keeps_gradients = compute.compile_mode == "reduce-overhead" and ranks.num_ranks == 1
        self._net: Any = ranks.data_parallel(model)
        loss = compute.compiled(masked_dsm_loss) if ranks.num_ranks == 1 else masked_dsm_loss
        self.masked_dsm_loss: Callable[..., Tensor] = partial(
            loss, self._net, diffusion, patch_size=run.params.model.patch_size
        )
        size = run.config.micro_batch_size
        self.micro_batch_size = run.batch_size if size in (None, "auto") else int(size)

    @property
    def micro_batch_size(self) -> int:
        """Images of this rank that enter the network at once; setting it rounds down to a divisor of its rows."""
        return self.micro_batches[0].stop

    @micro_batch_size.setter
    def micro_batch_size(self, size: int) -> None:
        own = self.run.batch_size // self.ranks.num_ranks
        size = max(divisor for divisor in range(1, min(size, own) + 1) if own % divisor == 0)
        self.micro_batches = [slice(start, start + size) for start in range(0, own, size)]
        self.share = size / own

    @property
    def finds_size(self) -> bool:
        """Whether to try which micro-batches fit; only a GPU's out-of-memory error can be caught."""
        return self.run.config.micro_batch_size == "auto" and self.compute.device.type == "cuda"

    def draw(self, step: int) -> Draws:
        """The random draws of a step: made for the whole batch, this rank's rows returned."""
        run, params = self.run, self.run.params
        self._generator.manual_seed(rng.derive_seed(run.seed, run.stage, step))
        num_timesteps, flip = params.diffusion.num_timesteps, params.training.flip
        draws = draw_step(run.batch_size, params.patch_dim, self._masking, num_timesteps, flip, self._generator)
        return draws.chunk(self.ranks.rows(run.batch_size))

    def loss(self, x_0: Tensor, draws: Draws, labels: Tensor | None, part: slice) -> Tensor:
        """The loss of a micro-batch times its share of the batch, a scalar to call `backward` on.

        The backward pass of a batch's last micro-batch averages the gradients over the ranks.

        Args:
            x_0: this rank's images, (B, C, H, W).
            draws: of these images.
            labels: their classes, (B,) int64, or None.
            part: one of `micro_batches`.
        """
        if self.keeps_gradients:
            torch.compiler.cudagraph_mark_step_begin()
        if self.ranks.num_ranks > 1:  # an attribute of DistributedDataParallel
            self._net.require_backward_grad_sync = self._exchanges and part == self.micro_batches[-1]
        own_labels = None if labels is None else labels[part]
        return self.masked_dsm_loss(x_0[part], draws.chunk(part), labels=own_labels) * self.share

    def rehearse(self, step: int, batches: Batches) -> float:
        """Compute the gradients of a step and drop them, to do what happens once before the loop.

        That is finding micro-batches that fit, compiling, and setting up how ranks exchange gradients.

        Returns:
            seconds of compiling; 0 if nothing is compiled.

        Raises:
            UserError: the compiler failed.
            torch.OutOfMemoryError: a single image does not fit into memory.
        """
        is_compiled = self.compute.compile_mode is not None
        if not (is_compiled or self.finds_size or self.ranks.num_ranks > 1):
            return 0.0
        started = time.perf_counter()
        if self.keeps_gradients:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with explain_compiler():
            while self.finds_size and not self.ranks.all_true(self._fits(step, batches)):
                torch.cuda.empty_cache()
                self.micro_batch_size -= 1  # the next smaller divisor
            for _ in range(STEPS_TO_RECORD if self.keeps_gradients else 1):
                self._compute_gradients(step, batches, self.micro_batches)
        return time.perf_counter() - started if is_compiled else 0.0

    def _fits(self, step: int, batches: Batches) -> bool:
        """Whether a micro-batch fits into the device's memory; each rank tries for itself."""
        self._exchanges = False
        try:
            self._compute_gradients(step, batches, self.micro_batches[:1])
        except torch.OutOfMemoryError:
            if self.micro_batch_size == 1:
                raise
            return False
        finally:
            self._exchanges = True
        return True

    def _compute_gradients(self, step: int, batches: Batches, parts: list[slice]) -> None:
        """Compute the gradients of some micro-batches and drop them."""
        (x_0, labels), draws = batches(step), self.draw(step)
        try:
            with self.compute.context():
                for part in parts:
                    self.loss(x_0, draws, labels, part).backward()
        finally:
            self.model.zero_grad(set_to_none=not self.keeps_gradients)
