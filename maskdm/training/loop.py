"""The training loop: masked pretraining and unmasked finetuning are the same loop with another mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskdm.base import rng
from maskdm.base.errors import UserError
from maskdm.base.machine import peak_memory_gib
from maskdm.config import Training
from maskdm.data.batches import Batches
from maskdm.method.diffusion import Diffusion, Draws, draw_step, masked_dsm_loss
from maskdm.method.masks import Masking
from maskdm.training.devices import Compute, explain_compiler
from maskdm.training.optimizer import Ema, clip_gradients, lr_at
from maskdm.training.ranks import ALONE, Ranks, Sets, averaging

Loss = Callable[..., Tensor]  # as `masked_dsm_loss`
CUDA_GRAPHS = "reduce-overhead"  # the mode of torch.compile that uses them
STEPS_TO_RECORD = 3  # before CUDA graphs are replayed
PLAIN_VALUES = ("num_losses", "step", "curve", "timings", "device_seconds", "data_wait_seconds")
REMEDY = "lower the learning rate, clip gradients (training.grad_clip), or use compute.precision: fp32"


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; the update of that step, and every later one, was not made.

    Args:
        message: for the user.
        reason: what became non-finite, and where, alone.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        model: the network.
        ema: its averaged weights; None on ranks that keep none.
        optimizer: AdamW over the network's parameters.
        loss_sum: of the losses since the last row of the curve, a scalar on the device; None before the first step.
        num_losses: how many they are.
        step: optimizer updates done.
        curve: one row per logging interval: step, mean loss, lr, compute spent; a function of the seed alone.
        timings: for each of its rows, what the machine took for it: see `Clock`.
        device_seconds: in training steps so far.
        data_wait_seconds: those of them that were spent waiting for data.
        compile_seconds: before the first step of this process, for compiling; not among the others.
    """

    model: nn.Module
    ema: Ema | None
    optimizer: torch.optim.Optimizer
    loss_sum: Tensor | None = None
    num_losses: int = 0
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    device_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    compile_seconds: float = 0.0


class Watcher(Protocol):
    """What goes on around the steps."""

    def log(self, row: dict[str, float]) -> None:
        """Get a row of the curve with its timing."""

    def wants(self, step: int) -> bool:
        """Whether the state after so many steps is to be taken; asked at every step, so it must cost nothing."""

    def take(self, state: TrainState) -> None:
        """Get a state that is known to be good; may raise to stop the training."""


def train(
    state: TrainState,
    run: Training,
    batches: Batches,
    compute: Compute,
    watcher: Watcher,
    ranks: Ranks = ALONE,
    micro_batch_size: int | None = None,
) -> None:
    """Train from `state.step` to `run.num_steps`; calling it again with a restored state goes on exactly.

    Every step's randomness is a function of (seed, stream, step) alone. Losses stay on the device until they are
    logged. A non-finite loss makes no update: the fused optimizer is told on the device (`found_inf`), so that
    finding out costs no synchronisation. The host waits for the device where a row is due or the state is taken.

    Several ranks do the same together: each draws what the whole batch needs and takes its rows, so that what they
    compute is what one would; gradients and losses are averaged over them.

    Args:
        state: changed in place.
        run: what to do.
        batches: step → this rank's images and labels.
        compute: device, precision, attention kernel.
        watcher: gets the rows, and the states that it wants and those of milestones; of several ranks the first one's
            decides what is wanted.
        ranks: that share every batch.
        micro_batch_size: images of a rank that enter the network at once; None: all of them.

    Raises:
        NonFiniteLossError: naming step, run and learning rate; on all ranks.
    """
    monitor = LossMonitor(state, run, compute.device)
    gradients = Gradients(state.model, run, compute, ranks, micro_batch_size)
    if state.step < run.num_steps:
        state.compile_seconds = gradients.warm_up(state.step, batches)
    clock = Clock(state, compute.device)
    for step in range(state.step, run.num_steps):
        is_wanted = ranks.ask(partial(is_to_be_taken, step + 1, run, watcher))
        with clock.waiting_for_data():
            x_0, labels = batches(step)
        set_lr(state.optimizer, lr_at(step, run.num_steps, run.config))
        loss = gradients(step, x_0, labels)
        clip_gradients(state.model.parameters(), run.params.training.grad_clip)
        monitor.observe(step, ranks.mean(loss), state.optimizer)
        state.optimizer.step()
        gradients.forget()
        if state.ema is not None:
            state.ema.update(step)
        state.step = step + 1
        if (is_taken := is_wanted()) or has_row(state.step, run):
            monitor.check()
            check_weights_are_finite(state, run)
            clock.stop()
            if has_row(state.step, run):
                state.curve.append(monitor.row())
                state.timings.append(clock.read())
                watcher.log(state.curve[-1] | state.timings[-1])
            if is_taken:
                watcher.take(state)
            clock.go_on()


def is_to_be_taken(step: int, run: Training, watcher: Watcher) -> bool:
    """Whether the state after so many steps is."""
    return step in run.milestones or watcher.wants(step)


def has_row(step: int, run: Training) -> bool:
    """Whether a row of the curve is due after so many steps."""
    return step % run.params.training.log_every == 0 or step in (run.num_steps, *run.milestones)


class Clock:
    """Seconds in training steps, and those of them spent waiting for data; logging and saving do not count.

    Stopped where the host has waited for the device anyway, so that on an accelerator the seconds are the device's.

    Args:
        state: gets the seconds; of a resumed run, they go on.
        device: whose memory is read.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self._state, self._device = state, device
        self.go_on()

    def go_on(self) -> None:
        """Count from now on."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Add what was counted to the state's seconds."""
        self._state.device_seconds += time.perf_counter() - self._started

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        started = time.perf_counter()
        yield
        self._state.data_wait_seconds += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """What has been counted: cumulative seconds, and the peak memory of the device or the process."""
        on_device = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if on_device else peak_memory_gib()
        return {
            "step": self._state.step,
            "device_seconds": self._state.device_seconds,
            "data_wait_seconds": self._state.data_wait_seconds,
            "peak_memory_gib": memory,
        }


class Gradients:
    """The gradients of a step, as they are computed here: compiled or not, averaged over the ranks.

    Alone, the loss of a micro-batch is compiled as a whole. With others the network is, block by block, so that
    what averages the gradients can begin with those of the last block.

    Args:
        model: the network.
        run: what to do.
        compute: device, precision, compilation.
        ranks: that share a batch.
        micro_batch_size: images of a rank that enter the network at once; None: all of them.
    """

    def __init__(
        self, model: nn.Module, run: Training, compute: Compute, ranks: Ranks, micro_batch_size: int | None = None
    ) -> None:
        self._run, self._compute, self._ranks, self._micro_batch_size = run, compute, ranks, micro_batch_size
        diffusion = run.params.diffusion
        self._diffusion = Diffusion(diffusion.num_timesteps, diffusion.schedule, diffusion.prediction, compute.device)
        self._masking = Masking(run.strategy, run.grid, run.mask_rate, run.block_size)
        self._parameters = list(model.parameters())
        self._generator = torch.Generator(compute.device)
        self._uses_cuda_graphs = compute.compile_mode == CUDA_GRAPHS and ranks.num_ranks == 1
        self._loss: Loss = compute.compiled(masked_dsm_loss) if ranks.num_ranks == 1 else masked_dsm_loss
        self._network = ranks.replicated(model)

    def __call__(self, step: int, x_0: Tensor, labels: Tensor | None) -> Tensor:
        """Add the gradients of a step to the weights'.

        Args:
            step: gives the draws.
            x_0: this rank's images in [−1, 1], (B / ranks, C, H, W).
            labels: their classes, or None.

        Returns:
            their mean loss, a detached scalar on the device.
        """
        run, params = self._run, self._run.params
        self._generator.manual_seed(rng.derive_seed(run.seed, run.stage, step))
        draws = draw_step(
            run.batch_size,
            params.patch_dim,
            self._masking,
            params.diffusion.num_timesteps,
            params.training.flip,
            self._generator,
        )
        own = draws.chunk(self._ranks.part(run.batch_size))
        # entered anew each step: autocast keeps its bfloat16 copies of the weights until it is left
        with self._compute.context():
            return accumulate_gradients(
                self._network,
                self._diffusion,
                x_0,
                own,
                labels,
                params.model.patch_size,
                self._micro_batch_size,
                self._marked_loss,
            )

    def forget(self) -> None:
        """Drop the gradients; those that CUDA graphs would write into their own memory stay in place as zeros."""
        for parameter in self._parameters:
            if not self._uses_cuda_graphs:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def warm_up(self, step: int, batches: Batches) -> float:
        """Do all that is done but once: compile, and settle in which portions ranks send each other gradients.

        Args:
            step: the next one; it is still to be made.
            batches: step → this rank's images and labels.

        Returns:
            seconds; 0 where nothing is compiled.
        """
        if self._compute.compile_mode is None and self._ranks.num_ranks == 1:
            return 0.0
        started = time.perf_counter()
        self.forget()
        with explain_compiler():
            for _ in range(STEPS_TO_RECORD if self._uses_cuda_graphs else 1):
                float(self(step, *batches(step)))
                self.forget()
        return 0.0 if self._compute.compile_mode is None else time.perf_counter() - started

    def _marked_loss(self, *inputs: Any) -> Tensor:
        if self._uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._loss(*inputs)


def accumulate_gradients(
    model: nn.Module,
    diffusion: Diffusion,
    x_0: Tensor,
    draws: Draws,
    labels: Tensor | None,
    patch_size: int,
    micro_batch_size: int | None = None,
    loss_of: Loss = masked_dsm_loss,
) -> Tensor:
    """Add up the gradients of a batch, in micro-batches if asked; the result is the same but for rounding.

    Returns:
        the batch's mean loss, a detached scalar on the device.
    """
    num_images = len(x_0)
    micro = micro_batch_size or num_images
    total = torch.zeros((), device=x_0.device)
    for start in range(0, num_images, micro):
        part = slice(start, start + micro)
        part_labels = None if labels is None else labels[part]
        with averaging(model, wanted=part.stop >= num_images):
            loss = loss_of(model, diffusion, x_0[part], draws.chunk(part), patch_size, part_labels)
            loss = loss * (micro / num_images)
            loss.backward()
        total += loss.detach()
    return total


class LossMonitor:
    """Adds up losses and watches for non-finite ones, all on the device.

    Args:
        state: keeps the sum, so that a resumed run's means are those of one that was not interrupted.
        run: for messages.
        device: where losses live.
    """

    def __init__(self, state: TrainState, run: Training, device: torch.device) -> None:
        self._state, self._run = state, run
        if state.loss_sum is None:
            state.loss_sum = torch.zeros((), device=device)
        self._sum = state.loss_sum
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._found_inf = torch.zeros((), device=device)

    def observe(self, step: int, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take in a step's loss before its update; from the first bad one on, tell the optimizer to skip."""
        is_new = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(is_new, step, self._bad_step)
        self._found_inf = (self._bad_step >= 0).float()
        optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]  # read by the fused kernel
        self._sum += loss
        self._state.num_losses += 1

    def check(self) -> None:
        """Here the host waits for the device.

        Raises:
            NonFiniteLossError: there was a bad loss.
        """
        if (bad_step := int(self._bad_step)) >= 0:
            lr = lr_at(bad_step, self._run.num_steps, self._run.config)
            reason = f"the loss is not finite at step {bad_step} (learning rate {lr:g})"
            message = f"{self._run.title}: {reason}. The weights were not updated with it; {REMEDY}"
            raise NonFiniteLossError(message, reason)

    def row(self) -> dict[str, float]:
        """A row of the curve: the mean loss since the last one, and what is spent by now."""
        state, run = self._state, self._run
        mean = float(self._sum) / state.num_losses
        self._sum.zero_()
        state.num_losses = 0
        lr = lr_at(state.step - 1, run.num_steps, run.config)
        return {"step": state.step, "loss": mean, "lr": lr, **run.spent_after(state.step).as_dict()}


def check_weights_are_finite(state: TrainState, run: Training) -> None:
    """Gradients can overflow while the loss is finite: such weights must never be saved.

    Raises:
        NonFiniteLossError: naming step, run and learning rate.
    """
    weights = [p.detach() for p in state.model.parameters()]
    finite = torch.stack(torch._foreach_norm(weights)).isfinite().all()  # a hundredth of the time of looking at each
    if not bool(finite):
        lr = lr_at(state.step - 1, run.num_steps, run.config)
        reason = f"the weights are not finite after step {state.step - 1} (learning rate {lr:g})"
        raise NonFiniteLossError(f"{run.title}: {reason}; {REMEDY}", reason)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(state: TrainState) -> Sets:
    """All tensors of a state by kind and name: raw, ema, exp_avg, exp_avg_sq, step; and the sum of losses."""
    named = dict(state.model.named_parameters())
    tensors: Sets = {"raw": named}  # type: ignore[dict-item]
    if state.ema is not None:
        tensors["ema"] = state.ema.state_dict()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        moments = {n: state.optimizer.state[p][key] for n, p in named.items() if key in state.optimizer.state[p]}
        tensors[key] = moments
    if state.loss_sum is not None:
        tensors["loss"] = {"sum": state.loss_sum}
    return tensors


def state_info(state: TrainState) -> dict[str, Any]:
    """All plain values of a state."""
    return {name: getattr(state, name) for name in PLAIN_VALUES}


def restore_state(state: TrainState, tensors: Sets, info: dict[str, Any]) -> None:
    """Make `state` what it was when `state_tensors` and `state_info` were taken.

    Args:
        state: changed in place.
        tensors: by kind and name.
        info: plain values.
    """
    named = dict(state.model.named_parameters())

    def stored(kind: str) -> dict[str, Tensor]:
        return {name: tensor.to(named[name].device) for name, tensor in tensors.get(kind, {}).items()}

    state.model.load_state_dict(stored("raw"))
    if state.ema is not None:
        state.ema.load_state_dict(stored("ema"))
    moments = {kind: stored(kind) for kind in ("exp_avg", "exp_avg_sq")}
    for name in moments["exp_avg"]:
        parameter, num_updates = named[name], tensors["step"][name].to(named[name].device)
        own = {kind: tensor[name].clone() for kind, tensor in moments.items()}
        state.optimizer.state[parameter] = {"step": num_updates.clone(), **own}
    if "loss" in tensors:
        state.loss_sum = tensors["loss"]["sum"].to(next(iter(named.values())).device).clone()
    for name in PLAIN_VALUES:
        setattr(state, name, copy(info[name]))
