"""The processes that share every batch of a stage, its ranks: how they start, communicate and end.

Rank 0 does everything that a single process does. The others run the same command, compute their rows of every batch,
and write nothing. On one machine rank 0 starts them, and they end with it; with a launcher such as torchrun they are
running already. A single process never imports `torch.distributed`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from maskdm.base.errors import NonFiniteLossError, UserError
from maskdm.base.interrupts import SIGNALS, Stopped
from maskdm.base.machine import is_follower, launched
from maskdm.config import ComputeConfig
from maskdm.training import devices

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

STARTED_BY = "MASKDM_STARTED_BY"  # the pid of rank 0, for the ranks that it has started
HERE = "127.0.0.1"
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # another rank may be saving
WORK_TIMEOUT = timedelta(days=365)  # rank 0 may wait for another process's lock
POLL_SECONDS, DRAIN_SECONDS, END_SECONDS = 0.02, 0.2, 10.0
PR_SET_PDEATHSIG = 1  # Linux's prctl: the signal that a process gets when its parent dies
LOST_CONNECTION = 75  # exit code of a rank that can't reach the others: it is not the cause
RESUMES = "if a state was saved, the same command resumes from it"
T = TypeVar("T")
Followers = list[subprocess.Popen[bytes]]  # ranks 1, 2, …, started by rank 0


def dist() -> Any:
    """`torch.distributed`, imported only where there are several ranks."""
    import torch.distributed

    return torch.distributed


class Ranks:
    """The ranks as one of them sees them; several are in a process group.

    Args:
        rank: of this process, from 0.
        num_ranks: how many there are.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that saves, logs and publishes."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that this rank computes."""
        share = batch_size // self.num_ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    def first_decides(self, decide: Callable[[], bool]) -> Callable[[], bool]:
        """Start to send rank 0's decision to all ranks; the function returned waits for it and gives it."""
        if self.num_ranks == 1:
            return decide
        decision = torch.tensor(int(self.is_first and decide()))
        sending = dist().broadcast(decision, src=0, async_op=True)
        return lambda: sending.wait() and bool(decision)

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank: plain values and tensors on the CPU."""
        if self.num_ranks == 1:
            return value
        values = [value]
        dist().broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all ranks; the host does not wait for a GPU."""
        if self.num_ranks == 1:
            return value
        total = value.clone()
        dist().all_reduce(total)
        return total / self.num_ranks

    def all_true(self, value: bool) -> bool:
        """Whether the value is true on all ranks."""
        return bool(self.mean(torch.tensor(float(value))) == 1)

    def gather(self, own: Tensor | None) -> list[Tensor]:
        """The tensors of all ranks that have one, on rank 0; an empty list on the others."""
        if self.num_ranks == 1:
            return [] if own is None else [own]
        gathered: list[Tensor | None] = [None] * self.num_ranks
        dist().gather_object(own, gathered if self.is_first else None)
        return [tensor for tensor in gathered if tensor is not None]

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """The network with rank 0's weights; its backward pass averages the gradients over the ranks."""
        if self.num_ranks == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)


ALONE = Ranks()


@contextmanager
def sharing(command: Sequence[str], config: ComputeConfig, is_shared: bool = True) -> Iterator[Ranks]:
    """Run the block in `compute.devices` processes together; only rank 0 writes the output.

    Args:
        command: the words after `maskdm` with which another process joins the same work.
        config: how many processes, and on which device.
        is_shared: whether there is work for more than one; if not, none is started, and ranks that wait end.

    Raises:
        UserError: another rank has ended early, a launcher has started another number of processes, or there are too
            few GPUs.
        SystemExit: this is not rank 0, and its work is done.
    """
    _end_with_parent()
    device = devices.resolve(config, config.devices).device
    store = _store_of_launcher(config.devices)
    if is_follower():
        assert store is not None, "other ranks than the first have been launched"
        with _following(store, config.devices, device) as ranks:
            yield ranks
    elif config.devices == 1 or not is_shared:
        if store is not None:
            _announce(False, store, config.devices, [])
        yield ALONE
    else:
        with _leading(command, store, config.devices, device) as ranks:
            yield ranks


def _end_with_parent() -> None:
    """Let the kernel kill this process when rank 0 dies, if rank 0 has started it."""
    if (parent := os.environ.get(STARTED_BY)) is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has died already
        raise SystemExit(LOST_CONNECTION)


def _store_of_launcher(num_ranks: int) -> Store | None:
    """The key-value store through which launched ranks meet; None without a launcher."""
    if (start := launched()) is None:
        return None
    if start[1] != num_ranks:
        raise UserError(
            f"compute.devices is {num_ranks}, but WORLD_SIZE is {start[1]}: {start[1]} processes were started; "
            f"set compute.devices to {start[1]}, or start {num_ranks}"
        )
    if num_ranks == 1:
        return None
    return next(dist().rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))[0]


@contextmanager
def _leading(command: Sequence[str], store: Store | None, num_ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Work as rank 0; without a launcher, start the other ranks."""
    followers: Followers = []
    try:
        if store is None:
            own = dist().TCPStore(HERE, 0, num_ranks, is_master=True, wait_for_workers=False)
            store, gpus = own, devices.gpus_of_stage(num_ranks) if device.type == "cuda" else range(num_ranks)
            for rank in range(1, num_ranks):
                followers.append(_start_follower(command, own.port, rank, num_ranks, gpus[rank]))
        _announce(True, store, num_ranks, followers)
        yield _join_group(0, store, num_ranks, device)
    except BaseException as error:
        is_lost = _is_lost_connection(error)
        reason = _ended(followers, END_SECONDS) if is_lost and followers else None
        _kill(followers)  # before the group is destroyed, so that nothing there waits for them
        if not is_lost:
            raise
        lost = f"the connection to another rank was lost; {RESUMES} ({devices.first_line(error)})"
        raise UserError(reason or lost) from None
    finally:
        _leave_group()
        _kill(followers)


def _start_follower(command: Sequence[str], port: int, rank: int, num_ranks: int, gpu: int) -> subprocess.Popen[bytes]:
    """Start another rank on this machine; Ctrl-C goes to rank 0 alone."""
    own = {"RANK": rank, "LOCAL_RANK": gpu, "WORLD_SIZE": num_ranks, "MASTER_ADDR": HERE, "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}, STARTED_BY: str(os.getpid())}
    words, nowhere = [sys.executable, "-m", "maskdm", *command], subprocess.DEVNULL
    return subprocess.Popen(words, env=environment, stdin=nowhere, stdout=nowhere, start_new_session=True)


def _announce(is_work: bool, store: Store, num_ranks: int, followers: Followers) -> None:
    """Tell the other ranks whether there is work, and wait until all know: the store may end with this process."""
    store.set("is_work", str(is_work))
    while not store.check([f"rank {rank} knows" for rank in range(1, num_ranks)]):
        if (reason := _ended(followers, POLL_SECONDS)) is not None:
            raise UserError(reason)


@contextmanager
def _following(store: Store, num_ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Work as another rank than the first, if that announces work; this process ends with the block."""
    rank = int(os.environ["RANK"])
    try:
        for number in SIGNALS:  # Python's own handlers do not run during the wait
            signal.signal(number, signal.SIG_DFL)
        store.wait(["is_work"], WORK_TIMEOUT)
        is_work = store.get("is_work").decode() == str(True)
        store.set(f"rank {rank} knows", "")
        if is_work:
            for number in SIGNALS:  # rank 0 decides when to stop
                signal.signal(number, signal.SIG_IGN)
            yield _join_group(rank, store, num_ranks, device)
    except (NonFiniteLossError, Stopped):  # all ranks raise it, rank 0 reports it
        pass
    except RuntimeError as error:
        if _is_lost_connection(error):
            os._exit(LOST_CONNECTION)  # at once: leaving the group could wait for the lost rank
        raise
    _leave_group()
    raise SystemExit(0)


def _join_group(rank: int, store: Store, num_ranks: int, device: torch.device) -> Ranks:
    """Join the process group of all ranks: gloo for tensors on the CPU, NCCL for tensors on GPUs."""
    backend, gpu = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    dist().init_process_group(
        backend, store=store, rank=rank, world_size=num_ranks, timeout=COLLECTIVE_TIMEOUT, device_id=gpu
    )
    return Ranks(rank, num_ranks)


def _leave_group() -> None:
    if dist().is_initialized():
        # PyTorch holds Python's lock while it waits for gloo's threads to end; they may need it to free a tensor
        time.sleep(DRAIN_SECONDS)
        dist().destroy_process_group()


def _is_lost_connection(error: BaseException) -> bool:
    """Whether the error says that another rank can't be reached."""
    return isinstance(error, dist().DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _ended(followers: Followers, seconds: float = 0.0) -> str | None:
    """Which follower has ended within some seconds, and not because it lost the others; None if none has."""
    deadline = time.monotonic() + seconds
    while True:
        for rank, follower in enumerate(followers, start=1):
            if follower.poll() not in (None, LOST_CONNECTION):
                return (
                    f"rank {rank} of 0 to {len(followers)} (compute.devices) has ended with exit code "
                    f"{follower.returncode}, and the others can't continue without it; {RESUMES}"
                )
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)


def _kill(followers: Followers) -> None:
    for follower in followers:
        follower.kill()
        follower.wait()
