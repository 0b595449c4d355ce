"""Where and how a stage computes: device, threads, precision, compilation, by fixed rules that are recorded.

Nothing is timed to choose: the choice would depend on noise, and results on the choice.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from maskdm.base.errors import UserError
from maskdm.config import ComputeConfig

Function = TypeVar("Function", bound=Callable[..., Any])
# glibc's numbers for `mallopt`, and the values that make it keep freed memory
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP_FREED_MEMORY = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # PyTorch's messages on a CPU


@dataclass(frozen=True)
class Compute:
    """The choices, with every `auto` resolved.

    Attributes:
        device: where tensors are.
        autocast: whether matrix products run in bfloat16.
        threads: CPU threads.
        compile_mode: of `torch.compile`; None: nothing is compiled.
    """

    device: torch.device
    autocast: bool
    threads: int
    compile_mode: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.autocast else torch.float32

    @contextmanager
    def context(self) -> Iterator[None]:
        """Run the block in this precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            yield

    def compiled(self, function: Function) -> Function:
        """The function, compiled for every new set of shapes; unchanged if nothing is to be compiled."""
        if self.compile_mode is None:
            return function
        return torch.compile(function, mode=self.compile_mode, dynamic=False)  # type: ignore[return-value]

    @property
    def memory_bytes(self) -> int:
        """The memory that a dataset may be kept in: a GPU's, or half of the machine's."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return int(psutil.virtual_memory().total) // 2

    def describe_device(self) -> dict[str, str | int]:
        """Device, its name, and threads, for records."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"device": str(self.device), "device_name": name, "threads": self.threads}

    def describe(self) -> dict[str, str | int]:
        """Device, precision and compilation, for records."""
        precision = "bf16" if self.autocast else "fp32"
        return {**self.describe_device(), "precision": precision, "compile": self.compile_mode or "off"}


def resolve(config: ComputeConfig, num_devices: int = 1) -> Compute:
    """Resolve every `auto`, set the number of CPU threads, and ask PyTorch for deterministic kernels.

    Args:
        config: the section `compute` of params.yaml.
        num_devices: devices that share a stage; this is the first of them unless LOCAL_RANK names another.

    Raises:
        UserError: CUDA was asked for and is not available, or there are too few GPUs.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but PyTorch sees no CUDA device; use auto or cpu")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", _gpu(num_devices)) if use_cuda else torch.device("cpu")
    torch.set_num_threads(config.threads)
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
        has_bf16, capability = (
            torch.cuda.is_bf16_supported(including_emulation=False),
            torch.cuda.get_device_capability(),
        )
        compile_mode = "default" if find_spec("triton") is not None and capability >= (7, 0) else None
    else:
        _keep_freed_memory()
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        compile_mode = None  # compiling takes 15 to 65 s for each shape and saves 5 to 45 %
    if config.compile != "auto":
        compile_mode = None if config.compile == "off" else config.compile
    _use_deterministic_kernels(use_cuda, compile_mode)
    autocast = config.precision == "bf16" or (config.precision == "auto" and has_bf16)
    return Compute(device, autocast, config.threads, compile_mode)


def _gpu(num_devices: int) -> int:
    """The index of this process's GPU: LOCAL_RANK, which a launcher sets, or the first of the stage's GPUs."""
    count, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if local_rank is not None:
        if int(local_rank) < count:
            return int(local_rank)
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this machine has {count} CUDA devices: start one process for each"
        )
    if "RANK" in os.environ:
        raise UserError("the launcher has set RANK but not LOCAL_RANK, the GPU of this process: set it as well")
    if count < num_devices:
        raise UserError(
            f"compute.devices is {num_devices}, but this machine has {count} CUDA devices; "
            "lower compute.devices, or start the stage on several machines with torchrun"
        )
    return gpus_of_stage(num_devices)[0]


@cache
def gpus_of_stage(num_devices: int, uuids: tuple[str, ...] | None = None) -> tuple[int, ...]:
    """The indices of this stage's GPUs: those that no other stage of this user has locked; if too few, others too.

    They stay locked until this process ends: so `snakemake --resources gpu=8` puts eight arms on eight GPUs.

    Args:
        num_devices: how many to choose.
        uuids: of the GPUs to choose from; None: all visible ones.
    """
    if uuids is None:
        uuids = tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))
    chosen: list[int] = []
    for index, uuid in enumerate(uuids):
        if len(chosen) < num_devices:
            file = Path(tempfile.gettempdir()) / f"maskdm-{os.getuid()}-{uuid}.lock"
            lock = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)  # stays open, and so locked
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                chosen.append(index)
            except BlockingIOError:
                os.close(lock)
    others = [index for index in range(len(uuids)) if index not in chosen]
    return tuple(chosen + others[: num_devices - len(chosen)])


def _use_deterministic_kernels(use_cuda: bool, compile_mode: str | None) -> None:
    """Use deterministic kernels; on CUDA an operator without one is a warning."""
    if compile_mode is None:  # the usual function imports PyTorch's compiler to inform it: two seconds
        torch.set_deterministic_debug_mode("warn" if use_cuda else "error")
    else:
        torch.use_deterministic_algorithms(True, warn_only=use_cuda)
    # nothing reads uninitialised memory, and filling it takes 3 % of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory: otherwise the kernel maps and zeroes every large activation again."""
    with suppress(OSError, AttributeError):  # another C library
        for parameter, value in KEEP_FREED_MEMORY.items():
            ctypes.CDLL(None).mallopt(parameter, value)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """If the block runs out of memory, of the device or the machine, say what to change.

    Args:
        advice: what did not fit, and what to try.

    Raises:
        UserError: memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_it = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(m in str(error) for m in OUT_OF_MEMORY)
        if not is_it:
            raise
        raise UserError(f"out of memory: {advice} ({first_line(error)})") from None


@contextmanager
def explain_compiler() -> Iterator[None]:
    """If PyTorch's compiler fails in the block, say so, and how to do without it.

    Raises:
        UserError: it failed, most often because there is no C++ compiler or no Triton.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        raise UserError(
            f"torch.compile failed ({first_line(error)}); it needs a C++ compiler on a CPU and Triton on a GPU; "
            "compute.compile: off does without"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0]
