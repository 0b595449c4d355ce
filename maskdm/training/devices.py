"""Where and how a stage computes: device, threads, precision, compilation, by fixed and logged rules.

Nothing is timed at start: a choice that depends on noise would make results depend on noise.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
# glibc's numbers of what `mallopt` sets, and the values
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP_FREED_MEMORY = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}


@dataclass(frozen=True)
class Compute:
    """The resolved choices.

    Attributes:
        device: where tensors live.
        autocast: whether matrix products run in bfloat16.
        threads: CPU threads.
        compile_mode: of `torch.compile`; None runs eagerly.
    """

    device: torch.device
    autocast: bool
    threads: int
    compile_mode: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self.autocast else torch.float32

    @contextmanager
    def context(self) -> Iterator[None]:
        """Run the block in this precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            yield

    def compiled(self, function: Function) -> Function:
        """The function compiled for one set of shapes after another; the function itself where nothing is compiled."""
        if self.compile_mode is None:
            return function
        return torch.compile(function, mode=self.compile_mode, dynamic=False)  # type: ignore[return-value]

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether compiled functions are replayed as CUDA graphs."""
        return self.compile_mode == "reduce-overhead"

    @property
    def memory_bytes(self) -> int:
        """What the device has: a GPU's own, or half of the machine's."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return int(psutil.virtual_memory().total) // 2

    def describe_device(self) -> dict[str, str | int]:
        """For records: device, its name, threads."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"device": str(self.device), "device_name": name, "threads": self.threads}

    def describe(self) -> dict[str, str | int]:
        """For records of what runs in `context`: the device, precision, and how it is compiled."""
        return {
            **self.describe_device(),
            "precision": "bf16" if self.autocast else "fp32",
            "compile": self.compile_mode or "off",
        }


def resolve(config: ComputeConfig, num_devices: int = 1) -> Compute:
    """Turn `auto` into a choice, set the CPU threads, and ask for deterministic kernels.

    Args:
        config: what is asked for.
        num_devices: that work on a stage together, this one being the first unless LOCAL_RANK says otherwise.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("compute.device is cuda, but PyTorch sees no CUDA device; use auto or cpu")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", _gpu(num_devices)) if use_cuda else torch.device("cpu")
    torch.set_num_threads(config.threads)
    _ask_for_determinism(use_cuda, compile_mode := _compile_mode(config, use_cuda))
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    else:
        _keep_freed_memory()
    autocast = config.precision == "bf16" or (config.precision == "auto" and _has_bf16(device))
    return Compute(device, autocast, config.threads, compile_mode)


def _gpu(num_devices: int) -> int:
    """Which GPU: the launcher's choice, or the first of those that are this stage's.

    Raises:
        UserError: a launcher has not said which, or there is no such.
    """
    count, given = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if given is None and "RANK" in os.environ:
        raise UserError(
            "the launcher has set RANK, but not LOCAL_RANK, which says on which GPU to work: set it as well"
        )
    if given is None:
        return gpus_of_stage(num_devices)[0]
    if int(given) >= count:
        raise UserError(f"LOCAL_RANK is {given}, but this machine has {count} CUDA devices: start one process for each")
    return int(given)


def gpus_of_stage(num_devices: int) -> tuple[int, ...]:
    """The indices of the GPUs that this stage works on, as many as it needs; fewer only where there are fewer."""
    uuids = (str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))
    return free_gpus(tuple(uuids), num_devices)


@cache
def free_gpus(uuids: Sequence[str], num_devices: int) -> tuple[int, ...]:
    """The indices of GPUs that no other stage of this user has taken, as far as there are such; else of taken ones.

    They are taken until this process ends: so `snakemake --resources gpu=8` puts eight arms on eight GPUs.

    Args:
        uuids: of the GPUs that are visible.
        num_devices: how many are wanted.
    """
    own: list[int] = []
    for index, uuid in enumerate(uuids):
        if len(own) < num_devices and _take(uuid):
            own.append(index)
    others = [index for index in range(len(uuids)) if index not in own]
    return tuple(own + others[: num_devices - len(own)])


def _take(uuid: str) -> bool:
    """Lock a GPU as long as this process lives; False if another process has."""
    lock = os.open(Path(tempfile.gettempdir()) / f"maskdm-{os.getuid()}-{uuid}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


def _ask_for_determinism(use_cuda: bool, compile_mode: str | None) -> None:
    """Deterministic kernels; on CUDA, where some operators have none, a warning at most.

    What is usually called for it tells PyTorch's compiler too, and for that imports it: two seconds.
    """
    if compile_mode is None:
        torch.set_deterministic_debug_mode("warn" if use_cuda else "error")
    else:
        torch.use_deterministic_algorithms(True, warn_only=use_cuda)
    # nothing reads uninitialised memory, and filling it takes 3 % of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _compile_mode(config: ComputeConfig, use_cuda: bool) -> str | None:
    """On a CPU compiling takes 15–65 s a shape and gains 5–45 %: it is not the rule there. On a GPU it needs Triton."""
    if config.compile == "auto":
        is_possible = use_cuda and find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)
        return "default" if is_possible else None
    return None if config.compile == "off" else config.compile


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: else every large activation is mapped and zeroed anew by the kernel."""
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for parameter, value in KEEP_FREED_MEMORY.items():
            library.mallopt(parameter, value)


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


@contextmanager
def explain_compiler() -> Iterator[None]:
    """Say that it was PyTorch's compiler that failed in the block, and how to do without it.

    Raises:
        UserError: it did; most often there is no C++ compiler or no Triton.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        raise UserError(
            f"torch.compile failed ({_first_line(error)}); it needs a C++ compiler on a CPU and Triton on a GPU; "
            "compute.compile: off does without"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
