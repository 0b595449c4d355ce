"""`attention`: plain matrix products against PyTorch's kernel, by tokens and precision.

The rule in `maskdm.backbone.uses_plain_attention` rests on this table. Nothing is timed when a stage starts.
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
from maskdm.backbone import plain_attention, uses_plain_attention

TOKENS, QUICK_TOKENS = (17, 65, 101, 129, 257, 401, 513, 1025), (17, 65)
NUM_HEADS, HEAD_DIM = 8, 64
TOKENS_OF_A_BATCH = 2048

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(settings: Settings) -> Outcome:
    """Forward and backward of both, for heads of 64 and batches of about 2,048 tokens."""
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
    return Outcome([Table(title, rows)])


def _task(attend: Attend, precision: str, num_tokens: int, device: torch.device) -> Task:
    batch = max(1, TOKENS_OF_A_BATCH // num_tokens)
    size = (3, batch, NUM_HEADS, num_tokens, HEAD_DIM)
    qkv = torch.randn(size, device=device, dtype=machine.DTYPES[precision], requires_grad=True)
    call = partial(_forward_and_backward, attend, qkv)
    return Task(looped(call, machine.waiting_for(device)), least_seconds=0.1)


def _forward_and_backward(attend: Attend, qkv: Tensor) -> None:
    qkv.grad = None
    attend(*qkv.unbind()).sum().backward()
