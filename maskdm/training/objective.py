"""The loss of a training step as it is computed here: compiled or not, in micro-batches, on one rank or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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

    Alone, the loss of a micro-batch is compiled as a whole. On several ranks the network is, block by block, so that
    averaging the gradients can begin with those of the last block.

    Args:
        model: the network.
        run: what is trained.
        compute: device, precision, compilation.
        ranks: that share every batch.

    Attributes:
        masked_dsm_loss: (x_0, draws, labels=…) → the mean loss of a micro-batch, a scalar.
        micro_batches: the rows of this rank's part of a batch that enter the network at once, one slice after another.
        share: of a micro-batch in this rank's part of a batch.
    """

    def __init__(self, model: nn.Module, run: Training, compute: Compute, ranks: Ranks = ALONE) -> None:
        self.model, self.run, self.compute, self.ranks = model, run, compute, ranks
        config = run.params.diffusion
        diffusion = Diffusion(config.num_timesteps, config.schedule, config.prediction, compute.device)
        self._masking = Masking(run.mask.strategy, run.grid, run.mask.mask_rate, run.mask.block_size)
        self._generator = torch.Generator(compute.device)
        self._keeps_gradients = compute.uses_cuda_graphs and ranks.num_ranks == 1
        self._net: Any = ranks.replicated(model)
        loss = compute.compiled(masked_dsm_loss) if ranks.num_ranks == 1 else masked_dsm_loss
        self.masked_dsm_loss: Callable[..., Tensor] = partial(
            loss, self._net, diffusion, patch_size=run.params.model.patch_size
        )
        given = run.config.micro_batch_size
        self.micro_batch_size = run.batch_size // ranks.num_ranks if given in (None, "auto") else int(given)

    @property
    def micro_batch_size(self) -> int:
        """Images of this rank that enter the network at once; rounded down to a divisor of its part of a batch."""
        return self.micro_batches[0].stop

    @micro_batch_size.setter
    def micro_batch_size(self, size: int) -> None:
        own = self.run.batch_size // self.ranks.num_ranks
        size = max(divisor for divisor in range(1, min(size, own) + 1) if own % divisor == 0)
        self.micro_batches = [slice(start, start + size) for start in range(0, own, size)]
        self.share = size / own

    @property
    def finds_size(self) -> bool:
        """Whether to find out which micro-batches fit; only GPUs refuse memory in a way that can be caught."""
        return self.run.config.micro_batch_size == "auto" and self.compute.device.type == "cuda"

    def draw(self, step: int) -> Draws:
        """The draws of a step for this rank's rows, from those of the whole batch."""
        run, params = self.run, self.run.params
        self._generator.manual_seed(rng.derive_seed(run.seed, run.stage, step))
        num_timesteps, flip = params.diffusion.num_timesteps, params.training.flip
        draws = draw_step(run.batch_size, params.patch_dim, self._masking, num_timesteps, flip, self._generator)
        return draws.chunk(self.ranks.part(run.batch_size))

    @contextmanager
    def averaging_gradients(self, part: slice) -> Iterator[None]:
        """Compute the gradients of a micro-batch in the block; those of a batch's last one average over the ranks."""
        if self._keeps_gradients:
            torch.compiler.cudagraph_mark_step_begin()
        if part == self.micro_batches[-1] or self.ranks.num_ranks == 1:
            yield
        else:
            with self._net.no_sync():
                yield

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients; those that CUDA graphs write into their own memory stay in place as zeros."""
        optimizer.zero_grad(set_to_none=not self._keeps_gradients)

    def rehearse(self, step: int, batches: Batches, optimizer: torch.optim.Optimizer) -> float:
        """Do what happens only once: find micro-batches that fit, compile, settle how ranks exchange gradients.

        Args:
            step: the next one; it is not made.
            batches: step → this rank's images and labels.
            optimizer: whose gradients are dropped.

        Returns:
            seconds of compiling; 0 where nothing is compiled.

        Raises:
            UserError: the compiler failed.
            torch.OutOfMemoryError: memory does not suffice.
        """
        is_compiled = self.compute.compile_mode is not None
        if not (is_compiled or self.finds_size or self.ranks.num_ranks > 1):
            return 0.0
        started = time.perf_counter()
        if self._keeps_gradients:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with explain_compiler():
            while self.finds_size and not self.ranks.all(self._fits(step, batches)):
                self.zero_grad(optimizer)
                torch.cuda.empty_cache()
                self.micro_batch_size -= 1  # the next smaller divisor
            for _ in range(STEPS_TO_RECORD if self._keeps_gradients else 1):
                self._add_gradients(step, batches, self.micro_batches)
                self.zero_grad(optimizer)
        return time.perf_counter() - started if is_compiled else 0.0

    def _fits(self, step: int, batches: Batches) -> bool:
        """Whether a micro-batch fits into the device's memory; of one image, it must."""
        try:
            with self._net.no_sync() if self.ranks.num_ranks > 1 else nullcontext():  # each rank finds out by itself
                self._add_gradients(step, batches, self.micro_batches[:1])
        except torch.OutOfMemoryError:
            if self.micro_batch_size == 1:
                raise
            return False
        return True

    def _add_gradients(self, step: int, batches: Batches, parts: list[slice]) -> None:
        (x_0, labels), draws = batches(step), self.draw(step)
        with self.compute.context():
            for part in parts:
                own_labels = None if labels is None else labels[part]
                with self.averaging_gradients(part):
                    loss = self.masked_dsm_loss(x_0[part], draws.chunk(part), labels=own_labels) * self.share
                    loss.backward()
