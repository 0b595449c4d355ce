"""What the processes that share every batch do together: agree, average gradients, divide weights, gather.

A process that is alone never imports `torch.distributed`. See `maskdm.company` for where the others come from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def all(self, flag: Tensor) -> Tensor:
        """Whether a flag on the device is true on every rank."""
        return flag

    def share_weights(self, model: nn.Module) -> None:
        """Give every rank the first one's weights; on the CPU."""

    def share_state(self, saved: tuple[Sets, dict[str, Any]] | None) -> tuple[Sets, dict[str, Any]] | None:
        """What the first rank has loaded: tensors on the CPU and plain values, or None."""
        return saved

    def replicated(self, model: nn.Module) -> nn.Module:
        """The network to be called in training: its backward pass averages the gradients over the ranks."""
        return model

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Divide the weights, and with them gradients and moments, among the ranks.

        Args:
            model: on the CPU; changed in place and moved to `device`.
            blocks: parts of it whose weights are fetched together.
            device: of this rank.
        """
        model.to(device)


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

    def all(self, flag: Tensor) -> Tensor:
        """Whether a flag on the device is true on every rank."""
        return self.mean(flag.float()) == 1

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
        """The network in DistributedDataParallel; a sharded one averages gradients by itself."""
        from torch.nn.parallel import DistributedDataParallel

        if is_sharded(model):
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
        """Divide the weights by FSDP2's `fully_shard`, block by block, so that no GPU has to hold all of them."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # what it warns of, changing the network's output in place, is not done
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (self.num_ranks,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are divided among the ranks."""
    return hasattr(model, "set_requires_gradient_sync")  # FSDP2 adds it


@contextmanager
def averaging(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether backward passes of the block average gradients over the ranks: only a batch's last one needs to.

    A sharded network averages them at every one: else each rank would have to hold all of them.

    Args:
        network: from `Ranks.replicated`.
        wanted: now.
    """
    with nullcontext() if wanted or not hasattr(network, "no_sync") else network.no_sync():  # type: ignore[operator]
        yield


def whole(sets: Sets) -> Sets:
    """The tensors of a state in full; every rank must ask, where they are divided. Others are left as they are."""
    return {kind: {name: _whole(tensor) for name, tensor in named.items()} for kind, named in sets.items()}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is divided among the ranks; another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def stored_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor where and as `other` is: on its device, and divided among the ranks if that is."""
    if not hasattr(other, "to_local"):
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    mesh = other.device_mesh  # type: ignore[attr-defined]
    placements = other.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(other.device), mesh, placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
