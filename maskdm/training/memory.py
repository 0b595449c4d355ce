"""Peak memory, counted on the real network without computing it, and the micro-batches that fit into a device's.

The network runs on fake tensors: they have shapes, types and lifetimes and no content, so that a batch of any size
costs neither time nor memory, and the storages are those that a real step would keep. Against the peak
resident size of stages on a CPU (dim 256 and 512, batches of 8 to 50) the counts were off by −12 to +8 %.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskdm.base.checksums import short_hash
from maskdm.config import Params, StageConfig
from maskdm.method.backbones.building import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import Diffusion, Draws, masked_dsm_loss
from maskdm.method.sampling import on_images
from maskdm.training.devices import Compute

NUM_CLASSES = 10  # of a class-conditional network before the data are known: the number costs no time
FILLED = 0.85  # of a device's memory; the rest is for what backward makes and gives back, and for fragments
_known: dict[str, int] = {}  # micro-batch sizes of this process: counting takes half a second

# Python, PyTorch's libraries and what their kernels keep: the resident size of a stage with a tiny network, measured
# on Linux with the CPU build of torch 2.13 as 0.40 GiB. On a GPU it is the host's memory, which is not counted here.
PROCESS_BYTES = {"cpu": 0.40 * 2**30}
# float32 arrays as large as the images of a sampling batch: x_t, the prediction, x_0, the direction, a product.
SAMPLER_ARRAYS = 5


def micro_batch_size(
    params: Params,
    compute: Compute,
    config: StageConfig,
    num_visible: int,
    num_ranks: int = 1,
    taken: int = 0,
) -> int:
    """How many images of a batch enter the network at once on a rank: as given, or for `auto` the most that fit.

    A function of the experiment and the device's size alone, not of what is free at the moment, for it decides in which
    order gradients are added up.

    Args:
        params: the experiment.
        compute: the device.
        config: of the stage.
        num_visible: S.
        num_ranks: that share the batch.
        taken: bytes of the device that are in use otherwise: by images kept there.
    """
    share = config.batch_size // num_ranks
    if config.micro_batch_size != "auto":
        return min(config.micro_batch_size or share, share)
    there = int(FILLED * compute.memory_bytes) // (num_ranks if compute.device.type == "cpu" else 1) - taken
    sizes = (params.dataset.image_size, params.dataset.channels, share, num_visible, there)
    key = short_hash(params.model, params.compute, sizes)
    if key not in _known:
        _known[key] = _largest_that_fits(MemoryCounter(params, compute), there, share, num_visible)
    return _known[key]


def _largest_that_fits(counter: MemoryCounter, there: int, share: int, num_visible: int) -> int:
    """The largest divisor of a rank's share of the batch; 1 where even that does not fit."""
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    fitting = bisect_right(sizes, there, key=lambda size: counter.training(share, size, num_visible))
    return sizes[max(0, fitting - 1)]


class MemoryCounter:
    """Counts what stages of an experiment hold at their peak.

    Args:
        params: the experiment.
        compute: device, precision and attention kernel, on which it depends what is saved for backward.
    """

    def __init__(self, params: Params, compute: Compute) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

        self._params, self._compute = params, compute
        self._fake = FakeTensorMode()
        self._model = self._fake_model(params.model.depth)
        self.num_parameters = sum(p.numel() for p in self._model.parameters())

    def training(self, batch_size: int, micro_batch_size: int, num_visible: int) -> int:
        """Bytes at the peak of a training stage.

        The activations saved for backward by a micro-batch; a batch of images and its noise.
        """
        image = self._image_bytes + 4 * num_visible * self._params.patch_dim
        activations = self.saved_for_backward(micro_batch_size, num_visible)
        return self.states + activations + batch_size * image + self._process_bytes

    @property
    def states(self) -> int:
        """Bytes of weights, gradients, two moments and the average, in float32."""
        return 5 * 4 * self.num_parameters

    def sampling(self, batch_size: int, num_samples: int) -> int:
        """Bytes at the peak of the sampling stage: a checkpoint and the network, activations, the images drawn."""
        checkpoint_and_model = 3 * 4 * self.num_parameters
        arrays = SAMPLER_ARRAYS * batch_size * self._image_bytes
        drawn = num_samples * self._image_bytes // 4  # uint8
        return checkpoint_and_model + self.alive_while_sampling(batch_size) + arrays + drawn + self._process_bytes

    def saved_for_backward(self, batch_size: int, num_visible: int) -> int:
        """Bytes of activations that one forward pass of the loss keeps for backward.

        All pairs of an in and an out block but the innermost keep the same: one of them is counted for all. Where
        activations are computed again, what enters each block is kept, and the inside of a pair at a time.
        """
        depth = self._params.model.depth
        if self._params.compute.activation_checkpointing:
            kept = depth * batch_size * (num_visible + 2) * 4 * self._params.model.dim
            return kept + self._saved_at_depth(3, batch_size, num_visible)
        if depth <= 5:
            return self._saved_at_depth(depth, batch_size, num_visible)
        shallow, deeper = (self._saved_at_depth(d, batch_size, num_visible) for d in (3, 5))
        return shallow + (depth // 2 - 1) * (deeper - shallow)

    def alive_while_sampling(self, batch_size: int) -> int:
        """The most bytes that one evaluation of the network without gradients holds at a time."""
        params, (height, width, channels) = self._params, self._params.dataset.shape
        with self._fake, self._compute.device, self._compute.context(), torch.inference_mode():
            t, labels = torch.zeros(2, batch_size, dtype=torch.int64)
            predict = on_images(self._model, params.model.patch_size, params.grid, labels)
            x_t = torch.zeros(batch_size, channels, height, width)
            return peak_alive_bytes(lambda: predict(x_t, t))

    @property
    def _image_bytes(self) -> int:
        """An image in float32."""
        return 4 * math.prod(self._params.dataset.shape)

    @property
    def _process_bytes(self) -> int:
        return int(PROCESS_BYTES.get(self._compute.device.type, 0))

    def _fake_model(self, depth: int) -> UViT:
        config = self._params.model.model_copy(update={"depth": depth})
        compute = self._params.compute.model_copy(update={"activation_checkpointing": False})
        with self._fake, self._compute.device:
            return build_model(self._params.model_copy(update={"model": config, "compute": compute}), NUM_CLASSES)

    def _saved_at_depth(self, depth: int, batch_size: int, num_visible: int) -> int:
        model = self._fake_model(depth)
        with self._fake, self._compute.device, self._compute.context():
            inputs = self._training_inputs(batch_size, num_visible)
            return saved_bytes(lambda: masked_dsm_loss(model, *inputs), model.parameters())

    def _training_inputs(self, batch_size: int, num_visible: int) -> tuple[Diffusion, Tensor, Draws, int, Tensor]:
        params, (height, width, channels) = self._params, self._params.dataset.shape
        diffusion = Diffusion(2, "cosine", params.diffusion.prediction, self._compute.device)
        indices = torch.zeros(batch_size, dtype=torch.int64)
        draws = Draws(
            t=indices,
            visible_idx=torch.zeros(batch_size, num_visible, dtype=torch.int64),
            noise=torch.zeros(batch_size, num_visible, params.patch_dim),
            flip=torch.zeros(batch_size, dtype=torch.bool),
        )
        x_0 = torch.zeros(batch_size, channels, height, width)
        return diffusion, x_0, draws, params.model.patch_size, indices


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`: every storage once, parameters left out."""
    excluded = {parameter.untyped_storage()._cdata for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # its graph keeps the storages alive, so that no two share an address
    del kept
    return sum(storages.values())


def peak_alive_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors made by `run` that are alive at a time."""
    with _AliveBytes() as alive:
        run()
    return alive.peak


class _AliveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)
