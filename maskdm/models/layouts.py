"""The layouts of other code's checkpoints, and the same weights by our names.

`maskdm`: MaskDM's own code: {"model": {"model.NAME": …}, "ema": {"ema_model.model.NAME": …}, …}, where NAME is U-ViT's
    below `encoder.`, but for `encoder.encoder_pos_embed` and the last layer, `encoder_to_output`.
`u-vit`: U-ViT's: {NAME: …}, where a 3×3 convolution over the whole image, `final_layer`, may end the network.

Source: Bao et al. 2022 (arXiv 2209.12152) and MaskDM (arXiv 2306.11363), as their code names the tensors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskdm.base.errors import printable
from maskdm.config.paths import WeightSet
from maskdm.method.backbones.uvit import UViT
from maskdm.models.exported import misfit, times

ENTRIES: dict[str, tuple[WeightSet, str]] = {"model": ("raw", "model."), "ema": ("ema", "ema_model.model.")}
EMBEDDING, POSITIONS, CLASSES = "patch_embed.proj.weight", "pos_embed", "label_emb.weight"
HIDDEN = "mid_block.mlp.fc1.weight"
FINAL_LAYER = ("final_layer.weight", "final_layer.bias")


class Sizes(NamedTuple):
    """What shapes tell of a network: section `model` of params.yaml but for the number of heads, images, classes."""

    model: dict[str, Any]
    image_size: int
    channels: int
    num_classes: int


@dataclass(frozen=True)
class Network:
    """One set of weights as it lies in a file.

    Attributes:
        state: by our names, shapes as in the file.
        names: in the file, by ours; none where they are ours.
        prefix: of MaskDM's names.
    """

    state: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def shown(self, name: str) -> str:
        """What the file calls a tensor of ours, or would."""
        if name in self.names or not self.prefix:
            return self.names.get(name, name)
        if name.startswith("decoder_pred."):
            return self.prefix + name.replace("decoder_pred", "encoder_to_output")
        return f"{self.prefix}encoder.{'encoder_' if name == POSITIONS else ''}{name}"

    def sizes(self) -> Sizes:
        """Read the network off the shapes.

        Raises:
            ValueError: a tensor that tells is missing or of other sides, or the images are not square, grey or RGB.
        """
        dim, channels, patch, _ = self._shape(EMBEDDING, "dim × channels × patch × patch")
        if channels not in (1, 3):
            raise ValueError(
                f"{self.shown(EMBEDDING)} takes {channels} channels: expected 1 (grey) or 3 (RGB); latents of an "
                "autoencoder are not served"
            )
        num_classes = self._shape(CLASSES, "classes × dim")[0] if CLASSES in self.state else 0
        num_extra = 2 if num_classes else 1
        num_patches = self._shape(POSITIONS, f"1 × ({num_extra} + patches) × dim")[1] - num_extra
        side = math.isqrt(max(num_patches, 0))
        if num_patches < 1 or side * side != num_patches:
            raise ValueError(f"its position embeddings are of {num_patches} patches, which fill no square")
        hidden = self._shape(HIDDEN, "hidden × dim")[0]
        ratio = hidden / dim
        blocks = {found[1] for name in self.state if (found := re.match(r"in_blocks\.(\d+)\.", name))}
        model = {
            "patch_size": patch,
            "dim": dim,
            "depth": 2 * len(blocks) + 1,
            "mlp_ratio": ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf),
            "qkv_bias": "mid_block.attn.qkv.bias" in self.state,
            "mlp_time_embed": any(name.startswith("time_embed.") for name in self.state),
            "class_conditional": num_classes > 0,
        }
        return Sizes(model, side * patch, channels, num_classes)

    def converted(self, model: UViT) -> dict[str, Tensor]:
        """Float32 copies that fit a network of ours.

        The convolution (D, C, p, p) becomes a matrix (D, p·p·C), pixels in the order (row, column, channel).

        Raises:
            ValueError: tensors are missing, foreign, of other shapes, or hold values that are not numbers.
        """
        state = {**self.state, EMBEDDING: self.state[EMBEDDING].permute(0, 2, 3, 1).flatten(1)}
        if reason := misfit(model, state, self.shown):
            raise ValueError(reason)
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.shown(name)} holds values that are infinite or not numbers")
        return {name: tensor.detach().float().contiguous().clone() for name, tensor in state.items()}

    def _shape(self, name: str, expected: str) -> tuple[int, ...]:
        if name not in self.state:
            raise ValueError(f"{self.shown(name)} is missing")
        shape, sides = tuple(self.state[name].shape), expected.split(" × ")
        is_as_expected = len(shape) == len(sides) and len({*zip(sides, shape, strict=True)}) == len({*sides})
        if not is_as_expected or 0 in shape:  # a side of one name has one length
            raise ValueError(f"{self.shown(name)} is {times(shape)}: expected {expected}")
        return shape


@dataclass(frozen=True)
class Checkpoint:
    """What a file of other code holds.

    Attributes:
        layout: whose it is.
        networks: by the set of weights.
        ignored: what else is in the file, for people.
        betas: the variances β_t of its diffusion, (T,); None where the file has none.
    """

    layout: Literal["maskdm", "u-vit"]
    networks: dict[WeightSet, Network]
    ignored: list[str]
    betas: Tensor | None = None


def read_checkpoint(content: Any) -> Checkpoint:
    """Tell the layout of a checkpoint, and find the weights in it.

    Args:
        content: of `extractors.load_plain`.

    Raises:
        ValueError: it is of neither layout, or holds something else than weights.
    """
    expected = f"expected MaskDM's, a dict with `model` and `ema`, or U-ViT's, a dict with `{EMBEDDING}`"
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}: {expected}")
    if any(isinstance(content.get(entry), Mapping) for entry in ENTRIES):
        checkpoint = _maskdm(content)
    elif EMBEDDING in content:
        checkpoint = _uvit(content)
    else:
        names = ", ".join(printable(str(name), 60) for name in list(content)[:5]) or "nothing"
        raise ValueError(f"its layout is not known (its first entries: {names}): {expected}")
    for network in checkpoint.networks.values():
        for name, value in network.state.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                where = printable(network.shown(name))
                raise ValueError(f"{where} is not a tensor of floating-point numbers, but {got}")
    return checkpoint


def _maskdm(content: Mapping[Any, Any]) -> Checkpoint:
    networks: dict[WeightSet, Network] = {}
    ignored = [printable(str(name), 60) for name in content if name not in ENTRIES]
    betas = None
    for entry, (which, prefix) in ENTRIES.items():
        given = content.get(entry)
        if not isinstance(given, Mapping):
            ignored += [f"{entry} (no weights)"] if entry in content else []
            continue
        theirs = [name for name in map(str, given) if name.startswith(prefix)]
        others = Counter(name.partition(".")[0] for name in map(str, given) if not name.startswith(prefix))
        ignored += [f"{entry}: {printable(name, 60)}{f'.* ({n})' if n > 1 else ''}" for name, n in others.items()]
        if not theirs:
            raise ValueError(f"its entry `{entry}` has no tensor whose name starts with `{prefix}`")
        names: dict[str, str] = {}
        for name in theirs:
            ours = _named_by_us(name.removeprefix(prefix))
            if (twin := names.setdefault(ours, name)) != name:
                raise ValueError(f"{printable(twin)} and {printable(name)} are the same tensor of the network")
        networks[which] = Network({ours: given[name] for ours, name in names.items()}, names, prefix)
        betas = given.get("betas", betas)
    return Checkpoint("maskdm", networks, ignored, betas if isinstance(betas, Tensor) and betas.ndim == 1 else None)


def _named_by_us(theirs: str) -> str:
    """Our name of a tensor of MaskDM's; one that this network does not have keeps its own."""
    first, _, rest = theirs.partition(".")
    if first == "encoder_to_output":
        return f"decoder_pred.{rest}"
    if first != "encoder" or rest.startswith((POSITIONS, "decoder_pred.")):
        return theirs
    return {"encoder_pos_embed": POSITIONS, "label_emb": CLASSES}.get(rest, rest)


def _uvit(content: Mapping[Any, Any]) -> Checkpoint:
    given = [name for name in FINAL_LAYER if name in content]
    if given and not _is_identity(*(content.get(name) for name in FINAL_LAYER)):
        raise ValueError(
            "it is U-ViT's with a final 3×3 convolution over the whole image (final_layer), which this network does "
            "not have: it sees visible patches alone, and a convolution needs their neighbours. Without that layer it "
            "would compute another function, so it can't be imported"
        )
    state = {str(name): value for name, value in content.items() if name not in FINAL_LAYER}
    ignored = [f"{name} (the identity)" for name in given]
    return Checkpoint("u-vit", {"ema": Network(state)}, ignored)  # what U-ViT releases are averaged weights


def _is_identity(weight: Any, bias: Any) -> bool:
    """Whether a convolution (C, C, 3, 3) gives back its input."""
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.shape[0] != weight.shape[1]:
        return False
    has_bias = bias is not None and (not isinstance(bias, Tensor) or bool(bias.any()))
    return not has_bias and torch.equal(weight.float(), nn.init.dirac_(torch.empty(weight.shape)))
