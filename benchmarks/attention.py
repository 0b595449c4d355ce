"""`attention`: plain attention against PyTorch's kernel by number of tokens, and the precision of its softmax.

The rules `uses_plain_attention` and `widens_softmax` of `maskdm.method.backbones.uvit` rest on these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.outcome import Cell, Outcome, Table
from benchmarks.shapes import Settings
from benchmarks.timing import Task, interleave, looped
from maskdm.method.backbones.uvit import plain_attention, uses_plain_attention, widens_softmax

TOKENS, QUICK_TOKENS = (17, 65, 101, 129, 257, 401, 513, 1025), (17, 65)
NUM_HEADS, HEAD_DIM = 8, 64
TOKENS_OF_A_BATCH = 2048
SOFTMAX_TOKENS, QUICK_SOFTMAX_TOKENS = (3, 9, 15, 16, 17, 27, 31, 32, 33, 48, 56, 65, 80, 129, 257), (9, 17)
WEIGHTS_OF_A_BATCH = 2**18
KERNELS: dict[str, Callable[..., Tensor]] = {"plain": plain_attention, "fused": F.scaled_dot_product_attention}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda weights: weights.softmax(-1),
    "fp32": lambda weights: weights.float().softmax(-1).to(weights.dtype),
}


def run(settings: Settings) -> Outcome:
    """Measure both choices of both rules, forward and backward."""
    tables = [_kernels(settings)]
    if "bf16" in settings.precisions:
        tables.append(_softmaxes(settings))
    return Outcome(tables)


def _kernels(settings: Settings) -> Table:
    tokens = QUICK_TOKENS if settings.is_quick else TOKENS
    cases = [(precision, num_tokens) for precision in settings.precisions for num_tokens in tokens]
    tasks = {}
    for precision, num_tokens in cases:
        size = (3, max(1, TOKENS_OF_A_BATCH // num_tokens), NUM_HEADS, num_tokens, HEAD_DIM)
        for name, attend in KERNELS.items():
            qkv = torch.randn(size, device=settings.device, dtype=machine.DTYPES[precision], requires_grad=True)
            tasks[f"{name} {precision} {num_tokens}"] = _task(partial(_apply, attend), qkv)
    rounds = interleave(tasks, settings.rounds, "attention")
    rows: list[dict[str, Cell]] = []
    for precision, num_tokens in cases:
        case = f"{precision} {num_tokens}"
        is_plain = uses_plain_attention("auto", settings.device.type, machine.DTYPES[precision], num_tokens)
        rows.append(
            {
                "precision": precision,
                "tokens": num_tokens,
                "plain ms": rounds.of(f"plain {case}", 1e3),
                "fused ms": rounds.of(f"fused {case}", 1e3),
                "fused over plain": rounds.ratio(f"fused {case}", f"plain {case}"),
                "the rule takes": "plain" if is_plain else "fused",
            }
        )
    title = f"attention, forward and backward, {NUM_HEADS} heads of {HEAD_DIM}, about {TOKENS_OF_A_BATCH:,} tokens"
    return Table(title, rows)


def _softmaxes(settings: Settings) -> Table:
    tokens = QUICK_SOFTMAX_TOKENS if settings.is_quick else SOFTMAX_TOKENS
    tasks = {}
    for num_tokens in tokens:
        size = (max(1, WEIGHTS_OF_A_BATCH // num_tokens**2), num_tokens, num_tokens)
        for name, softmax in SOFTMAXES.items():
            weights = torch.randn(size, device=settings.device, dtype=torch.bfloat16, requires_grad=True)
            tasks[f"{name} {num_tokens}"] = _task(softmax, weights)
    rounds = interleave(tasks, settings.rounds, "softmax")
    rows: list[dict[str, Cell]] = [
        {
            "tokens": num_tokens,
            "bf16 ms": rounds.of(f"bf16 {num_tokens}", 1e3),
            "fp32 ms": rounds.of(f"fp32 {num_tokens}", 1e3),
            "fp32 over bf16": rounds.ratio(f"fp32 {num_tokens}", f"bf16 {num_tokens}"),
            "the rule takes": "fp32" if widens_softmax(settings.device.type, torch.bfloat16, num_tokens) else "bf16",
        }
        for num_tokens in tokens
    ]
    return Table(f"softmax of bf16 weights, forward and backward, about {WEIGHTS_OF_A_BATCH:,} weights", rows)


def _apply(attend: Callable[..., Tensor], qkv: Tensor) -> Tensor:
    return attend(*qkv.unbind())


def _task(function: Callable[[Tensor], Tensor], x: Tensor) -> Task:
    """Forward and backward of a function of x."""
    with torch.no_grad():
        gradient = torch.randn_like(function(x))

    def forward_and_backward() -> None:
        x.grad = None
        function(x).backward(gradient)

    return Task(looped(forward_and_backward, machine.waiting_for(x.device)), least_seconds=0.1)
