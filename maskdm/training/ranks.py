"""The processes that share every batch of a stage, its ranks: how they start, agree, average gradients, and end.

The first rank does all that a single process does. The others follow: they run the same command, take their rows of
every batch, and touch neither work folders nor results. On one machine the first rank starts the others, and they end
with it; under a launcher such as torchrun all are there already. A process that is alone never imports
`torch.distributed`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from maskdm.base.errors import NonFiniteLossError, UserError
from maskdm.base.interrupts import SIGNALS, Stopped
from maskdm.base.machine import is_follower, launched
from maskdm.config import ComputeConfig
from maskdm.training import devices

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

STARTED_HERE = "MASKDM_FOLLOWS"  # set for followers that end with the process that has started them
HERE = "127.0.0.1"
PATIENCE = timedelta(minutes=30)  # with a rank that says nothing: it may be saving
LONGEST_WAIT = timedelta(days=365)  # for the first rank, which may wait for another process's lock
LOOK_EVERY_SECONDS, DRAIN_SECONDS, END_SECONDS = 0.02, 0.2, 10.0
DEATH_SIGNAL_OPTION = 1  # of Linux's prctl: what a process gets when its parent has died
LOST = 75  # exit code of a follower that has lost the others: it is not the cause
WORK, NO_WORK = "work", "nothing"
SAVED = "what was saved is kept; the same command goes on from there"
T = TypeVar("T")


class Ranks:
    """The processes that share a batch, as one of them sees them; several are in a process group.

    Args:
        rank: of this process, from 0.
        num_ranks: how many there are.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        if num_ranks > 1:
            import torch.distributed as dist

            self._dist = dist

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that saves, logs and publishes."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """The rows of a batch that are this rank's."""
        share = batch_size // self.num_ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    def ask(self, decide: Callable[[], bool]) -> Callable[[], bool]:
        """What the first rank decides; on several ranks now, and the answer travels while they compute."""
        if self.num_ranks == 1:
            return decide
        decision = torch.tensor(int(self.is_first and decide()))
        travelling = self._dist.broadcast(decision, src=0, async_op=True)
        return lambda: travelling.wait() and bool(decision)

    def shared(self, value: T) -> T:
        """The first rank's value: plain ones, and tensors on the CPU."""
        if self.num_ranks == 1:
            return value
        values = [value]
        self._dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def all(self, value: bool) -> bool:
        """Whether it is true on all ranks."""
        if self.num_ranks == 1:
            return value
        smallest = torch.tensor(int(value))
        self._dist.all_reduce(smallest, self._dist.ReduceOp.MIN)
        return bool(smallest)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar on the device over all ranks; the host does not wait for an accelerator."""
        if self.num_ranks == 1:
            return value
        total = value.clone()
        self._dist.all_reduce(total)
        return total / self.num_ranks

    def collected(self, own: Tensor | None) -> list[Tensor]:
        """What every rank has made, on the first one; nothing on the others. None: this rank has made nothing."""
        if self.num_ranks == 1:
            return [] if own is None else [own]
        made: list[Tensor | None] = [None] * self.num_ranks
        self._dist.gather_object(own, made if self.is_first else None)
        return [tensor for tensor in made if tensor is not None]

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the first one's weights; on the CPU."""
        for tensor in model.state_dict().values() if self.num_ranks > 1 else ():
            self._dist.broadcast(tensor, src=0)

    def replicated(self, model: nn.Module) -> nn.Module:
        """The network to be called in training: its backward pass averages the gradients over the ranks."""
        if self.num_ranks == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)


ALONE = Ranks()


@contextmanager
def sharing(command: Sequence[str], config: ComputeConfig, is_shared: bool = True) -> Iterator[Ranks]:
    """Let `compute.devices` processes run the block together; only the first one writes the output.

    Args:
        command: the words after `maskdm` that make another process do its part of the same work.
        config: how many processes, and where.
        is_shared: whether there is work for more than one; if not, nobody is started, and ranks that wait end.

    Raises:
        UserError: another rank has ended early, a launcher has started another number of processes, or there are too
            few GPUs.
        SystemExit: this process follows, and its part is done.
    """
    if os.environ.get(STARTED_HERE):
        _end_with_the_first()  # before anything is waited for
    device = devices.resolve(config, config.devices).device
    store = _launched_store(config.devices)
    if store is None and device.type == "cuda" and torch.cuda.device_count() < config.devices:
        raise UserError(
            f"compute.devices is {config.devices}, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "lower compute.devices, or start the stage on several machines with torchrun"
        )
    if is_follower():
        with _followed(store, config.devices, device) as ranks:
            yield ranks
    elif config.devices == 1 or not is_shared:
        if store is not None:
            _announce(NO_WORK, store, config.devices, [])
        yield ALONE
    else:
        with _led(command, store, config.devices, device) as ranks:
            yield ranks


def _launched_store(num_ranks: int) -> Store | None:
    """Where the processes of a launcher meet; made by the launcher or by the first of them."""
    if (start := launched()) is None:
        return None
    if start[1] != num_ranks:
        raise UserError(
            f"compute.devices is {num_ranks}, but WORLD_SIZE is {start[1]}: {start[1]} processes were started; "
            f"set compute.devices to {start[1]}, or start {num_ranks}"
        )
    if num_ranks == 1:
        return None
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=PATIENCE))[0]  # type: ignore[attr-defined]


@contextmanager
def _led(command: Sequence[str], store: Store | None, num_ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Work as the first rank; without a launcher, start the others."""
    followers: list[subprocess.Popen[bytes]] = []
    try:
        if store is None:
            store = _start_followers(command, num_ranks, device, followers)
        _announce(WORK, store, num_ranks, followers)
        with _group(0, store, num_ranks, device) as ranks:
            try:
                yield ranks
            except BaseException:
                _end(followers)  # before the group: what waits for them must fail first
                raise
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        deadline = time.monotonic() + END_SECONDS
        while followers and time.monotonic() < deadline:
            _raise_if_one_ended(followers)
            time.sleep(LOOK_EVERY_SECONDS)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"another of the {num_ranks} processes can't be reached: {SAVED} ({reason})") from None
    finally:
        _end(followers)


def _start_followers(
    command: Sequence[str], num_ranks: int, device: torch.device, followers: list[subprocess.Popen[bytes]]
) -> Store:
    """Start the other ranks on this machine; adds them to `followers`."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(HERE, 0, num_ranks, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": HERE, "MASTER_PORT": str(store.port), STARTED_HERE: "1"}
    gpus = devices.gpus_of_stage(num_ranks) if device.type == "cuda" else range(num_ranks)
    followers.extend(
        subprocess.Popen(
            [sys.executable, "-m", "maskdm", *command],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(gpus[rank])},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the first rank alone
        )
        for rank in range(1, num_ranks)
    )
    return store


def _announce(what: str, store: Store, num_ranks: int, followers: list[subprocess.Popen[bytes]]) -> None:
    """Say whether there is work, and wait until all have heard it: the store may end with this process."""
    store.set("work", what)
    while not store.check([f"heard-{rank}" for rank in range(1, num_ranks)]):
        _raise_if_one_ended(followers)
        time.sleep(LOOK_EVERY_SECONDS)


@contextmanager
def _followed(store: Store | None, num_ranks: int, device: torch.device) -> Iterator[Ranks]:
    """Work as another rank, once the first one says that there is work; this process ends with the block."""
    assert store is not None, "a follower was launched"
    rank = int(os.environ["RANK"])
    for number in SIGNALS:  # while it waits, Python does not get to handling them
        signal.signal(number, signal.SIG_DFL)
    try:
        store.wait(["work"], LONGEST_WAIT)
        is_work = store.get("work").decode() == WORK
        store.set(f"heard-{rank}", "")
        if is_work:
            for number in SIGNALS:  # when to stop, the first rank says
                signal.signal(number, signal.SIG_IGN)
            with _group(rank, store, num_ranks, device) as ranks:
                try:
                    yield ranks
                except (NonFiniteLossError, Stopped):  # what ends the work of all ranks, the first one says
                    raise SystemExit(0) from None
                except RuntimeError as error:
                    if _is_of_communication(error):
                        os._exit(LOST)  # at once: there is nothing to tidy up
                    raise
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        raise SystemExit(LOST) from None
    raise SystemExit(0)


@contextmanager
def _group(rank: int, store: Store, num_ranks: int, device: torch.device) -> Iterator[Ranks]:
    """The process group, joined by all: gloo for tensors on the CPU, NCCL for those on GPUs."""
    import torch.distributed as dist

    is_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=PATIENCE,
        device_id=device if is_gpu else None,
    )
    try:
        yield Ranks(rank, num_ranks)
    finally:
        # PyTorch holds Python's lock while it waits for gloo's threads to end; they may need it to drop a tensor
        time.sleep(DRAIN_SECONDS)
        dist.destroy_process_group()


def _raise_if_one_ended(followers: list[subprocess.Popen[bytes]]) -> None:
    for rank, follower in enumerate(followers, start=1):
        if follower.poll() not in (None, LOST):
            raise UserError(
                f"process {rank} of 0 to {len(followers)} (compute.devices) has ended with exit code "
                f"{follower.returncode}, and the others can't go on without it: {SAVED}"
            )


def _end(followers: list[subprocess.Popen[bytes]]) -> None:
    """End the followers: they watch their input, whose other end is here."""
    for follower in followers:
        with suppress(OSError):
            follower.stdin.close()  # type: ignore[union-attr]
    for follower in followers:
        try:
            follower.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            follower.kill()
            follower.wait()


def _end_with_the_first() -> None:
    """Let this process end when the one that has started it does, whatever it is waiting for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL_OPTION, signal.SIGKILL)

    def wait_for_the_end() -> None:
        with suppress(OSError):
            os.read(0, 1)
        os._exit(LOST)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether it says that another rank can't be reached."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()
