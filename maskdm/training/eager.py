"""Adam and AdamW for steps that are not compiled.

PyTorch's own import its compiler at their first call, only to tell it to keep out: more than a second of CPU time in
every process. These do the same updates by the same code, without the wrappers that import it.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import Adam, AdamW, Optimizer


class _Eager(Optimizer):
    """What both take from PyTorch, bare."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)


class EagerAdam(_Eager, Adam):
    """`torch.optim.Adam` without the compiler."""

    step = torch.no_grad()(inspect.unwrap(Adam.step))


class EagerAdamW(_Eager, AdamW):
    """`torch.optim.AdamW` without the compiler."""

    step = torch.no_grad()(inspect.unwrap(AdamW.step))
