"""The optimizer, the learning-rate schedule, the averaged weights, gradient clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from maskdm.config import StageConfig, TrainingConfig


class _Eager(Optimizer):
    """An optimizer of PyTorch without the decorators that import its compiler at their first call.

    They import it only to exclude these methods from compilation: more than a second of CPU time in every process.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)


class EagerAdam(_Eager, Adam):
    """`torch.optim.Adam` that does not import the compiler."""

    step = torch.no_grad()(inspect.unwrap(Adam.step))


class EagerAdamW(_Eager, AdamW):
    """`torch.optim.AdamW` that does not import the compiler."""

    step = torch.no_grad()(inspect.unwrap(AdamW.step))


def make_optimizer(model: nn.Module, training: TrainingConfig, lr: float) -> torch.optim.AdamW:
    """The fused AdamW; with `training.decay: weights`, biases, norms and embeddings have no weight decay."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_weight = parameter.dim() >= 2 and "norm" not in name and not name.endswith(("pos_embed", "label_emb.weight"))
        (decayed if is_weight or training.decay == "all" else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    beta_1, beta_2 = training.betas
    return EagerAdamW([g for g in groups if g["params"]], lr=lr, betas=(beta_1, beta_2), fused=True)


def lr_at(step: int, num_steps: int, config: StageConfig) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then constant or half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_decay == "constant":
        return config.lr * warmup
    done = max(0, step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """The exponential moving average of the weights, θ̄ ← d θ̄ + (1 − d) θ.

    The decay starts lower, d_step = min(d, (1 + step) / (10 + step)), so that the initial weights soon have no
    influence on the average.

    Args:
        model: its parameters are averaged.
        decay: d in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._sources: list[Tensor] = list(model.parameters())
        self._names = [name for name, _ in model.named_parameters()]
        self._averages = [p.detach().clone() for p in self._sources]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after the update of `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from these averaged weights."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> None:
    """Scale the gradients down to a total norm of at most `max_norm`; None: do nothing. The host does not wait."""
    if max_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
