"""Weights that were pretrained on one dataset, made to fit another: another grid, other classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm.config.geometry import Grid


def carried_over(
    state: dict[str, Tensor], fresh: dict[str, Tensor], there: Grid, here: Grid
) -> tuple[dict[str, Tensor], list[str]]:
    """The pretrained weights of a network for another dataset, and what had to be changed.

    Position embeddings are interpolated where the grids differ. Class embeddings are those of `fresh`: class 3 there is
    not class 3 here.

    Args:
        state: the pretrained weights, by parameter name.
        fresh: the weights that the network begins with when it is trained from scratch.
        there: the token grid of pretraining.
        here: the token grid from now on.

    Returns:
        the weights; a line for people about each change.
    """
    carried, changes = dict(state), []
    if there != here:
        num_extra = state["pos_embed"].shape[1] - there.num_patches
        carried["pos_embed"] = resized_positions(state["pos_embed"], num_extra, there, here)
        changes.append(f"position embeddings interpolated from {_named(there)} to {_named(here)} patches")
    if "label_emb.weight" in state:
        carried["label_emb.weight"] = fresh["label_emb.weight"]
        changes.append("class embeddings drawn anew")
    return carried, changes


def resized_positions(pos_embed: Tensor, num_extra_tokens: int, there: Grid, here: Grid) -> Tensor:
    """Position embeddings for another grid: (1, E+N, D) → (1, E+N', D), bicubic, antialiased; the E extra ones stay.

    Source: Dosovitskiy et al. 2020 (ViT, arXiv 2010.11929), section 3.2.
    """
    extra, patches = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    image = patches.reshape(1, *there, -1).permute(0, 3, 1, 2)  # (1, D, rows, cols)
    image = F.interpolate(image, tuple(here), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([extra, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _named(grid: Grid) -> str:
    return f"{grid.rows}×{grid.cols}"
