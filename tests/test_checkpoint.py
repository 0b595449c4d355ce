"""Weights and resumable state on disk: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from maskdm.checkpoint import (
    FORMAT,
    architecture_of,
    file_sha256,
    load_all,
    load_into,
    load_weights,
    save_weights,
)
from maskdm.errors import UserError
from maskdm.resume import StateStore
from tests.factories import tiny_model, tiny_params

States = dict[str, dict[str, Tensor]]
ARCHITECTURE = architecture_of(tiny_params(), num_classes=10)
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
    save_weights(path, states_of(), INFO)
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
    states, info = load_all(file)
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
    save_weights(others[0], states, INFO)
    reversed_states = {kind: dict(reversed(tensors.items())) for kind, tensors in reversed(states.items())}
    save_weights(others[1], reversed_states, dict(reversed(INFO.items())))
    save_weights(others[2], states_of(seed=1), INFO)
    save_weights(others[3], states, {**INFO, "step": 13})
    same = [path.read_bytes() == file.read_bytes() for path in others]
    assert same == [True, True, False, False]
    assert file_sha256(others[0]) == file_sha256(file) != file_sha256(others[2])


def test_tensors_that_are_views_or_need_gradients_are_saved_by_value(tmp_path: Path) -> None:
    path, base = tmp_path / "views", torch.arange(6.0, requires_grad=True)
    save_weights(path, {"raw": {"row": base[:3], "across": base.reshape(2, 3).T}}, INFO)
    raw = load_all(path)[0]["raw"]
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


def outcomes_of_flipped_header_bits(file: Path, seed: int = 0, count: int = 300) -> dict[str, int]:
    """How loading ends, by name of the exception, over random single-bit flips in the header."""
    original, outcomes = file.read_bytes(), dict[str, int]()
    header = int.from_bytes(original[:8], "little")
    model = tiny_model(tiny_params())
    numbers = np.random.default_rng(seed)
    for position, bit in zip(numbers.integers(8, 8 + header, count), numbers.integers(0, 8, count), strict=True):
        content = bytearray(original)
        content[position] ^= 1 << int(bit)
        file.write_bytes(content)
        try:
            load_into(model, load_weights(file, "ema", ARCHITECTURE)[0], file)
            name = "loaded"  # the flip hit plain info, another set's name, or padding
        except Exception as error:
            name = type(error).__name__
        outcomes[name] = outcomes.get(name, 0) + 1
    return outcomes


def test_a_flipped_bit_anywhere_in_the_header_is_never_a_traceback(file: Path) -> None:
    outcomes = outcomes_of_flipped_header_bits(file)
    assert set(outcomes) <= {"UserError", "loaded"}
    assert outcomes["UserError"] > 200


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
        expected=architecture_of(params, 10),
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
    assert (architecture_of(tiny_params(**changes), num_classes) == ARCHITECTURE) == is_the_same


def test_another_number_of_classes_is_another_architecture_of_a_conditional_network() -> None:
    params = tiny_params(model={"class_conditional": True})
    assert architecture_of(params, 10) != architecture_of(params, 11)


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


# --- resumable state


def store_in(folder: Path, fingerprint: str = "a", every_seconds: float = 60.0) -> StateStore:
    return StateStore(folder / "work" / "arm", fingerprint, every_seconds)


def test_a_state_comes_back_to_whoever_asks_with_its_fingerprint(tmp_path: Path) -> None:
    assert store_in(tmp_path).load() is None
    store_in(tmp_path).save(states_of(), INFO)
    loaded = store_in(tmp_path).load()
    assert loaded is not None
    states, info = loaded
    assert info == {"format": FORMAT, "fingerprint": "a", **INFO}
    assert all(torch.equal(states["ema"][name], tensor) for name, tensor in states_of()["ema"].items())
    assert states["step"]["a"].shape == ()


def test_a_later_state_replaces_the_earlier_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(states_of(), INFO)
    store.save(states_of(seed=1), {**INFO, "step": 13})
    loaded = store.load()
    assert loaded is not None
    assert loaded[1]["step"] == 13
    assert [path.name for path in store.folder.iterdir()] == ["state.safetensors"]


def test_a_state_of_other_params_is_left_alone_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_in(tmp_path).save(states_of(), INFO)
    assert store_in(tmp_path, fingerprint="b").load() is None
    error = capsys.readouterr().err
    assert "starting over" in error
    assert "belongs to other params or data" in error


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign"])
def test_a_damaged_state_is_left_alone_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    store = store_in(tmp_path)
    store.save(states_of(), INFO)
    file = store.folder / "state.safetensors"
    content = {"truncated": file.read_bytes()[:1000], "empty": b"", "foreign": b"\0" * 3000}[damage]
    file.write_bytes(content)
    assert store.load() is None
    error = capsys.readouterr().err
    assert "starting over" in error
    assert str(file) in error


def test_a_state_is_due_after_its_time_and_not_right_after_a_save(tmp_path: Path) -> None:
    assert not store_in(tmp_path, every_seconds=60.0).is_due
    assert store_in(tmp_path, every_seconds=1e-9).is_due
    store = store_in(tmp_path, every_seconds=60.0)
    store.save(states_of(), INFO)
    assert not store.is_due


def test_a_cleared_state_is_gone(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(states_of(), INFO)
    store.clear()
    store.clear()
    assert store.load() is None
    assert not store.folder.exists()


def test_a_place_that_is_a_file_is_an_error_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*state\.safetensors"):
        store_in(tmp_path).save(states_of(), INFO)


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """Writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_of_the_users_and_keeps_the_earlier_state(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(states_of(), INFO)
    with no_file_larger_than(1000), pytest.raises(UserError, match=r"cannot write .*state\.safetensors"):
        store.save(states_of(seed=1), {**INFO, "step": 13})
    loaded = store.load()
    assert loaded is not None
    assert loaded[1]["step"] == 12
