"""Random generators that are pure functions of (seed, stream, index).

Nothing draws from a global generator, so a resumed run, another engine or another batch size gets the same draws.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed for one use of randomness; different streams and indices are independent.

    Args:
        seed: the seed of the run.
        stream: the name of the use, such as "pretrain".
        index: the step, epoch or image.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for (seed, stream, index)."""
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, index))
