"""The training loop: masked pretraining and unmasked finetuning are the same loop with another mask."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from maskdm.base.errors import NonFiniteLossError
from maskdm.base.machine import peak_memory_gib
from maskdm.config import Training
from maskdm.data.batches import Batches
from maskdm.training.objective import Objective
from maskdm.training.optimizer import clip_gradients, lr_at, set_lr
from maskdm.training.state import TrainState

REMEDY = "lower the learning rate, clip gradients (training.grad_clip), or use compute.precision: fp32"


class Watcher:
    """What happens around the steps; this one does nothing."""

    def log(self, row: dict[str, float]) -> None:
        """Get a row of the curve with its timing."""

    def should_save(self, step: int) -> bool:
        """Whether to save after so many steps; asked at every step, so it must cost nothing."""
        return False

    def save(self, state: TrainState) -> None:
        """Get a state that is known to be good; may raise to stop the training."""


def train(state: TrainState, batches: Batches, objective: Objective, watcher: Watcher) -> None:
    """Train from `state.step` to the run's last step; with a restored state this continues exactly.

    Losses stay on the device: the host waits for it only where a row of the curve is due or the state is saved.
    Several ranks draw what the whole batch needs and take their rows, so together they compute what one would.

    Args:
        state: changed in place.
        batches: step → this rank's images and labels.
        objective: the loss of a step, and the run that it belongs to.
        watcher: gets the rows, the states that it asks for, and those of milestones.

    Raises:
        NonFiniteLossError: a loss or a weight is not finite; on all ranks.
    """
    run, ranks, optimizer = objective.run, objective.ranks, state.optimizer
    losses, clock = Losses(state, objective), Clock(state, objective.compute.device)
    for step in range(state.step, run.num_steps):
        should_save = ranks.ask(partial(is_saved, step + 1, run, watcher))
        with clock.waiting_for_data():
            x_0, labels = batches(step)  # a function of (seed, step)
        draws = objective.draw(step)  # t, visible_idx, noise, flips: a function of (seed, stage, step)
        set_lr(optimizer, lr_at(step, run.num_steps, run.config))
        with objective.compute.context():
            for part in objective.micro_batches:
                own_labels = None if labels is None else labels[part]
                with objective.averaging_gradients(part):
                    loss = objective.masked_dsm_loss(x_0[part], draws.chunk(part), labels=own_labels) * objective.share
                    loss.backward()
                losses.add(loss)
        clip_gradients(state.model.parameters(), run.params.training.grad_clip)
        losses.skip_update_if_bad(step)  # on the device: finding out costs no synchronisation
        optimizer.step()
        objective.zero_grad(optimizer)
        if state.ema is not None:
            state.ema.update(step)
        state.step = step + 1
        if (saves := should_save()) or has_row(state.step, run):
            losses.check()
            with clock.stopped():
                if has_row(state.step, run):
                    watcher.log(add_row(state, losses, clock))
                if saves:
                    watcher.save(state)


def is_saved(step: int, run: Training, watcher: Watcher) -> bool:
    """Whether the state after so many steps is: at milestones, and when the watcher asks for it."""
    return step in run.milestones or watcher.should_save(step)


def has_row(step: int, run: Training) -> bool:
    """Whether a row of the curve is due after so many steps."""
    return step % run.params.training.log_every == 0 or step in (run.num_steps, *run.milestones)


def add_row(state: TrainState, losses: Losses, clock: Clock) -> dict[str, float]:
    """Add a row to the curve and to the timings; both as one."""
    state.curve.append(losses.row())
    state.timings.append(clock.read())
    return state.curve[-1] | state.timings[-1]


class Losses:
    """Adds up losses and watches for non-finite ones, all on the device.

    Args:
        state: keeps the sum, so that the means of a resumed run are those of one that was not interrupted.
        objective: for the run, the device and the ranks.
    """

    def __init__(self, state: TrainState, objective: Objective) -> None:
        device = objective.compute.device
        self._state, self._run, self._ranks = state, objective.run, objective.ranks
        if state.loss_sum is None:
            state.loss_sum = torch.zeros((), device=device)
        self._sum = state.loss_sum
        self._batch = torch.zeros((), device=device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch to that of its batch."""
        self._batch += loss.detach()

    def skip_update_if_bad(self, step: int) -> None:
        """End the batch of a step; from the first bad one on, tell the optimizer's fused kernel to skip."""
        loss = self._ranks.mean(self._batch)
        is_new = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(is_new, step, self._bad_step)
        self._state.optimizer.found_inf = (self._bad_step >= 0).float()  # type: ignore[attr-defined]
        self._sum += loss
        self._state.num_losses += 1
        self._batch = torch.zeros_like(self._batch)

    def check(self) -> None:
        """Here the host waits for the device.

        Raises:
            NonFiniteLossError: there was a bad loss, or gradients overflowed while the loss was finite.
        """
        if (bad_step := int(self._bad_step)) >= 0:
            reason = f"the loss is not finite at step {bad_step} ({self._lr(bad_step)})"
            message = f"{self._run.title}: {reason}. The weights were not updated with it; {REMEDY}"
            raise NonFiniteLossError(message, reason)
        weights = [p.detach() for p in self._state.model.parameters()]
        norms = torch.stack(torch._foreach_norm(weights))  # a hundredth of the time of looking at each
        if not bool(norms.isfinite().all()):
            step = self._state.step - 1
            reason = f"the weights are not finite after step {step} ({self._lr(step)})"
            raise NonFiniteLossError(f"{self._run.title}: {reason}; {REMEDY}", reason)

    def row(self) -> dict[str, float]:
        """A row of the curve: the mean loss since the last one, and what is spent by now."""
        state, run = self._state, self._run
        mean = float(self._sum) / state.num_losses
        self._sum.zero_()
        state.num_losses = 0
        lr = lr_at(state.step - 1, run.num_steps, run.config)
        return {"step": state.step, "loss": mean, "lr": lr, **run.spent_after(state.step).as_dict()}

    def _lr(self, step: int) -> str:
        return f"learning rate {lr_at(step, self._run.num_steps, self._run.config):g}"


class Clock:
    """Seconds in training steps, and those of them spent waiting for data; logging and saving do not count.

    It stops only where the host has waited for the device anyway, so on an accelerator the seconds are the device's.

    Args:
        state: gets the seconds; those of a resumed run continue.
        device: whose memory is read.
    """

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self._state, self._device = state, device
        self._started = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Add what was counted to the state's seconds, and do not count the block."""
        self._state.device_seconds += time.perf_counter() - self._started
        yield
        self._started = time.perf_counter()

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
