"""Checkpoints of other code, imported; our own, exported: the same function, the same images, and clear refusals."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from maskdm.base.errors import ParamsError, UserError
from maskdm.base.publishing import publish_description
from maskdm.base.tensors import load_tensors, save_tensors
from maskdm.config import load_params, parse_params
from maskdm.config.paths import WeightSet
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import make_betas
from maskdm.method.masks import gather_patches, patchify
from maskdm.models import commands
from maskdm.models.exported import publish_exported, weights_for
from maskdm.models.loading import open_model
from tests import factories
from tests.conftest import ARM, Experiment
from tests.report.made_up_results import stamp_outputs

State = dict[str, Tensor]


class Parser(argparse.ArgumentParser):
    """Of one command, which a wrong option makes fail without leaving."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def import_file(file: Path, out: Path, *options: str) -> None:
    parser = Parser()
    commands.add_import_arguments(parser)
    commands.run_import(parser.parse_args([str(file), "--out", str(out), *options]))


def export(experiment: Experiment, checkpoint: str, *options: str) -> None:
    parser = Parser()
    commands.add_export_arguments(parser)
    with contextlib.chdir(experiment.folder):
        commands.run_export(parser.parse_args([checkpoint, *options]))


# --- the authors' network, from its description


class Reference:
    """MaskDM's network in plain arithmetic on whole images, float64, from the tensors by their names in the file.

    Args:
        state: without the prefix.
        num_heads: of attention.
    """

    def __init__(self, state: State, num_heads: int) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.num_heads = num_heads
        self.blocks = sum(1 for name in state if re.fullmatch(r"encoder\.in_blocks\.\d+\.norm1\.weight", name))

    def __call__(self, images: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None) -> Tensor:
        """(B, C, H, W) → the prediction of the visible patches, (B, S, p·p·C)."""
        return torch.stack(
            [
                self.one(
                    image.double(), int(step), [int(i) for i in visible], None if labels is None else int(labels[b])
                )
                for b, (image, step, visible) in enumerate(zip(images, t, visible_idx, strict=True))
            ]
        )

    def one(self, image: Tensor, t: int, visible: list[int], label: int | None) -> Tensor:
        s = self.state
        kernel = s["encoder.patch_embed.proj.weight"]
        patches = F.conv2d(image[None], kernel, s["encoder.patch_embed.proj.bias"], stride=kernel.shape[-1])
        tokens = [self.time_token(t)] + [patches[0].flatten(1)[:, i] for i in visible]
        if label is not None:
            tokens.insert(0, s["encoder.label_emb.weight"][label])
        num_extra = len(tokens) - len(visible)
        rows = [*range(num_extra), *(num_extra + i for i in visible)]
        x = torch.stack(tokens) + s["encoder.encoder_pos_embed"][0, rows]
        kept = []
        for i in range(self.blocks):
            x = self.block(x, f"encoder.in_blocks.{i}")
            kept.append(x)
        x = self.block(x, "encoder.mid_block")
        for i in range(self.blocks):
            name = f"encoder.out_blocks.{i}"
            x = self.block(self.affine(torch.cat([x, kept[-1 - i]], dim=1), f"{name}.skip_linear"), name)
        return self.affine(self.standardised(x[num_extra:], "encoder.norm"), "encoder_to_output")

    def block(self, x: Tensor, name: str) -> Tensor:
        q, k, v = (self.standardised(x, f"{name}.norm1") @ self.state[f"{name}.attn.qkv.weight"].T).chunk(3, dim=1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.chunk(self.num_heads, dim=1) for part in (q, k, v)), strict=True):
            heads.append(torch.softmax(q_h @ k_h.T / math.sqrt(q_h.shape[1]), dim=1) @ v_h)
        x = x + self.affine(torch.cat(heads, dim=1), f"{name}.attn.proj")
        hidden = self.affine(self.standardised(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        return x + self.affine(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{name}.mlp.fc2")

    def time_token(self, t: int) -> Tensor:
        half = self.state["encoder.norm.weight"].shape[0] // 2
        # in float32, as every code computes it: at t = 999 its rounding is 6e-5
        angles = torch.tensor(float(t)) * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        token = torch.cat([angles.cos(), angles.sin()]).double()
        if "encoder.time_embed.0.weight" in self.state:
            hidden = self.affine(token[None], "encoder.time_embed.0")
            token = self.affine(hidden * torch.sigmoid(hidden), "encoder.time_embed.2")[0]
        return token

    def affine(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def standardised(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + 1e-5)
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]


def authors_state(
    dim: int = 16,
    blocks: int = 1,
    patch: int = 2,
    channels: int = 1,
    side: int = 4,
    classes: int = 0,
    time_mlp: bool = False,
    hidden: int = 4,
    seed: int = 0,
) -> State:
    """Random weights of MaskDM's layout, without the prefix; `side` in patches, `hidden` in multiples of dim."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, channels, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "encoder_pos_embed": (1, 1 + (classes > 0) + side**2, dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    if classes:
        shapes["label_emb.weight"] = (classes, dim)
    if time_mlp:
        shapes |= {"time_embed.0.weight": (4 * dim, dim), "time_embed.0.bias": (4 * dim,)}
        shapes |= {"time_embed.2.weight": (dim, 4 * dim), "time_embed.2.bias": (dim,)}
    names = [*(f"in_blocks.{i}" for i in range(blocks)), "mid_block", *(f"out_blocks.{i}" for i in range(blocks))]
    for name in names:
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (dim,), f"{name}.{norm}.bias": (dim,)}
        shapes[f"{name}.attn.qkv.weight"] = (3 * dim, dim)
        layers = {"attn.proj": (dim, dim), "mlp.fc1": (hidden * dim, dim), "mlp.fc2": (dim, hidden * dim)}
        if name.startswith("out"):
            layers["skip_linear"] = (dim, 2 * dim)
        for layer, (rows, columns) in layers.items():
            shapes |= {f"{name}.{layer}.weight": (rows, columns), f"{name}.{layer}.bias": (rows,)}
    whole = {f"encoder.{name}": shape for name, shape in shapes.items()}
    whole |= {"encoder_to_output.weight": (patch**2 * channels, dim), "encoder_to_output.bias": (patch**2 * channels,)}
    draws = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draws) * 0.2 + ("norm" in name and name.endswith("weight"))
        for name, shape in whole.items()
    }


def authors_file(file: Path, raw: State | None, ema: State | None, **more: Any) -> Path:
    content = dict(more)
    if raw is not None:
        content["model"] = {f"model.{name}": tensor for name, tensor in raw.items()}
    if ema is not None:
        content["ema"] = {f"ema_model.model.{name}": tensor for name, tensor in ema.items()}
    torch.save(content, file)
    return file


def prediction(model: UViT, p: int, images: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return model(gather_patches(patchify(images, p), visible_idx), t, visible_idx, labels)


def some_inputs(channels: int, patch: int, side: int, num_visible: int, classes: int, seed: int) -> tuple[Any, ...]:
    draws = torch.Generator().manual_seed(seed)
    images = torch.randn(3, channels, patch * side, patch * side, generator=draws)
    order = torch.stack([torch.randperm(side**2, generator=draws) for _ in range(3)])
    labels = torch.randint(classes, (3,), generator=draws) if classes else None
    return images, torch.tensor([0, 517, 999]), order[:, :num_visible], labels


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_an_imported_network_computes_the_authors_function(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    kind = {"patch": pick(1, 2, 4), "channels": pick(1, 3), "side": pick(2, 3, 4), "classes": pick(0, 3)}
    num_heads = pick(1, 2, 4)
    sizes = {"dim": pick(8, 16, 32), "blocks": pick(0, 1, 2), "hidden": pick(2, 4), "time_mlp": pick(False, True)}
    raw, ema = (authors_state(**kind, **sizes, seed=seed) for seed in (1, 2))
    folder = tmp_path_factory.mktemp("imported")
    import_file(authors_file(folder / "a.pt", raw, ema), folder / "out", "--num-heads", str(num_heads))
    is_masked = pick(False, True)
    num_visible = data.draw(st.integers(1, kind["side"] ** 2 - 1)) if is_masked else kind["side"] ** 2
    inputs = some_inputs(kind["channels"], kind["patch"], kind["side"], num_visible, kind["classes"], seed=3)
    states: dict[WeightSet, State] = {"raw": raw, "ema": ema}
    for which, state in states.items():
        model = open_model(folder / "out", which=which)
        assert model.params.dataset.image_size == kind["patch"] * kind["side"]
        assert (model.num_classes, model.which) == (kind["classes"], which)
        got = prediction(model.network, kind["patch"], *inputs)
        torch.testing.assert_close(got.double(), Reference(state, num_heads)(*inputs), rtol=1e-5, atol=1e-5)


def test_patches_of_a_masked_image_are_predicted_as_if_the_others_were_not_there(tmp_path: Path) -> None:
    state = authors_state(side=4)
    import_file(authors_file(tmp_path / "a.pt", None, state), tmp_path / "out", "--num-heads", "2")
    model = open_model(tmp_path / "out").network
    images, t, visible_idx, labels = some_inputs(1, 2, 4, num_visible=5, classes=0, seed=0)
    whole = torch.arange(16).expand(3, -1)
    masked = prediction(model, 2, images, t, visible_idx, labels)
    unmasked = gather_patches(prediction(model, 2, images, t, whole, labels), visible_idx)
    assert not torch.allclose(masked, unmasked, atol=1e-3)  # else the parity of masked inputs would say nothing


def test_the_other_spellings_of_class_and_time_embeddings_are_the_same_network(tmp_path: Path) -> None:
    state = authors_state(classes=3, time_mlp=True)
    other = {name.replace("encoder.time_embed", "time_embed"): tensor for name, tensor in state.items()}
    other["encoder.label_emb"] = other.pop("encoder.label_emb.weight")
    weights = []
    for name, given_state in (("usual", state), ("other", other)):
        import_file(authors_file(tmp_path / f"{name}.pt", None, given_state), tmp_path / name, "--num-heads", "2")
        weights.append(open_model(tmp_path / name).network.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# --- what an import writes and says


def test_an_import_reads_sizes_off_the_shapes_and_takes_the_rest_from_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = authors_state(dim=128, blocks=2, patch=4, channels=3, side=3, classes=5, hidden=2)
    file = authors_file(tmp_path / "celeba.pt", state, state)
    import_file(file, tmp_path / "out", "--num-timesteps", "200", "--schedule", "cosine", "--prediction", "v")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    params = parse_params(config["params"])
    assert params.model.model_dump() == {
        "patch_size": 4,
        "dim": 128,
        "depth": 5,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "qkv_bias": False,
        "mlp_time_embed": False,
        "class_conditional": True,
    }
    assert params.dataset.shape == (12, 12, 3)
    assert params.diffusion.model_dump() == {"num_timesteps": 200, "schedule": "cosine", "prediction": "v"}
    assert config["num_classes"] == 5
    assert config["source"]["file"] == "celeba.pt"
    said = capsys.readouterr().out
    assert "2 heads (assumed: dim / 64" in said
    assert "images 12×12×3, 5 classes" in said


def test_what_is_not_used_is_ignored_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = authors_state()
    file = authors_file(tmp_path / "a.pt", state, state, step=70_000, opt={"state": {0: {"exp_avg": torch.zeros(3)}}})
    content = torch.load(file, weights_only=True)
    content["model"]["betas"] = make_betas("linear", 1000)
    content["ema"] |= {"initted": torch.tensor(True), "online_model.model.a": torch.ones(1)}
    content["ema"]["online_model.model.b"] = torch.ones(1)
    torch.save(content, file)
    import_file(file, tmp_path / "out", "--num-heads", "2")
    ignored = "opt, step, model: betas, ema: initted, ema: online_model.* (2)"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ignored: "))
    assert sorted(line.removeprefix("ignored: ").split(", ")) == sorted(ignored.split(", "))
    assert "online_model.* (2)" in (tmp_path / "out" / "README.md").read_text()


def test_both_sets_are_kept_and_one_of_them_is_the_model(tmp_path: Path) -> None:
    raw, ema = authors_state(seed=1), authors_state(seed=2)
    file = authors_file(tmp_path / "a.pt", raw, ema)
    name = "encoder_to_output.weight"
    for which, own, other in (("ema", ema, raw), ("raw", raw, ema)):
        import_file(file, tmp_path / which, "--num-heads", "2", "--which", which)
        assert torch.equal(load_file(tmp_path / which / "model.safetensors")["decoder_pred.weight"], own[name])
        second: WeightSet = "raw" if which == "ema" else "ema"
        assert torch.equal(open_model(tmp_path / which, which=second).network.decoder_pred.weight, other[name])
    assert open_model(tmp_path / "ema").network.decoder_pred.weight.dtype == torch.float32


def test_weights_in_half_precision_are_taken(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in authors_state().items()}
    import_file(authors_file(tmp_path / "a.pt", state, None), tmp_path / "out", "--num-heads", "2")
    model = open_model(tmp_path / "out").network
    assert torch.equal(model.decoder_pred.weight, state["encoder_to_output.weight"].float())


def test_equal_files_give_equal_folders_and_an_import_is_replaced_by_the_next(tmp_path: Path) -> None:
    file = authors_file(tmp_path / "a.pt", authors_state(seed=1), None)
    import_file(file, tmp_path / "out", "--num-heads", "2")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    import_file(file, tmp_path / "out", "--num-heads", "2")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "out"]


@pytest.mark.parametrize("kind", ["file", "link", "other files", "more files"])
def test_what_an_import_did_not_make_is_kept(tmp_path: Path, kind: str) -> None:
    file, out = authors_file(tmp_path / "a.pt", authors_state(), None), tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "elsewhere")
    elif kind == "other files":
        out.mkdir()
        (out / "config.json").write_text("{}")
    else:
        import_file(file, out, "--num-heads", "2")
        (out / "notes.txt").write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is there already"):
        import_file(file, out, "--num-heads", "2")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# --- files that can't be imported


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def changed(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (without("encoder.norm.bias"), r"model\.encoder\.norm\.bias is missing"),
    "missing in a block": (
        without("encoder.in_blocks.0.attn.proj.bias"),
        r"model\.encoder\.in_blocks\.0\.attn\.proj\.bias is missing",
    ),
    "no last layer": (without("encoder_to_output.weight"), r"model\.encoder_to_output\.weight is missing"),
    "no positions": (without("encoder.encoder_pos_embed"), r"model\.encoder\.encoder_pos_embed is missing"),
    "no embedding": (without("encoder.patch_embed.proj.weight"), r"patch_embed\.proj\.weight is missing"),
    "extra": (changed("encoder.mask_token", 16), r"model\.encoder\.mask_token is not part of this network"),
    "extra outside": (changed("decoder.weight", 16), r"model\.decoder\.weight is not part of this network"),
    "our own name": (changed("encoder.decoder_pred.weight", 4, 16), r"encoder\.decoder_pred\.weight is not part"),
    "shape": (
        changed("encoder.mid_block.mlp.fc2.weight", 16, 63),
        r"model\.encoder\.mid_block\.mlp\.fc2\.weight is 16×63: expected 16×64$",
    ),
    "output": (changed("encoder_to_output.bias", 5), r"encoder_to_output\.bias is 5: expected 4$"),
    "sides": (changed("encoder.patch_embed.proj.weight", 16, 4), r"is 16×4: expected dim × channels × patch × patch"),
    "oblong patch": (changed("encoder.patch_embed.proj.weight", 16, 1, 2, 3), "expected dim × channels × patch"),
    "empty": (changed("encoder.encoder_pos_embed", 1, 0, 16), r"is 1×0×16: expected 1 × \(1 \+ patches\) × dim"),
    "channels": (changed("encoder.patch_embed.proj.weight", 16, 4, 2, 2), "4 channels: expected 1 .* latents"),
    "not square": (changed("encoder.encoder_pos_embed", 1, 1 + 15, 16), "of 15 patches, which do not form a square"),
    "no patches": (changed("encoder.encoder_pos_embed", 1, 1, 16), "of 0 patches, which do not form a square"),
    "no number": (
        lambda state: {**state, "encoder.norm.bias": torch.full((16,), math.nan)},
        r"encoder\.norm\.bias holds values that are infinite or not numbers",
    ),
    "whole numbers": (
        lambda state: {**state, "encoder.norm.bias": torch.zeros(16, dtype=torch.int64)},
        "not a tensor of floating-point numbers, but torch.int64",
    ),
    "no tensor": (lambda state: {**state, "encoder.norm.bias": 3}, "not a tensor of floating-point numbers, but int"),  # type: ignore[dict-item]
    "claims": (
        lambda state: {**state, "encoder.norm.bias": torch.zeros(1).expand(10**12)},
        r"model\.encoder\.norm\.bias is 1000000000000: expected 16$",
    ),
    "twice": (
        lambda state: {**state, "time_embed.0.weight": torch.zeros(1), "encoder.time_embed.0.weight": torch.zeros(1)},
        "are the same tensor of the network",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_named_in_one_line(tmp_path: Path, case: str) -> None:
    change, reason = MISFITS[case]
    refused(tmp_path, authors_file(tmp_path / "a.pt", change(authors_state()), None), reason)


def test_blocks_before_and_behind_the_middle_must_be_as_many(tmp_path: Path) -> None:
    state = authors_state(blocks=2)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.out_blocks.1.")}
    reason = r"encoder\.out_blocks\.1\.skip_linear\.weight is missing \(and \d+ more tensors\)"
    refused(tmp_path, authors_file(tmp_path / "a.pt", None, state), reason)


def test_a_gap_in_the_blocks_is_named(tmp_path: Path) -> None:
    state = {name.replace("_blocks.0.", "_blocks.999999999."): tensor for name, tensor in authors_state().items()}
    reason = r"encoder\.in_blocks\.0\.norm1\.weight is missing \(and \d+ more tensors\)"
    refused(tmp_path, authors_file(tmp_path / "a.pt", None, state), reason)


def test_an_odd_width_is_refused(tmp_path: Path) -> None:
    file = authors_file(tmp_path / "a.pt", None, authors_state(dim=15))
    refused(tmp_path, file, "dim 15 is odd; the time embedding needs pairs", "--num-heads", "3")


def test_raw_and_averaged_weights_must_be_of_one_network(tmp_path: Path) -> None:
    file = authors_file(tmp_path / "a.pt", authors_state(dim=16), authors_state(dim=32))
    refused(tmp_path, file, "its raw and its averaged weights are of different networks")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "it holds a list"),
        ({}, "its layout is not known .*nothing"),
        ({"state_dict": {"a": torch.ones(1)}}, "its layout is not known .*state_dict"),
        ({"model": {"encoder.norm.weight": torch.ones(1)}}, "no tensor whose name starts with `model.`"),
        ({"model": {}, "ema": None}, "no tensor whose name starts with `model.`"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path, tmp_path / "a.pt", reason)


@pytest.mark.parametrize("model", [[1], torch.zeros(3), "text"], ids=["list", "tensor", "text"])
def test_a_model_that_is_no_dict_is_left_out_where_there_are_averaged_weights(tmp_path: Path, model: Any) -> None:
    state = {f"ema_model.model.{name}": tensor for name, tensor in authors_state().items()}
    torch.save({"model": model, "ema": state}, tmp_path / "a.pt")
    import_file(tmp_path / "a.pt", tmp_path / "out", "--num-heads", "2")
    assert "Not imported: model (no weights)" in (tmp_path / "out" / "README.md").read_text()


def test_a_later_pickle_protocol_is_told_of(tmp_path: Path) -> None:
    torch.save(authors_state(), tmp_path / "a.pt", pickle_protocol=4)
    refused(tmp_path, tmp_path / "a.pt", "Detected pickle protocol 4 in the checkpoint, which was not the default")


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_file_that_would_execute_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": {f"model.{name}": tensor for name, tensor in authors_state().items()}, "more": Payload()}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not is_old)
    refused(
        tmp_path, tmp_path / "a.pt", "not a plain PyTorch checkpoint: Trying to load unsupported GLOBAL posix.mkdir"
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    file = authors_file(tmp_path / "a.pt", authors_state(), None)
    file.write_bytes(file.read_bytes()[:size])
    refused(tmp_path, file, "not a plain PyTorch checkpoint")


def archive_of_something_else() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty or cut off"),
        (b"\n<!DOCTYPE html>\n<html>", "Unsupported operand 10"),
        (pickle.dumps([1], protocol=2), "Invalid magic number; corrupt file"),
        (pickle.dumps(Path("x"), protocol=2), r"Unsupported global: GLOBAL pathlib\.PosixPath"),
        (b"\x80\x02\xff", "Unsupported operand 255"),
        (save({"a": torch.zeros(2)}), "Unsupported operand"),
        (archive_of_something_else(), "file in archive is not in a subdirectory"),
    ],
)
def test_what_is_no_checkpoint_at_all_is_refused_with_the_librarys_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    expected = r" \(only plain tensors are accepted\); expected one that MaskDM's code or U-ViT's code wrote with "
    refused(tmp_path, tmp_path / "a.pt", f"{reason}.*{expected}torch.save: give such a file, or download it again")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    refused(tmp_path, tmp_path / "a.pt", "there is no file")


def refused(folder: Path, file: Path, reason: str, *options: str) -> None:
    """One clear line, and nothing written."""
    before = sorted(str(path) for path in folder.rglob("*"))
    with pytest.raises(UserError, match=reason) as refusal:
        import_file(file, folder / "out", "--num-heads", "2", *options)
    assert "\n" not in str(refusal.value)
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_options_that_do_not_fit_the_network_are_refused(tmp_path: Path) -> None:
    file = authors_file(tmp_path / "a.pt", authors_state(dim=16), None)
    for options, reason in (
        ([], "dim 16 is not a multiple of 64.*give --num-heads"),
        (["--num-heads", "3"], "num_heads 3 does not divide dim 16"),
        (["--num-heads", "2", "--num-timesteps", "10"], "num_timesteps 10 is too few"),
    ):
        with pytest.raises(ParamsError, match=reason):
            import_file(file, tmp_path / "out", *options)
    refused(tmp_path, file, "has no ema weights, only raw", "--which", "ema")
    with pytest.raises(ValueError, match="expected a whole number of 1 or more"):
        import_file(file, tmp_path / "out", "--num-heads", "0")


@pytest.mark.parametrize(
    ("betas", "options", "reason"),
    [
        (make_betas("linear", 500), (), "trained with 500 timesteps .*give --num-timesteps 500"),
        (make_betas("cosine", 1000), (), "not those of the schedule linear: give --schedule cosine$"),
        (make_betas("cosine", 1000).flip(0), (), "are of no schedule that maskdm has: it can't be imported"),
        (
            make_betas("linear", 1000),
            ("--schedule", "cosine"),
            "not those of the schedule cosine: give --schedule linear$",
        ),
    ],
)
def test_the_diffusion_must_be_the_one_of_the_file(
    tmp_path: Path, betas: Tensor, options: tuple[str, ...], reason: str
) -> None:
    file = authors_file(tmp_path / "a.pt", authors_state(), None)
    content = torch.load(file, weights_only=True)
    content["model"]["betas"] = betas
    torch.save(content, file)
    refused(tmp_path, file, reason, *options)


# --- U-ViT's own files


def uvit_file(file: Path, **more: Tensor) -> Path:
    names = {"encoder.encoder_pos_embed": "pos_embed"}
    state = {
        names.get(name, name.replace("encoder_to_output", "decoder_pred").removeprefix("encoder.")): tensor
        for name, tensor in authors_state(channels=3).items()
    }
    torch.save({**state, **more}, file)
    return file


def test_a_uvit_with_a_final_convolution_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = uvit_file(tmp_path / "a.pth", **{"final_layer.weight": torch.randn(3, 3, 3, 3)})
    refused(tmp_path, file, "final 3×3 convolution over the whole image .* only visible patches")


def test_a_uvit_without_one_is_the_same_network(tmp_path: Path) -> None:
    import_file(uvit_file(tmp_path / "a.pth"), tmp_path / "out", "--num-heads", "2")
    model = open_model(tmp_path / "out").network
    inputs = some_inputs(3, 2, 4, num_visible=16, classes=0, seed=0)
    expected = Reference(authors_state(channels=3), 2)(*inputs)
    torch.testing.assert_close(prediction(model, 2, *inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_uvit_of_texts_is_refused(tmp_path: Path) -> None:
    file = uvit_file(tmp_path / "a.pth", **{"context_embed.weight": torch.zeros(16, 8)})
    refused(tmp_path, file, r"context_embed\.weight is not part of this network")


# --- exports


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_an_exported_checkpoint_has_the_bare_weights_of_its_set(scored: Experiment, which: str) -> None:
    checkpoint = f"results/finetune/{ARM}/seed-0/milestone-0.600.safetensors"
    export(scored, checkpoint, "--out", "out", "--which", which, "--format", "safetensors")
    sets, _ = load_tensors(scored.path(checkpoint))
    weights = load_file(scored.path("out", "model.safetensors"))
    assert weights.keys() == sets[which].keys()
    assert all(torch.equal(tensor, sets[which][name]) for name, tensor in weights.items())
    assert torch.equal(open_model(scored.path("out")).network.state_dict()["pos_embed"], sets[which]["pos_embed"])


def test_a_model_of_every_kind_draws_the_bytes_of_the_pipeline(scored: Experiment) -> None:
    export(scored, f"results/finetune/{ARM}/seed-0")
    exported = scored.path("exported", f"{ARM}-seed-0-milestone-1.000")
    checkpoint = scored.path("results", "finetune", ARM, "seed-0", "milestone-1.000.safetensors")
    logged = scored.path("artifacts")  # as tracking.logged_model writes it
    logged.mkdir()
    sets, info = load_tensors(checkpoint)
    save_tensors(logged / "weights.safetensors", {"ema": sets["ema"]}, info)
    params = json.loads((exported / "config.json").read_text())["params"]
    (logged / "params.json").write_text(json.dumps(params))
    drawn = np.load(scored.path("results", "samples", ARM, "seed-0", "milestone-1.000.npy"))
    for place in (exported, checkpoint, logged):
        model = open_model(place)
        assert (model.which, model.flip, model.compute.device) == ("ema", 0.0, torch.device("cpu"))
        assert np.array_equal(model.draw(len(drawn), seed=0), drawn), place


def test_a_pretrained_checkpoint_is_exported_with_what_pretraining_cost(scored: Experiment) -> None:
    export(scored, f"results/pretrain/{ARM}/seed-0", "--out", "primer")
    sets, _ = load_tensors(scored.path("results", "pretrain", ARM, "seed-0", "checkpoint.safetensors"))
    assert torch.equal(load_file(scored.path("primer", "model.safetensors"))["pos_embed"], sets["ema"]["pos_embed"])
    card = scored.path("primer", "README.md").read_text()
    assert "after pretraining alone" in card
    assert "masked pretraining:" in card
    assert "unmasked finetuning:" not in card


def test_the_params_are_those_that_the_arm_ran_with(scored: Experiment) -> None:
    chosen = json.loads(scored.path("results", "chosen", f"{ARM}.json").read_text())
    assert chosen["values"] != {}, "the tiny experiment chooses lr-high: else this shows nothing"
    export(scored, f"results/finetune/{ARM}/seed-0", "--out", "out")
    params = parse_params(json.loads(scored.path("out", "config.json").read_text())["params"])
    assert params.finetune_of(ARM).lr == chosen["values"]["finetune.lr"]


def test_the_model_card_tells_data_masking_compute_quality_and_origin(scored: Experiment) -> None:
    export(scored, f"results/finetune/{ARM}/seed-0", "--out", "out")
    card = scored.path("out", "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "maskdm"
    text = " ".join(text.split())
    manifest = json.loads(scored.path("results", "data", "manifest.json").read_text())
    metrics = json.loads(scored.path("results", "metrics", f"{ARM}-seed-0.json").read_text())
    record = json.loads(scored.path("results", "records", f"finetune-{ARM}-seed-0.json").read_text())
    spent = metrics["milestones"]["1.000"]
    for fact in (
        manifest["sha256"],
        "mask rate requested 0.5, realised 0.5: 8 of 16 patches",
        f"- together: {spent['images_seen']:,} images, {spent['flops']:.4g} FLOPs",
        f"| FID | {spent['fid']:.6g} |",
        metrics["extractor_sha256"],
        "these are not Inception FIDs",
        "caveat: FID is biased",
        f"torch {record['versions']['torch']}",
    ):
        assert fact in text, fact


def test_numbers_of_other_weights_are_not_in_the_card(scored: Experiment) -> None:
    checkpoint = f"results/finetune/{ARM}/seed-0"
    export(scored, checkpoint, "--out", "raw", "--which", "raw")
    metrics = scored.path("results", "metrics", f"{ARM}-seed-0.json")
    content = json.loads(metrics.read_text())
    metrics.write_text(json.dumps({**content, "scored_with": "other"}))
    export(scored, checkpoint, "--out", "stale")
    metrics.unlink()
    export(scored, checkpoint, "--out", "unscored")
    for folder, reason in (
        ("raw", "scores are of averaged weights"),
        ("stale", f"results/metrics/{ARM}-seed-0.json was out of date"),
        ("unscored", "there was no results/metrics"),
    ):
        card = scored.path(folder, "README.md").read_text()
        assert f"Not scored: {reason}" in card
        assert "| FID |" not in card


def test_the_snippet_of_the_model_card_works(scored: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    export(scored, f"results/finetune/{ARM}/seed-0", "--out", "out")
    snippet = re.search(r"```python\n(.*?)```", scored.path("out", "README.md").read_text(), re.S)
    assert snippet is not None
    monkeypatch.chdir(scored.folder)
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    assert names["images"].shape == (16, 8, 8, 1)
    assert scored.path("images.png").is_file()


def test_a_class_conditional_network_draws_every_class_in_turn_as_the_pipeline_does(prepared: Experiment) -> None:
    prepared.change(model={"class_conditional": True}).keep_arm("scratch")
    for stage in ("pretrain", "finetune", "sample"):
        prepared.succeed(stage, "--arm", "scratch", "--seed", "0")
    export(prepared, "results/finetune/scratch/seed-0", "--out", "out")
    exported = open_model(prepared.path("out"))
    assert (exported.params.model.class_conditional, exported.num_classes) == (True, 10)
    drawn = np.load(prepared.path("results", "samples", "scratch", "seed-0", "milestone-1.000.npy"))
    assert np.array_equal(exported.draw(len(drawn), seed=0), drawn)


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        ("results/finetune/patch-m99/seed-0", "there is no arm 'patch-m99'"),
        (
            "results/finetune/scratch/seed-0",
            r"nothing to export yet: there is no .*milestone-1\.000\.safetensors, which",
        ),
        ("results/pretrain/scratch/seed-0", r"the weights of arm scratch, seed 0, after .*; run the experiment first"),
        ("results/finetune/scratch/seed-9", r"seed 9 is not in `seeds` of params\.yaml: \[0\]"),
        ("results/finetune/scratch/seed-0/curve.csv", "is not a checkpoint of the stage finetune: expected"),
        ("results/pretrain/scratch/seed-0/milestone-1.000.safetensors", "is not a checkpoint of the stage pretrain"),
        ("results/samples/scratch/seed-0", "is not a checkpoint of the experiment in"),
        ("../elsewhere/results/finetune/scratch/seed-0", "is not a checkpoint of the experiment in"),
    ],
)
def test_what_is_no_checkpoint_of_the_experiment_is_refused(prepared: Experiment, checkpoint: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        export(prepared, checkpoint)
    assert not prepared.path("exported").exists()


def test_of_a_milestone_that_is_not_there_those_that_are_are_named(scored: Experiment) -> None:
    with pytest.raises(UserError, match=r"milestone-0\.9\.safetensors; there are milestone-0\.600.*milestone-1\.000"):
        export(scored, f"results/finetune/{ARM}/seed-0/milestone-0.9.safetensors")


def test_weights_of_other_params_are_not_exported(scored: Experiment) -> None:
    scored.change(training={"ema_decay": 0.5})
    says = "milestone-1.000.safetensors would be wrong: .*ema_decay was 0.999, is 0.5; put params.yaml back, or run "
    with pytest.raises(UserError, match=says + f"first: maskdm tune --arm {ARM} --trial given "):
        export(scored, f"results/finetune/{ARM}/seed-0")
    assert not scored.path("exported").exists()


def test_pretrained_weights_of_other_params_are_not_exported(prepared: Experiment) -> None:
    prepared.succeed("pretrain", "--arm", ARM, "--seed", "0")
    arms = prepared.content["arms"]
    prepared.change(arms={ARM: {**arms[ARM], "mask_rate": 0.75}})
    says = f"results/pretrain/{ARM}/seed-0 is out of date: mask.mask_rate was 0.5, is 0.75; "
    with pytest.raises(UserError, match=says):
        export(prepared, f"results/pretrain/{ARM}/seed-0")
    assert not prepared.path("exported").exists()
    prepared.change(
        arms={ARM: arms[ARM]}, finetune={"lr": 0.5}, sampling={"num_steps": 5}, evaluation={"kid_subsets": 5}
    )
    export(prepared, f"results/pretrain/{ARM}/seed-0", "--out", "out")


def transferred(experiment: Experiment, **pretrain: Any) -> Experiment:
    """Pretrain on digits of twice the size, and compare with images held out."""
    content = experiment.keep_arm(ARM).content
    arm = {**content["arms"][ARM], "pretrain": {**content["arms"][ARM].get("pretrain", {}), **pretrain}}
    large = {**content["dataset"], "image_size": 16, "classes": ["5", "6", "7", "8", "9"]}
    small = {"classes": ["0", "1", "2", "3", "4"], "held_out": 0.3}
    changed = experiment.change(
        dataset=small, datasets={"large": large}, evaluation={"reference": "held_out"}, arms={ARM: arm}
    )
    changed.succeed("prepare")
    changed.succeed("pretrain", "--arm", ARM, "--seed", "0")
    return changed


def test_a_network_pretrained_on_another_dataset_is_exported_on_its_own(prepared: Experiment) -> None:
    export(transferred(prepared, dataset="large"), f"results/pretrain/{ARM}/seed-0", "--out", "out")
    exported = open_model(prepared.path("out"))
    assert exported.draw(2).shape == (2, 16, 16, 1)
    assert (list(exported.params.arms), exported.params.datasets) == ([ARM], {})
    assert exported.params.evaluation.reference == "train"


def test_params_that_are_not_possible_are_not_published(tmp_path: Path) -> None:
    params = factories.tiny_params()
    evaluation = params.evaluation.model_copy(update={"reference": "held_out"})
    wrong = params.model_copy(update={"evaluation": evaluation})
    with pytest.raises(ParamsError, match=r"held_out needs dataset\.held_out"):
        publish_exported(tmp_path / "out", wrong, 0, {}, "ema", {}, "a card")
    assert not (tmp_path / "out").exists()


def test_the_model_card_names_the_weights_that_pretraining_started_from(prepared: Experiment) -> None:
    for stage in ("pretrain", "finetune"):
        prepared.succeed(stage, "--arm", ARM, "--seed", "0")
    export(prepared, f"results/finetune/{ARM}/seed-0", "--out", "first/model")
    prepared.change(pretrain={"checkpoint": "first/model"})
    for stage in ("pretrain", "finetune"):
        prepared.succeed(stage, "--arm", ARM, "--seed", "0")
        export(prepared, f"results/{stage}/{ARM}/seed-0", "--out", stage)
        card = " ".join(prepared.path(stage, "README.md").read_text().split())
        sha256 = hashlib.sha256(prepared.path("first/model/model.safetensors").read_bytes()).hexdigest()
        assert f"- started from the weights in `model` (sha256 `{sha256}`), whose data and compute are not" in card
    assert "started from the weights" not in prepared.path("first/model/README.md").read_text()


def test_too_few_samples_and_another_extractor_are_told_in_the_card(scored: Experiment) -> None:
    """64 samples have fewer dimensions than pixels of RGB images would; here the features are said to be many."""
    features = scored.path("results", "features", "features.json")
    info = {key: value for key, value in json.loads(features.read_text()).items() if key != "checksum"}
    publish_description(features, {**info, "num_features": 192})
    metrics = scored.path("results", "metrics", f"{ARM}-seed-0.json")
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "extractor": "dinov2-vit-s-14/dinov2"}))
    with contextlib.chdir(scored.folder):
        stamp_outputs(load_params())
    export(scored, f"results/finetune/{ARM}/seed-0", "--out", "out")
    card = scored.path("out", "README.md").read_text()
    assert "caveat: The features are those of dinov2-vit-s-14, not Inception's" in card
    assert "64 images are too few for 192 features" in card


def test_another_format_is_no_choice(scored: Experiment) -> None:
    with pytest.raises(ValueError, match="invalid choice: 'pickle'"):
        export(scored, f"results/finetune/{ARM}/seed-0", "--format", "pickle")


# --- exported folders of others


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    file = authors_file(tmp_path / "a.pt", authors_state(classes=3), authors_state(classes=3, seed=1))
    import_file(file, tmp_path / "out", "--num-heads", "2")
    return tmp_path / "out"


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a folder of maskdm export .*no config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"format": "other"}', '{"params": ' + "[" * 10**5, " " * (2**20 + 1), "\0"]
)
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="does not describe a model"):
        open_model(folder)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (lambda c: c.update(format="maskdm-model/9"), "format: "),
    "key": (lambda c: c.update(more=1), "more: Extra inputs"),
    "outside": (lambda c: c["weights"]["ema"].update(file="../a.pt"), r"weights\.ema\.file"),
    "no weights": (lambda c: c["weights"].pop("ema"), "has no ema weights, only raw"),
    "sha256": (lambda c: c["weights"]["ema"].update(sha256="0" * 64), "its sha256 differs"),
    "params": (lambda c: c["params"].update(seed=1), "params: seed: unknown key"),
    "width": (lambda c: c["params"]["model"].update(dim=32), "of another network .* is 1×18×16: expected 1×18×32"),
    "depth": (lambda c: c["params"]["model"].update(depth=5), r"in_blocks\.1\.norm1\.weight is missing \(and"),
    "classes": (lambda c: c.update(num_classes=10**9), r"label_emb\.weight is 3×16: expected 1000000000×16"),
    "patch": (lambda c: c["params"]["model"].update(patch_size=1), "is 1×18×16: expected 1×66×16"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_its_weights_is_refused(folder: Path, case: str) -> None:
    change, reason = CONFIGS[case]
    rewrite_config(folder, change)
    with pytest.raises(UserError, match=reason) as refusal:
        open_model(folder)
    assert "\n" not in str(refusal.value)


def test_weights_that_are_not_those_of_the_network_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    for change, reason in (
        (lambda s: {**s, "more": torch.zeros(2)}, "more is not part of this network"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "norm.bias is missing"),
        (lambda s: {**s, "norm.bias": torch.zeros(3)}, "norm.bias is 3: expected 16"),
    ):
        save_file(change(dict(state)), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        rewrite_config(folder, lambda c, sha256=sha256: c["weights"]["ema"].update(sha256=sha256))  # type: ignore[misc]
        with pytest.raises(UserError, match=reason):
            open_model(folder)


@pytest.mark.parametrize("kind", ["missing", "pipe", "cut off"])
def test_a_weights_file_that_is_not_there_is_refused(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "cut off":
        path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors can't be used .*export or import the model again"):
        open_model(folder)
    assert open_model(folder, which="raw").num_classes == 3


def test_another_experiment_can_start_from_an_exported_network_of_its_kind(folder: Path) -> None:
    weights = weights_for(folder, open_model(folder).params, 3)
    written = load_file(folder / "model.safetensors")
    assert weights.keys() == written.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in written.items())
    raw = open_model(folder, which="raw").network.state_dict()
    assert not torch.equal(raw["pos_embed"], weights["pos_embed"])


@pytest.mark.parametrize(
    ("section", "change", "num_classes", "reason"),
    [
        ("model", {"num_heads": 4}, 3, "num_heads is 2 there and 4 here"),
        ("model", {"dim": 32}, 3, "dim is 16 there and 32 here"),
        ("diffusion", {"prediction": "v"}, 3, "prediction is 'epsilon' there and 'v' here"),
        ("diffusion", {}, 4, "num_classes is 3 there and 4 here"),
    ],
)
def test_an_experiment_with_another_network_or_diffusion_cannot(
    folder: Path, section: str, change: dict[str, Any], num_classes: int, reason: str
) -> None:
    content = json.loads((folder / "config.json").read_text())["params"]
    content[section].update(change)
    with pytest.raises(UserError, match=reason):
        weights_for(folder, parse_params(content), num_classes)
