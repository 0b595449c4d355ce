"""Tensors on disk: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.base.tensors import FORMAT, load_into, load_tensors, load_weights, save_tensors
from tests.factories import tiny_model, tiny_params

States = dict[str, dict[str, Tensor]]
ARCHITECTURE = tiny_params().architecture(num_classes=10)
INFO: dict[str, Any] = {"architecture": ARCHITECTURE, "step": 12, "curve": [{"step": 1, "loss": 0.1 + 0.2}]}


def states_of(seed: int = 0) -> States:
    """Of a tiny network: raw weights, averaged ones, and an optimizer's zero-dimensional steps."""
    raw = tiny_model(tiny_params(), seed).state_dict()
    return {
        "raw": raw,
        "ema": {name: tensor * 0.9 for name, tensor in raw.items()},
        "step": {"a": torch.tensor(3.0)},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, states_of(), INFO)
    return path


def assert_refused(path: Path, *reasons: str, expected: dict[str, Any] = ARCHITECTURE) -> None:
    """Loading is an error of the user's, in one line that names the file and the reasons."""
    with pytest.raises(UserError) as caught:
        load_weights(path, "ema", expected)
    for part in (str(path), *reasons):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- weights


def test_what_was_saved_comes_back(file: Path) -> None:
    states, info = load_tensors(file)
    assert info == {"format": FORMAT, **INFO}
    for kind, tensors in states_of().items():
        assert states[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(states[kind][name], tensor)
            assert states[kind][name].dtype == tensor.dtype


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_one_set_of_weights_can_be_asked_for(file: Path, which: Any) -> None:
    weights, info = load_weights(file, which, ARCHITECTURE)
    model = tiny_model(tiny_params(), seed=5)
    load_into(model, weights, file)
    expected = states_of()[which]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert info["step"] == 12


def test_equal_content_gives_equal_bytes_and_other_content_other_bytes(file: Path, tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("same", "reordered", "other-weights", "other-info")]
    states = states_of()
    save_tensors(others[0], states, INFO)
    reversed_states = {kind: dict(reversed(tensors.items())) for kind, tensors in reversed(states.items())}
    save_tensors(others[1], reversed_states, dict(reversed(INFO.items())))
    save_tensors(others[2], states_of(seed=1), INFO)
    save_tensors(others[3], states, {**INFO, "step": 13})
    same = [path.read_bytes() == file.read_bytes() for path in others]
    assert same == [True, True, False, False]
    assert file_sha256(others[0]) == file_sha256(file) != file_sha256(others[2])


def test_tensors_that_are_views_or_need_gradients_are_saved_by_value(tmp_path: Path) -> None:
    path, base = tmp_path / "views", torch.arange(6.0, requires_grad=True)
    save_tensors(path, {"raw": {"row": base[:3], "across": base.reshape(2, 3).T}}, INFO)
    raw = load_tensors(path)[0]["raw"]
    assert raw["row"].tolist() == [0, 1, 2]
    assert raw["across"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("left", [0, 1, 7, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(file: Path, left: float) -> None:
    content = file.read_bytes()
    kept = int(left * len(content)) if isinstance(left, float) else left
    file.write_bytes(content[:kept])
    assert_refused(file, "not a readable safetensors file", "truncated")


@pytest.mark.parametrize("position", [*range(8), 8, 9])
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_before_the_headers_keys_is_refused(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)
    assert_refused(file)


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_a_flipped_bit_anywhere_is_refused(file: Path, part: str) -> None:
    original = file.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    first, last = (8, header) if part == "header" else (header, len(original))
    numbers = np.random.default_rng(0)
    for position, bit in zip(numbers.integers(first, last, 200), numbers.integers(0, 8, 200), strict=True):
        content = bytearray(original)
        content[position] ^= 1 << int(bit)
        file.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_tensors(file)


def test_tensors_of_another_file_under_this_files_description_are_refused(file: Path, tmp_path: Path) -> None:
    """What no flipped bit makes: two whole files mixed."""
    other = tmp_path / "other.safetensors"
    save_tensors(other, states_of(seed=1), INFO)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header] + other.read_bytes()[header:])
    assert_refused(file, "the checksum differs")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"maskdm": "not json"},
        {"maskdm": json.dumps({"format": "maskdm-weights/0"})},
        pytest.param(
            {"maskdm": json.dumps([FORMAT])},
        ),
    ],
    ids=["none", "transformers", "no-json", "other-version", "no-mapping"],
)
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"ema/norm.weight": torch.zeros(3)}, path, metadata)
    assert_refused(path, "is a safetensors file, but not a checkpoint of this version of maskdm", FORMAT)


def test_weights_of_another_architecture_are_refused_with_every_difference(file: Path) -> None:
    params = tiny_params(model={"dim": 32}, diffusion={"schedule": "linear"})
    assert_refused(
        file,
        "another architecture",
        "dim is 16 there and 32 in params.yaml",
        "schedule is 'cosine' there and 'linear' in params.yaml",
        expected=params.architecture(10),
    )


@pytest.mark.parametrize(
    ("changes", "num_classes", "is_the_same"),
    [
        ({}, 3, True),  # classes do not matter to an unconditional network
        ({"training": {"ema_decay": 0.5}, "sampling": {"num_steps": 7}}, 10, True),
        ({"model": {"class_conditional": True}}, 10, False),
        ({"model": {"depth": 5}}, 10, False),
        ({"dataset": {"image_size": 16}}, 10, False),
        ({"dataset": {"channels": 3}}, 10, False),
        ({"diffusion": {"prediction": "v"}}, 10, False),
        ({"diffusion": {"num_timesteps": 500}}, 10, False),
    ],
)
def test_an_architecture_is_what_weights_depend_on(
    changes: dict[str, Any], num_classes: int, is_the_same: bool
) -> None:
    assert (tiny_params(**changes).architecture(num_classes) == ARCHITECTURE) == is_the_same


def test_another_number_of_classes_is_another_architecture_of_a_conditional_network() -> None:
    params = tiny_params(model={"class_conditional": True})
    assert params.architecture(10) != params.architecture(11)


def test_a_pickle_with_a_safetensors_name_is_refused_unread(tmp_path: Path) -> None:
    path, trace = tmp_path / "pickle.safetensors", tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(trace),)

    torch.save({"model": Payload()}, path)
    assert_refused(path, "not a readable safetensors file")
    assert not trace.exists()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing.safetensors", "No such file")
    assert_refused(tmp_path, "not a readable safetensors file")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_the_network_are_refused(change: str) -> None:
    state, model = states_of()["raw"], tiny_model(tiny_params())
    if change == "missing":
        del state["norm.weight"]
    else:
        state["extra" if change == "extra" else "norm.weight"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"the weights of somewhere do not fit the network: .*(extra|norm\.weight)"):
        load_into(model, state, Path("somewhere"))
