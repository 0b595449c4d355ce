"""`attention`: plain matrix products against PyTorch's kernel, by tokens and precision; the softmax's precision.

The rules `uses_plain_attention` and `widens_softmax` of `maskdm.method.backbones.uvit` rest on these tables. Nothing is
timed when a stage starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.outcome import Cell, Outcome, Table
from benchmarks.settings import Settings
from benchmarks.timing import Task, interleave, looped
from maskdm.method.backbones.uvit import plain_attention, uses_plain_attention, widens_softmax

TOKENS, QUICK_TOKENS = (17, 65, 101, 129, 257, 401, 513, 1025), (17, 65)
NUM_HEADS, HEAD_DIM = 8, 64
TOKENS_OF_A_BATCH = 2048
SOFTMAX_TOKENS, QUICK_SOFTMAX_TOKENS = (3, 9, 15, 16, 17, 27, 31, 32, 33, 48, 56, 65, 80, 129, 257), (9, 17)
WEIGHTS_OF_A_BATCH = 2**18
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda weights: weights.softmax(-1),
    "fp32": lambda weights: weights.float().softmax(-1).to(weights.dtype),
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(settings: Settings) -> Outcome:
    """Both choices of both rules, forward and backward."""
    tables = [_kernels(settings)]
    if "bf16" in settings.precisions:
        tables.append(_softmaxes(settings))
    return Outcome(tables)


def _kernels(settings: Settings) -> Table:
    """Plain attention and PyTorch's, for heads of 64 and batches of about 2,048 tokens."""
    tokens = QUICK_TOKENS if settings.is_quick else TOKENS
    cases = [(precision, num_tokens) for precision in settings.precisions for num_tokens in tokens]
    tasks: dict[str, Task] = {}
    for precision, num_tokens in cases:
        for name, attend in (("plain", plain_attention), ("fused", F.scaled_dot_product_attention)):
            tasks[f"{name} {precision} {num_tokens}"] = _task(attend, precision, num_tokens, settings.device)
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
    """The softmax of bfloat16 weights as it is and in float32, for about as many weights at every length."""
    tokens = QUICK_SOFTMAX_TOKENS if settings.is_quick else SOFTMAX_TOKENS
    tasks: dict[str, Task] = {}
    for num_tokens in tokens:
        for name, softmax in SOFTMAXES.items():
            tasks[f"{name} {num_tokens}"] = _softmax_task(softmax, num_tokens, settings.device)
    rounds = interleave(tasks, settings.rounds, "softmax")
    rows: list[dict[str, Cell]] = [
        {
            "tokens": num_tokens,
            "bf16 ms": rounds.of(f"bf16 {num_tokens}", 1e3),
            "fp32 ms": rounds.of(f"fp32 {num_tokens}", 1e3),
            "fp32 over bf16": rounds.ratio(f"fp32 {num_tokens}", f"bf16 {num_tokens}"),
            "the rule takes": _softmax_rule(settings.device, num_tokens),
        }
        for num_tokens in tokens
    ]
    return Table(f"softmax of bf16 weights, forward and backward, about {WEIGHTS_OF_A_BATCH:,} weights", rows)


def _softmax_rule(device: torch.device, num_tokens: int) -> str:
    return "fp32" if widens_softmax(device.type, torch.bfloat16, num_tokens) else "bf16"


def _softmax_task(softmax: Callable[[Tensor], Tensor], num_tokens: int, device: torch.device) -> Task:
    size = (max(1, WEIGHTS_OF_A_BATCH // num_tokens**2), num_tokens, num_tokens)
    weights = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(weights)

    def forward_and_backward() -> None:
        weights.grad = None
        softmax(weights).backward(gradient)

    return Task(looped(forward_and_backward, machine.waiting_for(device)), least_seconds=0.1)


def _task(attend: Attend, precision: str, num_tokens: int, device: torch.device) -> Task:
    batch = max(1, TOKENS_OF_A_BATCH // num_tokens)
    size = (3, batch, NUM_HEADS, num_tokens, HEAD_DIM)
    qkv = torch.randn(size, device=device, dtype=machine.DTYPES[precision], requires_grad=True)
    call = partial(_forward_and_backward, attend, qkv)
    return Task(looped(call, machine.waiting_for(device)), least_seconds=0.1)


def _forward_and_backward(attend: Attend, qkv: Tensor) -> None:
    qkv.grad = None
    attend(*qkv.unbind()).sum().backward()
