"""U-ViT: shapes, names, equivariance, and parity with the architecture written in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import erf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from maskdm.base import rng
from maskdm.config import ModelConfig
from maskdm.config.geometry import Grid
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import (
    AttentionChoice,
    Block,
    UViT,
    plain_attention,
    timestep_embedding,
    uses_plain_attention,
    widens_softmax,
)
from maskdm.method.masks import Masking, all_visible
from tests.factories import CPU, tiny_model, tiny_params

NUM_PATCHES, PATCH_DIM, NUM_CLASSES = 16, 4, 10
BLOCK = [
    *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
]
ENDS = [
    *("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    *("norm.weight", "norm.bias", "decoder_pred.weight", "decoder_pred.bias"),
]
Inputs = dict[str, Tensor]


def network(seed: int = 0, **model: Any) -> UViT:
    return tiny_model(tiny_params(model=model), seed, NUM_CLASSES)


def inputs(num_visible: int, batch: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {
        "patches": torch.randn(batch, num_visible, PATCH_DIM, generator=generator),
        "t": torch.randint(1000, (batch,), generator=generator),
        "visible_idx": Masking("patch", Grid(4, 4), 1 - num_visible / NUM_PATCHES).draw(batch, generator),
        "labels": torch.randint(NUM_CLASSES, (batch,), generator=generator),
    }


@torch.no_grad()
def predict(model: UViT, given: Inputs, **changed: Tensor) -> Tensor:
    return model(**{**given, **changed})


# --- shapes, names, sizes


@given(
    batch=st.integers(1, 3),
    num_visible=st.integers(1, NUM_PATCHES),
    depth=st.sampled_from([1, 3, 5]),
    heads=st.sampled_from([1, 2, 4]),
    conditional=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_a_prediction_has_the_shape_of_the_visible_patches(
    batch: int, num_visible: int, depth: int, heads: int, conditional: bool
) -> None:
    model = network(depth=depth, num_heads=heads, class_conditional=conditional)
    given = inputs(num_visible, batch)
    prediction = predict(model, given)
    assert prediction.shape == given["patches"].shape
    assert prediction.isfinite().all()


def test_parameters_are_named_as_in_the_uvit_family() -> None:
    blocks = [f"{place}.{name}" for place in ("in_blocks.0", "mid_block", "out_blocks.0") for name in BLOCK]
    skips = ["out_blocks.0.skip_linear.weight", "out_blocks.0.skip_linear.bias"]
    names = dict(network().named_parameters())
    assert set(names) == {*ENDS, *blocks, *skips}
    assert names["pos_embed"].shape == (1, 1 + NUM_PATCHES, 16)
    assert names["in_blocks.0.attn.qkv.weight"].shape == (48, 16)
    assert names["out_blocks.0.skip_linear.weight"].shape == (16, 32)


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        ({"class_conditional": True}, {"label_emb.weight"}),
        ({"qkv_bias": True}, {f"{b}.attn.qkv.bias" for b in ("in_blocks.0", "mid_block", "out_blocks.0")}),
        ({"mlp_time_embed": True}, {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}),
    ],
)
def test_options_add_their_parameters_and_no_others(model: dict[str, bool], extra: set[str]) -> None:
    plain, more = (set(dict(m.named_parameters())) for m in (network(), network(**model)))
    assert more - plain == extra
    assert plain <= more


def test_the_class_has_a_position_of_its_own() -> None:
    conditional = network(class_conditional=True)
    assert conditional.pos_embed.shape == (1, 2 + NUM_PATCHES, 16)
    assert conditional.label_emb is not None
    assert conditional.label_emb.weight.shape == (NUM_CLASSES, 16)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("num_visible", [2, 8, 16])
def test_every_block_sees_the_visible_and_the_extra_tokens_alone(num_visible: int, conditional: bool) -> None:
    model = network(class_conditional=conditional, depth=5)
    seen: list[torch.Size] = []
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.register_forward_hook(lambda _, arguments, output: seen.extend([arguments[0].shape, output.shape]))
    predict(model, inputs(num_visible))
    assert seen == [(3, num_visible + 1 + conditional, 16)] * 10


# --- what the prediction depends on


@pytest.mark.parametrize("conditional", [False, True])
def test_permuting_patches_with_their_indices_permutes_the_prediction(conditional: bool) -> None:
    model, given = network(class_conditional=conditional), inputs(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    permuted = predict(model, given, patches=given["patches"][:, order], visible_idx=given["visible_idx"][:, order])
    torch.testing.assert_close(permuted, predict(model, given)[:, order], rtol=0, atol=1e-6)
    moved = predict(model, given, patches=given["patches"][:, order])  # the patches elsewhere in the image
    assert not torch.allclose(moved, predict(model, given)[:, order], atol=1e-4)


def test_rate_0_is_a_call_with_every_index_in_order() -> None:
    model, given = network(), inputs(NUM_PATCHES)
    explicit = torch.tensor([list(range(NUM_PATCHES))] * 3)
    expanded = predict(model, given, visible_idx=all_visible(3, Grid(4, 4), CPU))
    assert torch.equal(expanded, predict(model, given, visible_idx=explicit))


def test_masked_positions_take_no_part() -> None:
    model, given = network(), inputs(6, batch=1)
    before, visible = predict(model, given), given["visible_idx"][0]
    masked = [i for i in range(NUM_PATCHES) if i not in visible]
    with torch.no_grad():
        model.pos_embed[0, [1 + i for i in masked]] = float("nan")
    assert torch.equal(predict(model, given), before)
    with torch.no_grad():
        model.pos_embed[0, 1 + visible[0]] += 1
    assert not torch.allclose(predict(model, given), before)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, given = network(class_conditional=True), inputs(7)
    alone = torch.cat([predict(model, {k: v[[i]] for k, v in given.items()}) for i in range(3)])
    torch.testing.assert_close(predict(model, given), alone, rtol=0, atol=1e-6)


def test_a_conditional_prediction_depends_on_its_own_class() -> None:
    model, given = network(class_conditional=True), inputs(7)
    labels = given["labels"].clone()
    labels[1] = (labels[1] + 1) % NUM_CLASSES
    changed = (predict(model, given) - predict(model, given, labels=labels)).abs().amax(dim=(1, 2))
    assert changed[0] == changed[2] == 0
    assert changed[1] > 1e-5


def test_an_unconditional_prediction_ignores_labels() -> None:
    model, given = network(), inputs(7)
    assert torch.equal(predict(model, given), model(**{**given, "labels": None}))


def test_a_conditional_model_insists_on_labels() -> None:
    given = inputs(7)
    with pytest.raises(AssertionError, match="needs labels"):
        network(class_conditional=True)(given["patches"], given["t"], given["visible_idx"])


@pytest.mark.parametrize("mlp_time_embed", [False, True])
def test_a_prediction_depends_on_the_timestep(mlp_time_embed: bool) -> None:
    model, given = network(mlp_time_embed=mlp_time_embed), inputs(7)
    changed = (predict(model, given) - predict(model, given, t=given["t"] + 1)).abs().amax(dim=(1, 2))
    assert (changed > 0).all()


# --- parity


class Oracle:
    """U-ViT in float64 numpy, from the paper's figure 1, for one image."""

    def __init__(self, model: UViT, config: ModelConfig) -> None:
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
        self.config = config

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return standard * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, name: str, x: np.ndarray) -> np.ndarray:
        heads, width = self.config.num_heads, self.config.dim // self.config.num_heads
        q, k, v = np.split(self.linear(f"{name}.qkv", x), 3, axis=-1)
        parts = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
            parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        return self.linear(f"{name}.proj", np.concatenate(parts, axis=-1))

    def block(self, name: str, x: np.ndarray, skip: np.ndarray | None = None) -> np.ndarray:
        if skip is not None:
            x = self.linear(f"{name}.skip_linear", np.concatenate([x, skip], axis=-1))
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x))
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        return x + self.linear(f"{name}.mlp.fc2", hidden * (1 + np.vectorize(erf)(hidden / np.sqrt(2))) / 2)

    def time_token(self, t: int) -> np.ndarray:
        token = oracle_timestep_embedding([t], self.config.dim)[0]
        if self.config.mlp_time_embed:
            hidden = self.linear("time_embed.0", token)
            token = self.linear("time_embed.2", hidden / (1 + np.exp(-hidden)))
        return token

    def __call__(self, patches: np.ndarray, t: int, visible: np.ndarray, label: int) -> np.ndarray:
        extra = [self.time_token(t)]
        if self.config.class_conditional:
            extra.insert(0, self.w["label_emb.weight"][label])
        tokens = np.concatenate([extra, self.linear("patch_embed.proj", patches)])
        positions = self.w["pos_embed"][0]
        x = tokens + positions[[*range(len(extra)), *(visible + len(extra))]]
        half, skips = self.config.depth // 2, []
        for i in range(half):
            x = self.block(f"in_blocks.{i}", x)
            skips.append(x)
        x = self.block("mid_block", x)
        for i in range(half):
            x = self.block(f"out_blocks.{i}", x, skips[half - 1 - i])
        return self.linear("decoder_pred", self.norm("norm", x)[len(extra) :])


def oracle_timestep_embedding(t: list[int], dim: int) -> np.ndarray:
    angles = np.outer(t, 10_000.0 ** (-np.arange(dim // 2) / (dim // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"depth": 5, "num_heads": 4, "mlp_ratio": 2.0},
        {"depth": 5, "qkv_bias": True, "mlp_time_embed": True, "class_conditional": True},
    ],
)
def test_the_network_is_the_papers(model: dict[str, Any]) -> None:
    uvit, given = network(**model), inputs(6)
    with torch.no_grad():  # biases and norms too: after initialisation most of them would not be seen
        for i, parameter in enumerate(uvit.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    oracle = Oracle(uvit, tiny_params(model=model).model)
    expected = [
        oracle(patches.double().numpy(), int(t), visible.numpy(), int(label))
        for patches, t, visible, label in zip(*given.values(), strict=True)
    ]
    np.testing.assert_allclose(predict(uvit, given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 16, 512])
def test_timestep_embedding_is_the_papers(dim: int) -> None:
    t = [0, 1, 17, 999]
    got = timestep_embedding(torch.tensor(t), dim)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, oracle_timestep_embedding(t, dim), atol=2e-4)


# --- initialisation


def test_initialisation_depends_on_its_seed_alone() -> None:
    weights = network(seed=3).state_dict()
    torch.manual_seed(123)  # what was there before, and the global generator, do not matter
    with torch.device("meta"):
        again = build_model(tiny_params(), NUM_CLASSES)
    again.to_empty(device="cpu").initialise(rng.generator(3, "init"))
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())
    other = network(seed=4).state_dict()
    assert not torch.equal(weights["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_initialisation_leaves_the_global_generator_alone() -> None:
    model, before = network(), torch.get_rng_state()
    model.initialise(rng.generator(0, "init"))
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_weights_are_of_std_0_02_and_biases_zero() -> None:
    model = network(dim=64, class_conditional=True, mlp_time_embed=True, qkv_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            tolerance = 5 * 0.02 / (2 * parameter.numel()) ** 0.5
            assert float(parameter.detach().std()) == pytest.approx(0.02, abs=tolerance), name


# --- attention, and what is kept for backward


@pytest.mark.parametrize(
    ("choice", "device_type", "dtype", "num_tokens", "is_plain"),
    [
        ("auto", "cpu", torch.bfloat16, 512, True),
        ("auto", "cpu", torch.bfloat16, 513, False),
        ("auto", "cpu", torch.float32, 100, True),
        ("auto", "cpu", torch.float32, 101, False),
        ("auto", "cpu", torch.float64, 1, False),
        ("auto", "cuda", torch.bfloat16, 17, False),
        ("plain", "cuda", torch.bfloat16, 9999, True),
        ("fused", "cpu", torch.bfloat16, 17, False),
    ],
)
def test_attention_follows_a_rule_of_device_precision_and_tokens(
    choice: AttentionChoice, device_type: str, dtype: torch.dtype, num_tokens: int, is_plain: bool
) -> None:
    assert uses_plain_attention(choice, device_type, dtype, num_tokens) == is_plain


@pytest.mark.parametrize(
    ("device_type", "dtype", "num_tokens", "is_wide"),
    [
        ("cpu", torch.bfloat16, 15, False),
        ("cpu", torch.bfloat16, 16, True),
        ("cpu", torch.bfloat16, 31, True),
        ("cpu", torch.bfloat16, 32, False),
        ("cpu", torch.bfloat16, 257, False),
        ("cpu", torch.bfloat16, 47, False),
        ("cpu", torch.bfloat16, 48, True),
        ("cpu", torch.bfloat16, 80, False),
        ("cpu", torch.float32, 17, False),
        ("cuda", torch.bfloat16, 17, False),
    ],
)
def test_the_softmax_is_wide_where_bfloat16_does_not_fill_registers(
    device_type: str, dtype: torch.dtype, num_tokens: int, is_wide: bool
) -> None:
    assert widens_softmax(device_type, dtype, num_tokens) == is_wide


def gradients_of(model: UViT, given: Inputs) -> list[Tensor]:
    model.zero_grad()
    model(**given).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("num_visible", [1, 5, 16])
def test_plain_attention_computes_what_the_fused_one_does(num_visible: int) -> None:
    given = inputs(num_visible)
    plain, fused = (with_compute(attention=choice) for choice in ("plain", "fused"))
    torch.testing.assert_close(predict(plain, given), predict(fused, given), atol=1e-6, rtol=1e-5)
    for one, other in zip(gradients_of(plain, given), gradients_of(fused, given), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [17, 65])
def test_plain_attention_in_bfloat16_is_within_its_rounding(num_tokens: int) -> None:
    q, k, v = torch.randn(3, 2, 4, num_tokens, 16, generator=torch.Generator().manual_seed(0))
    exact = plain_attention(q.double(), k.double(), v.double())
    rounded = plain_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, atol=0.02, rtol=0.02)


def test_activations_that_are_computed_again_give_the_same_gradients_and_fewer_are_kept() -> None:
    given = inputs(16)
    kept, again = (with_compute(activation_checkpointing=choice, depth=5) for choice in (False, True))
    assert torch.equal(predict(kept, given), predict(again, given))
    for one, other in zip(gradients_of(kept, given), gradients_of(again, given), strict=True):
        assert torch.equal(one, other)
    sizes = [saved_bytes(lambda m=model: m(**given).sum(), model.parameters()) for model in (kept, again)]  # type: ignore[misc]
    assert sizes[1] < sizes[0] / 2


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


def with_compute(depth: int = 3, **compute: Any) -> UViT:
    return tiny_model(tiny_params(compute=compute, model={"depth": depth}), 0, NUM_CLASSES)
