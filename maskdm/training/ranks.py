"""What the processes that share every batch do together: agree, average gradients, gather.

A process that is alone never imports `torch.distributed`. See `maskdm.training.company` for where the others come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Sets = dict[str, dict[str, Tensor]]
T = TypeVar("T")
CPU = torch.device("cpu")


class Ranks:
    """The processes that share a batch; this one is alone.

    Attributes:
        rank: of this process, from 0.
        num_ranks: how many they are.
    """

    rank, num_ranks = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that saves, logs and publishes."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """The rows of a batch that are this rank's."""
        share = batch_size // self.num_ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    def ask(self, decide: Callable[[], bool]) -> Callable[[], bool]:
        """What the first rank decides, later: `decide` may be called now or when the answer is asked for."""
        return decide

    def shared(self, value: T) -> T:
        """The first rank's value, a plain one."""
        return value

    def collected(self, own: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """What every rank has made, on the first one; nothing on the others.

        Args:
            own: uint8 on the CPU; None on ranks for which there is no shape.
            shapes: of the ranks' tensors, of as many ranks as have made one.
        """
        assert own is not None
        return [own]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar on the device over all ranks; the host does not wait for an accelerator."""
        return value

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the first one's weights; on the CPU."""

    def share_state(self, saved: tuple[Sets, dict[str, Any]] | None) -> tuple[Sets, dict[str, Any]] | None:
        """What the first rank has loaded: tensors on the CPU and plain values, or None."""
        return saved

    def replicated(self, model: nn.Module) -> nn.Module:
        """The network to be called in training: its backward pass averages the gradients over the ranks."""
        return model


ALONE = Ranks()


class SeveralRanks(Ranks):
    """One of several, in a process group that serves tensors on the CPU (gloo) and on GPUs (NCCL).

    Args:
        rank: of this process.
        num_ranks: how many they are.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def ask(self, decide: Callable[[], bool]) -> Callable[[], bool]:
        """What the first rank decides now; the answer travels while others compute."""
        import torch.distributed as dist

        decision = torch.tensor(int(self.is_first and decide()))
        travelling = dist.broadcast(decision, src=0, async_op=True)

        def answer() -> bool:
            if travelling is not None:
                travelling.wait()
            return bool(decision)

        return answer

    def shared(self, value: T) -> T:
        """The first rank's value."""
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, device=CPU)
        return values[0]

    def collected(self, own: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """What every rank has made, on the first one."""
        import torch.distributed as dist

        if not self.is_first:
            if own is not None:
                dist.send(own.contiguous(), dst=0)
            return []
        assert own is not None
        others = [torch.empty(shape, dtype=torch.uint8) for shape in shapes[1:]]
        for rank, tensor in enumerate(others, start=1):
            dist.recv(tensor, src=rank)
        return [own, *others]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar on the device over all ranks."""
        import torch.distributed as dist

        total = value.clone()
        dist.all_reduce(total)
        return total / self.num_ranks

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the first one's weights."""
        import torch.distributed as dist

        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def share_state(self, saved: tuple[Sets, dict[str, Any]] | None) -> tuple[Sets, dict[str, Any]] | None:
        """What the first rank has loaded."""
        import torch.distributed as dist

        described = None
        if saved is not None:
            sets, info = saved
            forms = {kind: {name: (t.shape, t.dtype) for name, t in named.items()} for kind, named in sets.items()}
            described = forms, info
        if (described := self.shared(described)) is None:
            return None
        forms, info = described
        if saved is None:
            sets = {
                kind: {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in named.items()}
                for kind, named in forms.items()
            }
        for named in sets.values():
            for tensor in named.values():
                dist.broadcast(tensor, src=0)
        return sets, info

    def replicated(self, model: nn.Module) -> nn.Module:
        """The network in DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextmanager
def averaging(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether backward passes of the block average gradients over the ranks: only a batch's last one needs to.

    Args:
        network: from `Ranks.replicated`.
        wanted: now.
    """
    with nullcontext() if wanted or not hasattr(network, "no_sync") else network.no_sync():  # type: ignore[operator]
        yield
