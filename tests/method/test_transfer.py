from __future__ import annotations

import pytest
import torch

from maskdm.config.geometry import Grid
from maskdm.method.transfer import adapted_weights, resized_positions


def positions(grid: Grid, num_extra: int, scale: int = 1) -> torch.Tensor:
    """Embeddings (1, E+N, 2) of the patches' centres in units of the image's side; extra tokens hold 7 and more."""
    rows = (torch.arange(grid.rows) + 0.5) / grid.rows
    cols = (torch.arange(grid.cols) + 0.5) / grid.cols
    centres = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).reshape(1, -1, 2)
    extra = 7.0 + torch.arange(2 * num_extra).reshape(1, num_extra, 2)
    return torch.cat([extra, centres], dim=1)


@pytest.mark.parametrize("num_extra", [1, 2])
@pytest.mark.parametrize(("there", "here"), [((8, 8), (16, 16)), ((16, 16), (8, 8)), ((4, 8), (8, 4))])
def test_a_patch_gets_the_position_embedding_of_its_place_in_the_image(
    num_extra: int, there: tuple[int, int], here: tuple[int, int]
) -> None:
    resized = resized_positions(positions(Grid(*there), num_extra), num_extra, Grid(*there), Grid(*here))
    expected = positions(Grid(*here), num_extra)
    assert resized.shape == expected.shape
    torch.testing.assert_close(resized[:, :num_extra], expected[:, :num_extra])
    inner = resized[:, num_extra:].reshape(*here, 2)[2:-2, 2:-2] if min(here) > 4 else resized[:, num_extra:].mean(1)
    wanted = expected[:, num_extra:].reshape(*here, 2)[2:-2, 2:-2] if min(here) > 4 else expected[:, num_extra:].mean(1)
    torch.testing.assert_close(inner, wanted, atol=0.02, rtol=0)


def test_weights_for_the_same_grid_are_not_changed() -> None:
    state = {"pos_embed": torch.randn(1, 17, 8), "norm.weight": torch.randn(8)}
    adapted, changes = adapted_weights(state, {}, Grid(4, 4), Grid(4, 4))
    assert changes == []
    assert all(adapted[name] is state[name] for name in state)


def test_what_does_not_fit_is_changed_and_named() -> None:
    state = {"pos_embed": torch.randn(1, 18, 8), "label_emb.weight": torch.randn(5, 8)}
    fresh = {"pos_embed": torch.randn(1, 66, 8), "label_emb.weight": torch.randn(3, 8)}
    adapted, changes = adapted_weights(state, fresh, Grid(4, 4), Grid(8, 8))
    assert changes == ["position embeddings interpolated from 4×4 to 8×8 patches", "class embeddings initialised again"]
    assert adapted["pos_embed"].shape == (1, 66, 8)
    assert adapted["label_emb.weight"] is fresh["label_emb.weight"]
    assert state["pos_embed"].shape == (1, 18, 8), "what was given is left alone"
