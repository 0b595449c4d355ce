"""What the shapes of a network's tensors say about it, and whether they are all there: before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from maskdm.base.printable import printable
from maskdm.config import ModelConfig, Params
from maskdm.method.backbones.uvit import UViT

Shapes = Mapping[str, tuple[int, ...]]
BLOCK = re.compile(r"(in|out)_blocks\.(\d+)\.")


@dataclass(frozen=True)
class UViTShape:
    """A U-ViT as far as shapes tell it: all but the number of heads and how patches are cut.

    Attributes:
        dim: D.
        depth: blocks.
        hidden_dim: of the blocks' MLPs.
        num_patches: N.
        patch_dim: P, pixels of a patch.
        num_classes: 0 without a class token.
        qkv_bias: whether queries, keys and values have biases.
        mlp_time_embed: whether an MLP makes the time token.
    """

    dim: int
    depth: int
    hidden_dim: int
    num_patches: int
    patch_dim: int
    num_classes: int
    qkv_bias: bool
    mlp_time_embed: bool

    @property
    def mlp_ratio(self) -> float:
        """So that int(dim · mlp_ratio) is the hidden size."""
        ratio = self.hidden_dim / self.dim
        return ratio if int(self.dim * ratio) == self.hidden_dim else math.nextafter(ratio, math.inf)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of all tensors of that network."""
        config = ModelConfig(
            patch_size=1,
            dim=self.dim,
            depth=self.depth,
            num_heads=1,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            mlp_time_embed=self.mlp_time_embed,
            class_conditional=self.num_classes > 0,
        )
        with torch.device("meta"):
            model = UViT(config, self.num_patches, self.patch_dim, self.num_classes)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def differences(self, other: UViTShape) -> list[str]:
        """What differs, as `dim is 16, not 32`: here, not there."""
        here, there = asdict(self), asdict(other)
        return [f"{key} is {here[key]}, not {there[key]}" for key in here if here[key] != there[key]]


def described_by(params: Params, num_classes: int) -> UViTShape:
    """The network that params describe.

    Args:
        params: an experiment.
        num_classes: of its dataset; counts only for a class-conditional network.
    """
    model = params.model
    return UViTShape(
        dim=model.dim,
        depth=model.depth,
        hidden_dim=int(model.dim * model.mlp_ratio),
        num_patches=params.grid.num_patches,
        patch_dim=params.patch_dim,
        num_classes=num_classes if model.class_conditional else 0,
        qkv_bias=model.qkv_bias,
        mlp_time_embed=model.mlp_time_embed,
    )


def read_shape(shapes: Shapes, shown: Callable[[str], str] = str) -> UViTShape:
    """The network that has tensors of these shapes, every one of them and no other.

    Args:
        shapes: by the names of `UViT.named_parameters`.
        shown: how a message calls a tensor: its name in the file.

    Raises:
        ValueError: tensors are missing, foreign, or do not fit each other.
    """
    dim, patch_dim = _sides(shapes, "patch_embed.proj.weight", 2, shown)
    one, num_tokens, _ = _sides(shapes, "pos_embed", 3, shown)
    num_classes = _sides(shapes, "label_emb.weight", 2, shown)[0] if "label_emb.weight" in shapes else 0
    num_extra = 2 if num_classes else 1
    if num_tokens <= num_extra or one != 1:
        raise ValueError(
            f"{shown('pos_embed')} is {_times(shapes['pos_embed'])}: expected 1 × ({num_extra} + patches) × dim"
        )
    if dim % 2:
        raise ValueError(f"dim {dim} (of {shown('patch_embed.proj.weight')}) is odd: the time embedding needs pairs")
    shape = UViTShape(
        dim=dim,
        depth=_depth(shapes),
        hidden_dim=_sides(shapes, "mid_block.mlp.fc1.weight", 2, shown)[0],
        num_patches=num_tokens - num_extra,
        patch_dim=patch_dim,
        num_classes=num_classes,
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
        mlp_time_embed=any(name.startswith("time_embed.") for name in shapes),
    )
    _check_tensors(shapes, shape.tensors(), shown)
    return shape


def _sides(shapes: Shapes, name: str, num_sides: int, shown: Callable[[str], str]) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{shown(name)} is missing")
    if len(shapes[name]) != num_sides or 0 in shapes[name]:
        raise ValueError(f"{shown(name)} is {_times(shapes[name])}: expected {num_sides} sides, none of them 0")
    return shapes[name]


def _depth(shapes: Shapes) -> int:
    """How many blocks there are.

    Raises:
        ValueError: not as many behind the middle as before it.
    """
    found = {match.groups() for name in shapes if (match := BLOCK.match(name))}
    num_in, num_out = (sum(1 for kind, _ in found if kind == side) for side in ("in", "out"))
    if num_in != num_out:
        raise ValueError(
            f"there are {num_in} in_blocks and {num_out} out_blocks: expected as many, for each pair has a long skip"
        )
    return 2 * num_in + 1


def _check_tensors(shapes: Shapes, expected: Shapes, shown: Callable[[str], str]) -> None:
    missing = [f"{shown(name)} is missing" for name in expected if name not in shapes]
    foreign = [f"{printable(shown(name))} is no part of this network" for name in shapes if name not in expected]
    misfits = [
        f"{shown(name)} is {_times(shapes[name])}: expected {_times(expected[name])}"
        for name in expected
        if name in shapes and tuple(shapes[name]) != expected[name]
    ]
    if wrong := [*missing, *foreign, *misfits]:
        more = f" (and {len(wrong) - 1} tensors more)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}")


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape) or "a single number"
