"""Where and how a stage computes: device, threads, precision, attention kernel, by fixed and logged rules.

Nothing is timed at start: a choice that depends on noise would make results depend on noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from maskdm.config import ComputeConfig
from maskdm.errors import UserError


@dataclass(frozen=True)
class Compute:
    """The resolved choices.

    Attributes:
        device: where tensors live.
        autocast: whether matrix products run in bfloat16.
        threads: CPU threads.
    """

    device: torch.device
    autocast: bool
    threads: int

    def uses_bf16(self, training: bool) -> bool:
        """Whether matrix products run in bfloat16: sampling stays in float32 on a CPU."""
        return self.autocast and (training or self.device.type == "cuda")

    def uses_math_attention(self, training: bool) -> bool:
        """Whether attention is plain matrix products instead of PyTorch's choice.

        In bfloat16 on a CPU the default kernel is up to 2.6 times slower.
        """
        return self.uses_bf16(training) and self.device.type == "cpu"

    @contextmanager
    def context(self, training: bool = True) -> Iterator[None]:
        """Run the block with these choices."""
        backends = [SDPBackend.MATH] if self.uses_math_attention(training) else _all_backends()
        with (
            sdpa_kernel(backends),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.uses_bf16(training)),
        ):
            yield

    def describe_device(self) -> dict[str, str | int]:
        """For records: device, its name, threads."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"device": str(self.device), "device_name": name, "threads": self.threads}

    def describe(self, training: bool = True) -> dict[str, str | int]:
        """For records of what runs in `context`: the device, precision and attention."""
        return {
            **self.describe_device(),
            "precision": "bf16" if self.uses_bf16(training) else "fp32",
            "attention": "math" if self.uses_math_attention(training) else "default",
        }


def resolve(config: ComputeConfig) -> Compute:
    """Turn `auto` into a choice, set the CPU threads, and ask for deterministic kernels.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but PyTorch sees no CUDA device; use auto or cpu")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=use_cuda)
    if use_cuda:
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    autocast = config.precision == "bf16" or (config.precision == "auto" and _has_bf16(device))
    return Compute(device, autocast, config.threads)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Say what to lower where the block runs out of the device's memory, or of the machine's.

    Args:
        advice: what did not fit, and what to try.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory: {advice} ({_first_line(error)})") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):  # PyTorch's on a CPU
            raise
        raise UserError(f"out of memory: {advice} ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _all_backends() -> list[SDPBackend]:
    return [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ]
