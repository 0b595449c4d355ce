"""Pretrained weights of one dataset, adapted to another dataset: to its grid and its classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdm.config.geometry import Grid


def adapted_weights(
    state: dict[str, Tensor], fresh: dict[str, Tensor], old: Grid, new: Grid
) -> tuple[dict[str, Tensor], list[str]]:
    """Pretrained weights adapted to another dataset, and what was changed.

    If the grids differ, position embeddings are interpolated. Class embeddings come from `fresh`, because the datasets
    have different classes.

    Args:
        state: the pretrained weights, by parameter name.
        fresh: the initial weights of training from scratch, by parameter name.
        old: the token grid of pretraining.
        new: the token grid of finetuning.

    Returns:
        the weights by parameter name; one sentence for the user about each change.
    """
    carried, changes = dict(state), []
    if old != new:
        num_extra = state["pos_embed"].shape[1] - old.num_patches
        carried["pos_embed"] = resized_positions(state["pos_embed"], num_extra, old, new)
        changes.append(f"position embeddings interpolated from {old.rows}×{old.cols} to {new.rows}×{new.cols} patches")
    if "label_emb.weight" in state:
        carried["label_emb.weight"] = fresh["label_emb.weight"]
        changes.append("class embeddings initialised again")
    return carried, changes


def resized_positions(pos_embed: Tensor, num_extra_tokens: int, old: Grid, new: Grid) -> Tensor:
    """Position embeddings for another grid, bicubic and antialiased: (1, E+N, D) → (1, E+N', D).

    Those of the E extra tokens stay as they are.

    Source: Dosovitskiy et al. 2020 (ViT, arXiv 2010.11929), section 3.2.
    """
    extra, patches = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, rows, cols)
    image = F.interpolate(image, tuple(new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([extra, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
