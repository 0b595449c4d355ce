"""The training loop. Masked pretraining and unmasked finetuning are the same loop with different masks."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from maskdm.base.errors import NonFiniteLossError
from maskdm.base.machine import peak_memory_gib
from maskdm.data.batches import Batches
from maskdm.training.objective import Objective
from maskdm.training.optimizer import clip_gradients, lr_at, set_lr
from maskdm.training.state import TrainState

REMEDY = "lower the learning rate, clip gradients (training.grad_clip), or use compute.precision: fp32"


class Watcher:
    """What the loop calls between steps; this one does nothing."""

    def log(self, row: dict[str, float]) -> None:
        """Receive a row of the curve, with its timing."""

    def should_save(self, step: int) -> bool:
        """Whether to save the state after this many steps; called at every step, so it must be cheap."""
        return False

    def save(self, state: TrainState) -> None:
        """Save a state whose weights are finite; may raise to stop the training."""


def train(state: TrainState, batches: Batches, objective: Objective, watcher: Watcher) -> None:
    """Train from `state.step` to the last step of the run; a restored state continues exactly.

    Losses stay on the device: the host waits for it only when a row of the curve is due or the state is saved.
    Several ranks draw the random numbers of the whole batch and each takes its rows, so together they compute what
    one process computes.

    Args:
        state: changed in place.
        batches: step → this rank's images (B, C, H, W) in [−1, 1] and labels (B,) or None.
        objective: the loss of a step, and the run that it belongs to.
        watcher: receives the rows of the curve, and the states to save: at milestones and when it asks for one.

    Raises:
        NonFiniteLossError: a loss or a weight is not finite; raised on all ranks.
    """
    run, optimizer = objective.run, state.optimizer
    monitor = Monitor(state, objective, watcher)
    for step in range(state.step, run.num_steps):
        x_0, labels = monitor.timed(batches, step)  # a function of (seed, step)
        draws = objective.draw(step)  # t, visible_idx, noise, flips: a function of (seed, stage, step)
        set_lr(optimizer, lr_at(step, run.num_steps, run.config))
        with objective.compute.context():
            for part in objective.micro_batches:
                loss = objective.loss(x_0, draws, labels, part)
                loss.backward()
                monitor.add(loss)
        clip_gradients(state.model.parameters(), run.params.training.grad_clip)
        monitor.end_batch(step)  # after a bad loss the optimizer skips its updates; decided on the device
        optimizer.step()
        optimizer.zero_grad(set_to_none=not objective.keeps_gradients)
        if state.ema is not None:
            state.ema.update(step)
        state.step = step + 1
        if monitor.is_due():
            monitor.check_finite()
            monitor.log_and_save()


class Monitor:
    """Sums losses, detects bad ones on the device, measures time, and passes rows and states to the watcher.

    Seconds of logging and saving do not count. They are measured where the host has waited for the device, so on an
    accelerator they are the device's seconds.

    Args:
        state: holds the sum of losses and the seconds, so that a resumed run continues both.
        objective: gives the run, the device and the ranks.
        watcher: receives rows and states.
    """

    def __init__(self, state: TrainState, objective: Objective, watcher: Watcher) -> None:
        self._state, self._run, self._ranks, self._watcher = state, objective.run, objective.ranks, watcher
        self._device = device = objective.compute.device
        if state.loss_sum is None:
            state.loss_sum = torch.zeros((), device=device)
        self._sum = state.loss_sum
        self._batch = torch.zeros((), device=device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)  # the first one; -1: none
        self._started = time.perf_counter()

    def timed(self, batches: Batches, step: int) -> tuple[Tensor, Tensor | None]:
        """The batch of a step; the seconds count as waiting for data."""
        started = time.perf_counter()
        batch = batches(step)
        self._state.data_wait_seconds += time.perf_counter() - started
        return batch

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch to the loss of its batch."""
        self._batch += loss.detach()

    def end_batch(self, step: int) -> None:
        """Add the loss of the batch; after the first bad one, the fused optimizer skips every update."""
        loss = self._ranks.mean(self._batch)
        is_first_bad = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(is_first_bad, step, self._bad_step)
        self._state.optimizer.found_inf = (self._bad_step >= 0).float()  # type: ignore[attr-defined]
        self._sum += loss
        self._state.num_losses += 1
        self._batch = torch.zeros_like(self._batch)
        run, ask = self._run, self._watcher.should_save
        # the answer travels between ranks while they compute the update
        self._answer = self._ranks.first_decides(lambda: step + 1 in run.milestones or ask(step + 1))

    def is_due(self) -> bool:
        """Whether a row of the curve is due after this step, or the state is to be saved."""
        self._saves = self._answer()
        return self._saves or self._has_row(self._state.step)

    def check_finite(self) -> None:
        """Wait for the device, then look at losses and weights.

        Raises:
            NonFiniteLossError: a loss was not finite, or gradients overflowed although the loss was finite.
        """
        state, title = self._state, self._run.title
        if (bad_step := int(self._bad_step)) >= 0:
            reason = f"the loss is not finite at step {bad_step} (learning rate {self._lr(bad_step):g})"
            raise NonFiniteLossError(f"{title}: {reason}. The weights were not updated with it; {REMEDY}", reason)
        weights = [p.detach() for p in state.model.parameters()]
        norms = torch.stack(torch._foreach_norm(weights))  # a hundredth of the time of testing every weight
        if not bool(norms.isfinite().all()):
            last = state.step - 1
            reason = f"the weights are not finite after step {last} (learning rate {self._lr(last):g})"
            raise NonFiniteLossError(f"{title}: {reason}; {REMEDY}", reason)

    def log_and_save(self) -> None:
        """Pass what is due to the watcher; the clock stands still meanwhile."""
        state = self._state
        state.device_seconds += time.perf_counter() - self._started
        if self._has_row(state.step):
            self._add_row()
            self._watcher.log(state.curve[-1] | state.timings[-1])
        if self._saves:
            self._watcher.save(state)
        self._started = time.perf_counter()

    def _has_row(self, step: int) -> bool:
        run = self._run
        return step % run.params.training.log_every == 0 or step in (run.num_steps, *run.milestones)

    def _add_row(self) -> None:
        """Add a row to the curve (mean loss since the last row, compute spent) and to the timings."""
        state, step, is_cuda = self._state, self._state.step, self._device.type == "cuda"
        mean, spent = float(self._sum) / state.num_losses, self._run.spent_after(step).as_dict()
        self._sum.zero_()
        state.num_losses = 0
        state.curve.append({"step": step, "loss": mean, "lr": self._lr(step - 1), **spent})
        timing = {
            "step": step,
            "device_seconds": state.device_seconds,
            "data_wait_seconds": state.data_wait_seconds,
            "peak_memory_gib": torch.cuda.max_memory_allocated(self._device) / 2**30 if is_cuda else peak_memory_gib(),
        }
        state.timings.append(timing)

    def _lr(self, step: int) -> float:
        return lr_at(step, self._run.num_steps, self._run.config)
