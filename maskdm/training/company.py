"""The processes that share a stage's batches: how they are started and found, and what ends them together.

The first rank does all that a single process does. The others follow: they run the same command, take their rows of
every batch, and touch neither work folders nor results. On one machine the first one starts the others, and they end
with it; under a launcher such as torchrun all are there already.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from maskdm.base.errors import UserError
from maskdm.base.interrupts import SIGNALS
from maskdm.training.devices import gpus_of_stage
from maskdm.training.ranks import ALONE, Ranks, SeveralRanks

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and its like set
STARTED_HERE = "MASKDM_FOLLOWS"  # set for followers that end with the process that has started them
HERE = "127.0.0.1"
PATIENCE = timedelta(minutes=30)  # with a rank that says nothing: it may be saving
LONGEST_WAIT = timedelta(days=365)  # for the first rank, which may wait for another process's lock
LOOK_EVERY_SECONDS, DRAIN_SECONDS, END_SECONDS = 0.02, 0.2, 10.0
DEATH_SIGNAL_OPTION = 1  # of Linux's prctl: what a process gets when its parent has died
LOST = 75  # exit code of a follower that has lost the others: not the one to blame
WORK, NO_WORK = "work", "nothing"
KEPT = "what was saved is kept; the same command goes on from there"


@dataclass
class Company:
    """The ranks of a stage before they work together.

    Args:
        num_ranks: `compute.devices`.
        device: of this process.

    Raises:
        UserError: a launcher has started another number of processes, or there are too few GPUs.
    """

    num_ranks: int
    device: torch.device
    _store: Store | None = None
    _followers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if os.environ.get(STARTED_HERE):
            _end_with_the_first()  # before anything is waited for
        if _is_launched():
            self._check_world_size()
            if self.num_ranks > 1:
                self._store = _launched_store()
        elif self.device.type == "cuda" and torch.cuda.device_count() < self.num_ranks:
            raise UserError(
                f"compute.devices is {self.num_ranks}, but this machine has {torch.cuda.device_count()} CUDA devices; "
                "lower compute.devices, or start the stage on several machines with torchrun"
            )

    @contextmanager
    def lead(self, command: Sequence[str], is_work: bool) -> Iterator[Ranks]:
        """Work as the first rank; without a launcher, start the others.

        Args:
            command: the words after `maskdm` that make another process do its part of the same work.
            is_work: whether there is work to share; if not, nobody is started, and who is there goes home.

        Raises:
            UserError: another rank has ended before its time.
        """
        if self.num_ranks == 1 or not is_work:
            if self._store is not None:
                self._tell(NO_WORK)
            yield ALONE
            return
        try:
            with self._explain_lost_ranks():
                if self._store is None:
                    self._start_followers(command)
                self._tell(WORK)
                with self._group(0) as ranks:
                    try:
                        yield ranks
                    except BaseException:
                        self._end_followers()  # before the group: what waits for them must fail first
                        raise
        finally:
            self._end_followers()

    @contextmanager
    def follow(self) -> Iterator[Ranks]:
        """Work as another rank, once the first one says that there is work; this process ends with the block.

        Raises:
            SystemExit: always: of code 0 if all went well or there is no work, `LOST` if the others are gone.
        """
        assert self._store is not None
        rank = int(os.environ["RANK"])
        for number in SIGNALS:  # while it waits, Python does not get to handling them
            signal.signal(number, signal.SIG_DFL)
        try:
            self._store.wait(["work"], LONGEST_WAIT)
            is_work = self._store.get("work").decode() == WORK
            self._store.set(f"heard-{rank}", "")
            if not is_work:
                raise SystemExit(0)
            for number in SIGNALS:  # when to stop, the first rank says
                signal.signal(number, signal.SIG_IGN)
            with self._group(rank) as ranks, _leaving_when_lost():
                yield ranks
        except RuntimeError as error:
            if not _is_of_communication(error):
                raise
            raise SystemExit(LOST) from None
        raise SystemExit(0)

    @contextmanager
    def _group(self, rank: int) -> Iterator[Ranks]:
        """The process group, joined by all."""
        import torch.distributed as dist

        is_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
            store=self._store,
            rank=rank,
            world_size=self.num_ranks,
            timeout=PATIENCE,
            device_id=self.device if is_gpu else None,
        )
        try:
            yield SeveralRanks(rank, self.num_ranks)
        finally:
            # PyTorch holds Python's lock while it waits for gloo's threads to end; they may need it to drop a tensor
            time.sleep(DRAIN_SECONDS)
            dist.destroy_process_group()

    def _check_world_size(self) -> None:
        started = int(os.environ["WORLD_SIZE"])
        if started != self.num_ranks:
            raise UserError(
                f"compute.devices is {self.num_ranks}, but WORLD_SIZE is {started}: {started} processes were started; "
                f"set compute.devices to {started}, or start {self.num_ranks}"
            )

    def _start_followers(self, command: Sequence[str]) -> None:
        """Start the other ranks on this machine."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._store = store = TCPStore(HERE, 0, self.num_ranks, is_master=True, wait_for_workers=False)
        place = {"WORLD_SIZE": str(self.num_ranks), "MASTER_ADDR": HERE, "MASTER_PORT": str(store.port)}
        places = gpus_of_stage(self.num_ranks) if self.device.type == "cuda" else range(self.num_ranks)
        for rank in range(1, self.num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(places[rank]), STARTED_HERE: "1"}
            words = [sys.executable, "-m", "maskdm", *command]
            self._followers.append(
                subprocess.Popen(
                    words,
                    env={**os.environ, **place, **own},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the first rank alone
                )
            )

    def _tell(self, what: str) -> None:
        """Say whether there is work, and wait until all have heard it: the store may end with this process."""
        assert self._store is not None
        self._store.set("work", what)
        while not self._store.check([f"heard-{rank}" for rank in range(1, self.num_ranks)]):
            self._raise_if_a_follower_ended()
            time.sleep(LOOK_EVERY_SECONDS)

    @contextmanager
    def _explain_lost_ranks(self) -> Iterator[None]:
        """Say which rank has ended where the block fails to reach it.

        Raises:
            UserError: one has.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_of_communication(error):
                raise
            deadline = time.monotonic() + END_SECONDS
            while self._followers and time.monotonic() < deadline:
                self._raise_if_a_follower_ended()
                time.sleep(LOOK_EVERY_SECONDS)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"another of the {self.num_ranks} processes can't be reached: {KEPT} ({reason})") from None

    def _raise_if_a_follower_ended(self) -> None:
        for rank, follower in enumerate(self._followers, start=1):
            if follower.poll() not in (None, LOST):
                raise UserError(
                    f"process {rank} of 0 to {self.num_ranks - 1} (compute.devices) has ended with exit code "
                    f"{follower.returncode}, and the others can't go on without it: {KEPT}"
                )

    def _end_followers(self) -> None:
        for follower in self._followers:
            assert follower.stdin is not None
            with suppress(OSError):
                follower.stdin.close()
        for follower in self._followers:
            try:
                follower.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                follower.kill()
                follower.wait()


def _is_launched() -> bool:
    return all(name in os.environ for name in LAUNCHED)


def _launched_store() -> Store:
    """Where the processes of a launcher meet; made by the launcher or by the first of them."""
    import torch.distributed as dist

    store: Store = next(dist.rendezvous("env://", timeout=PATIENCE))[0]  # type: ignore[attr-defined]
    return store


@contextmanager
def _leaving_when_lost() -> Iterator[None]:
    """End this process at once where the block finds that another rank is gone: there is nothing to tidy up."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        os._exit(LOST)


def _end_with_the_first() -> None:
    """Let this process end when the one that has started it does, whatever it is waiting for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL_OPTION, signal.SIGKILL)
    threading.Thread(target=_end_when_input_ends, daemon=True).start()


def _end_when_input_ends() -> None:
    """The first rank holds the other end of this process's input."""
    with suppress(OSError):
        os.read(0, 1)
    os._exit(LOST)


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether it says that another rank can't be reached."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()
