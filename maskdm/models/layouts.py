"""Checkpoints of other code, and the same weights by our names.

Layout `maskdm`, of MaskDM's code: {"model": {"model.NAME": …}, "ema": {"ema_model.model.NAME": …}, …}, where NAME is
    the name in U-ViT after `encoder.`, except `encoder.encoder_pos_embed` and the last layer, `encoder_to_output`.
Layout `u-vit`, of U-ViT's code: {NAME: …}.

Source: Bao et al. 2022 (arXiv 2209.12152) and MaskDM (arXiv 2306.11363); the names of tensors are those of their code.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maskdm.base.errors import printable
from maskdm.config.paths import WeightSet
from maskdm.method.backbones.uvit import UViT
from maskdm.models.exported import misfit, times

ENTRIES: dict[str, tuple[WeightSet, str]] = {"model": ("raw", "model."), "ema": ("ema", "ema_model.model.")}
EMBEDDING, POSITIONS, CLASSES = "patch_embed.proj.weight", "pos_embed", "label_emb.weight"
HIDDEN = "mid_block.mlp.fc1.weight"


class Sizes(NamedTuple):
    """What the shapes of its tensors tell of a network.

    Attributes:
        model: the section `model` of params.yaml, without the number of heads.
        image_size: side of the square images in pixels.
        channels: 1 or 3.
        num_classes: 0 if the network is not class-conditional.
    """

    model: dict[str, Any]
    image_size: int
    channels: int
    num_classes: int


@dataclass(frozen=True)
class Network:
    """One set of weights of a file.

    Attributes:
        state: the tensors by our names, with the shapes of the file.
        names: the names in the file by our names; empty if they are the same.
        prefix: the prefix of all names in the file.
    """

    state: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def shown(self, name: str) -> str:
        """The name that a tensor of ours has in the file, or would have."""
        if name in self.names or not self.prefix:
            return self.names.get(name, name)
        if name.startswith("decoder_pred."):
            return self.prefix + name.replace("decoder_pred", "encoder_to_output")
        return f"{self.prefix}encoder.{'encoder_' if name == POSITIONS else ''}{name}"

    def sizes(self) -> Sizes:
        """Derive the sizes of the network from the shapes of its tensors.

        Raises:
            ValueError: a tensor is missing or has another number of sides, or the images are not square, grey or RGB.
        """
        dim, channels, patch, _ = self._shape(EMBEDDING, "dim × channels × patch × patch")
        if channels not in (1, 3):
            raise ValueError(
                f"{self.shown(EMBEDDING)} takes {channels} channels: expected 1 (grey) or 3 (RGB); networks on the "
                "latents of an autoencoder can't be imported"
            )
        num_classes = self._shape(CLASSES, "classes × dim")[0] if CLASSES in self.state else 0
        num_extra = 2 if num_classes else 1
        num_patches = self._shape(POSITIONS, f"1 × ({num_extra} + patches) × dim")[1] - num_extra
        side = math.isqrt(max(num_patches, 0))
        if num_patches < 1 or side * side != num_patches:
            raise ValueError(f"its position embeddings are of {num_patches} patches, which do not form a square")
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
        """Float32 copies of the tensors that fit a network of ours.

        The convolution (D, C, p, p) becomes a matrix (D, p·p·C) over pixels in the order (row, column, channel).

        Raises:
            ValueError: tensors are missing, unknown or of other shapes, or hold values that are not finite.
        """
        state = {**self.state, EMBEDDING: self.state[EMBEDDING].permute(0, 2, 3, 1).flatten(1)}
        if reason := misfit(model, state, self.shown):
            raise ValueError(reason)
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.shown(name)} holds values that are infinite or not numbers")
        return {name: tensor.detach().float().contiguous().clone() for name, tensor in state.items()}

    def _shape(self, name: str, expected: str) -> tuple[int, ...]:
        """The shape of a tensor, compared with the expected sides: sides of the same name have the same length."""
        if name not in self.state:
            raise ValueError(f"{self.shown(name)} is missing")
        shape, sides = tuple(self.state[name].shape), expected.split(" × ")
        is_as_expected = len(shape) == len(sides) and len({*zip(sides, shape, strict=True)}) == len({*sides})
        if not is_as_expected or 0 in shape:
            raise ValueError(f"{self.shown(name)} is {times(shape)}: expected {expected}")
        return shape


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file of other code.

    Attributes:
        layout: whose code wrote it.
        networks: the networks by set of weights.
        ignored: what else is in the file, for people.
        betas: the variances β_t of its diffusion, (T,); None if the file does not have them.
    """

    layout: Literal["maskdm", "u-vit"]
    networks: dict[WeightSet, Network]
    ignored: list[str]
    betas: Tensor | None = None


def read_checkpoint(content: Any) -> Checkpoint:
    """Recognise the layout of a checkpoint, and find the weights in it.

    Args:
        content: what `extractors.load_plain` returned.

    Raises:
        ValueError: it has neither layout, or entries that are not weights.
    """
    expected = f"expected MaskDM's, a dict with `model` and `ema`, or U-ViT's, a dict with `{EMBEDDING}`"
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}: {expected}")
    if any(isinstance(content.get(entry), Mapping) for entry in ENTRIES):
        checkpoint = _maskdm(content)
    elif "final_layer.weight" in content:
        raise ValueError(
            "it is U-ViT's with a final 3×3 convolution over the whole image (final_layer), which this network does "
            "not have: it sees only visible patches, and a convolution needs their neighbours. Without that layer it "
            "would compute another function, so it can't be imported"
        )
    elif EMBEDDING in content:  # the weights that U-ViT releases are averaged
        checkpoint = Checkpoint("u-vit", {"ema": Network({str(name): value for name, value in content.items()})}, [])
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
            ours = _our_name(name.removeprefix(prefix))
            if (twin := names.setdefault(ours, name)) != name:
                raise ValueError(f"{printable(twin)} and {printable(name)} are the same tensor of the network")
        networks[which] = Network({ours: given[name] for ours, name in names.items()}, names, prefix)
        betas = given.get("betas", betas)
    return Checkpoint("maskdm", networks, ignored, betas if isinstance(betas, Tensor) and betas.ndim == 1 else None)


def _our_name(theirs: str) -> str:
    """Our name of a tensor of MaskDM; a tensor that this network does not have keeps its name."""
    first, _, rest = theirs.partition(".")
    if first == "encoder_to_output":
        return f"decoder_pred.{rest}"
    if first != "encoder" or rest.startswith((POSITIONS, "decoder_pred.")):
        return theirs
    return {"encoder_pos_embed": POSITIONS, "label_emb": CLASSES}.get(rest, rest)
