"""The layouts of other code's checkpoints, and the same weights by our names.

`maskdm`: MaskDM's own code: {"model": {"model.NAME": …}, "ema": {"ema_model.model.NAME": …}, …}, where NAME is U-ViT's
    below `encoder.`, but for `encoder.encoder_pos_embed` and the last layer, `encoder_to_output`.
`u-vit`: U-ViT's: {NAME: …}, where a 3×3 convolution over the whole image, `final_layer`, may end the network.

Source: Bao et al. 2022 (arXiv 2209.12152) and MaskDM (arXiv 2306.11363), as their code names the tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from maskdm.base.printable import printable
from maskdm.config.formats import WeightSet
from maskdm.method.backbones.uvit_shape import UViTShape, read_shape

Layout = Literal["maskdm", "u-vit"]
State = dict[str, Tensor]
ENTRIES: dict[str, tuple[WeightSet, str]] = {"model": ("raw", "model."), "ema": ("ema", "ema_model.model.")}
EMBEDDING = "patch_embed.proj.weight"
FINAL_LAYER = ("final_layer.weight", "final_layer.bias")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of other code holds.

    Attributes:
        layout: whose it is.
        sets: weights by our names, float32.
        shape: of the network.
        patch_size: p.
        channels: C of the images.
        ignored: what else is in the file, for people.
        betas: the variances β_t of its diffusion, (T,); None where the file has none.
    """

    layout: Layout
    sets: dict[WeightSet, State]
    shape: UViTShape
    patch_size: int
    channels: int
    ignored: tuple[str, ...] = ()
    betas: Tensor | None = None

    @property
    def image_size(self) -> int:
        """The side of the square images.

        Raises:
            ValueError: the patches fill no square.
        """
        side = math.isqrt(self.shape.num_patches)
        if side * side != self.shape.num_patches:
            raise ValueError(f"its position embeddings are of {self.shape.num_patches} patches, which fill no square")
        return side * self.patch_size


@dataclass(frozen=True)
class _Network:
    """One set of weights as it lies in the file.

    Attributes:
        state: by our names, shapes as in the file.
        shown: our name → the one in the file, for messages.
    """

    state: State
    shown: Callable[[str], str]


def read_checkpoint(content: Any, most_bytes: int) -> Checkpoint:
    """Tell the layout of a checkpoint, and take the weights out of it.

    Args:
        content: of `extractors.load_plain`.
        most_bytes: what the tensors may have together: as much as can be in the file.

    Raises:
        ValueError: it is of neither layout, incomplete, or of a network that ours can't compute.
    """
    expected = f"expected MaskDM's, a dict with `model` and `ema`, or U-ViT's, a dict with `{EMBEDDING}`"
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}: {expected}")
    if any(isinstance(content.get(entry), Mapping) for entry in ENTRIES):
        return _read_maskdm(content, most_bytes)
    if EMBEDDING in content:
        return _read_uvit(content, most_bytes)
    names = ", ".join(printable(str(name), 60) for name in list(content)[:5]) or "nothing"
    raise ValueError(f"its layout is not known (its first entries: {names}): {expected}")


def _read_maskdm(content: Mapping[Any, Any], most_bytes: int) -> Checkpoint:
    ignored, networks = [printable(str(name), 60) for name in content if name not in ENTRIES], {}
    for entry, (which, prefix) in ENTRIES.items():
        given = content.get(entry)
        if isinstance(given, Mapping):
            networks[which] = _network_of_maskdm(entry, given, prefix)
            others = [str(name) for name in given if not str(name).startswith(prefix)]
            ignored += [f"{entry}: {name}" for name in _grouped(others)]
        elif entry in content:
            ignored.append(f"{entry} (no weights)")
    model = content.get("model")
    betas = model.get("betas") if isinstance(model, Mapping) else None
    return _checkpoint("maskdm", networks, tuple(ignored), most_bytes, betas)


def _network_of_maskdm(entry: str, given: Mapping[Any, Any], prefix: str) -> _Network:
    state: State = {}
    names: dict[str, str] = {}
    for name in (str(name) for name in given if str(name).startswith(prefix)):
        ours = _named_by_us(name.removeprefix(prefix))
        if ours is None:
            raise ValueError(f"{printable(name)} is no part of this network")
        if ours in state:
            raise ValueError(f"{printable(names[ours])} and {printable(name)} are the same tensor of the network")
        state[ours], names[ours] = given[name], name
    if not state:
        raise ValueError(f"its entry `{entry}` has no tensor whose name starts with `{prefix}`")
    return _Network(state, lambda ours: names.get(ours, prefix + _named_by_them(ours)))


def _named_by_us(theirs: str) -> str | None:
    """Our name of a tensor of MaskDM's; None where there can be none."""
    renamed = {"encoder.encoder_pos_embed": "pos_embed", "encoder.label_emb": "label_emb.weight"}
    if theirs in renamed:
        return renamed[theirs]
    first, _, rest = theirs.partition(".")
    if first == "encoder_to_output":
        return f"decoder_pred.{rest}"
    if first == "time_embed":
        return theirs
    is_ours_alone = rest.startswith(("pos_embed", "decoder_pred."))
    return rest if first == "encoder" and not is_ours_alone else None


def _named_by_them(ours: str) -> str:
    """MaskDM's name of a tensor of ours."""
    if ours == "pos_embed":
        return "encoder.encoder_pos_embed"
    if ours.startswith("decoder_pred."):
        return ours.replace("decoder_pred", "encoder_to_output")
    return f"encoder.{ours}"


def _read_uvit(content: Mapping[Any, Any], most_bytes: int) -> Checkpoint:
    state = {str(name): value for name, value in content.items() if name not in FINAL_LAYER}
    ignored = _final_layer_that_does_nothing(content)
    # what U-ViT releases are averaged weights
    return _checkpoint("u-vit", {"ema": _Network(state, str)}, ignored, most_bytes)


def _final_layer_that_does_nothing(content: Mapping[Any, Any]) -> tuple[str, ...]:
    """The names of the final convolution, where there is one.

    Raises:
        ValueError: it changes its input.
    """
    given = [name for name in FINAL_LAYER if name in content]
    if not given:
        return ()
    weight, bias = (content.get(name) for name in FINAL_LAYER)
    if not isinstance(weight, Tensor) or not _is_identity(weight, bias):
        raise ValueError(
            "it is U-ViT's with a final 3×3 convolution over the whole image (final_layer), which this network has "
            "not: it sees visible patches alone, and a convolution needs their neighbours. Without that layer it would "
            "compute another function, so it can't be imported"
        )
    return tuple(f"{name} (the identity)" for name in given)


def _is_identity(weight: Tensor, bias: Any) -> bool:
    """Whether a convolution (C, C, 3, 3) gives back its input."""
    if weight.ndim != 4 or weight.shape[0] != weight.shape[1] or weight.shape[0] > 8 or weight.shape[2:] != (3, 3):
        return False
    identity = torch.zeros(weight.shape)
    identity[range(len(weight)), range(len(weight)), 1, 1] = 1.0
    has_no_bias = bias is None or (isinstance(bias, Tensor) and bias.numel() <= 8 and not bias.any())
    return has_no_bias and torch.equal(weight.float(), identity)


def _checkpoint(
    layout: Layout,
    networks: Mapping[WeightSet, _Network],
    ignored: tuple[str, ...],
    most_bytes: int,
    betas: Any = None,
) -> Checkpoint:
    """Look at every tensor, then put them into our shapes."""
    for network in networks.values():
        _check_plain(network)
    if sum(_num_bytes(network.state.values()) for network in networks.values()) > most_bytes:
        raise ValueError("its tensors claim more values than the file can hold")
    cuts = {_patch_of(network) for network in networks.values()}
    sets = {which: _in_our_shapes(network) for which, network in networks.items()}
    shapes = {
        read_shape({name: tuple(tensor.shape) for name, tensor in sets[which].items()}, network.shown)
        for which, network in networks.items()
    }
    if len(shapes) > 1 or len(cuts) > 1:
        raise ValueError("its raw and its averaged weights are of different networks")
    [(channels, patch_size)], [shape] = cuts, shapes
    is_table = isinstance(betas, Tensor) and betas.ndim == 1 and _num_bytes([betas]) <= most_bytes
    return Checkpoint(layout, sets, shape, patch_size, channels, ignored, betas if is_table else None)


def _check_plain(network: _Network) -> None:
    """Every value must be a tensor of floating-point numbers."""
    for name, value in network.state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{printable(network.shown(name))} is no tensor of floating-point numbers, but {got}")


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _patch_of(network: _Network) -> tuple[int, int]:
    """(C, p) of the convolution that embeds patches."""
    name = network.shown(EMBEDDING)
    if EMBEDDING not in network.state:
        raise ValueError(f"{name} is missing")
    shape = tuple(network.state[EMBEDDING].shape)
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise ValueError(f"{name} is {'×'.join(map(str, shape))}: expected dim × channels × patch × patch")
    if shape[1] not in (1, 3):
        raise ValueError(
            f"{name} takes {shape[1]} channels: expected 1 (grey) or 3 (RGB); latents of an autoencoder are not served"
        )
    return shape[1], shape[2]


def _in_our_shapes(network: _Network) -> State:
    """Float32 copies; the convolution (D, C, p, p) as a matrix (D, p·p·C), pixels in the order (row, column, channel).

    Raises:
        ValueError: a value is infinite or no number.
    """
    converted = {}
    for name, tensor in network.state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{printable(network.shown(name))} holds values that are infinite or no numbers")
        own = tensor.permute(0, 2, 3, 1).flatten(1) if name == EMBEDDING else tensor
        converted[name] = own.detach().float().contiguous().clone()
    return converted


def _grouped(names: list[str]) -> list[str]:
    """Names by their first part, with how many there are."""
    counts = Counter(printable(name.partition(".")[0], 60) for name in names)
    return [first if count == 1 else f"{first}.* ({count})" for first, count in counts.items()]
