"""What an interrupted stage resumes from: states and pieces, whole or refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maskdm.base.errors import UserError
from maskdm.training.state import Pieces, ProgressNote, StateStore
from tests.factories import no_file_larger_than

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "truncated": lambda old: old[:-100],
    "empty": lambda old: b"",
    "foreign": lambda old: b"\0" * 3000,
    "flipped": lambda old: old[:-50] + bytes([old[-50] ^ 1]) + old[-49:],
}


def store_in(folder: Path, every_seconds: float = 60.0, every_steps: int | None = None) -> StateStore:
    return StateStore(folder / "work" / "arm", every_seconds, every_steps)


def save(store: StateStore, step: int) -> None:
    store.save({"raw": {"a": torch.full((100,), float(step))}}, {"step": step, "curve": [{"loss": 0.1 + 0.2}]})


def loaded_step(store: StateStore) -> int | None:
    """The step of the state that it gives, whose tensors must be that step's."""
    if (loaded := store.load()) is None:
        return None
    sets, info = loaded
    assert sets["raw"]["a"].tolist() == [float(info["step"])] * 100
    assert info["curve"] == [{"loss": 0.1 + 0.2}]
    return int(info["step"])


def names(store: StateStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_the_newest_state_comes_back_and_the_last_two_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert loaded_step(store) is None
    for step in (5, 99, 100, 1000):
        save(store, step)
        assert loaded_step(store_in(tmp_path)) == step
    assert names(store) == ["state-0000000100.safetensors", "state-0000001000.safetensors"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_is_reported_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    save(store, 20)
    file = store.folder / "state-0000000020.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert loaded_step(store) == 10
    assert f"warning: {file} is damaged and was renamed to {file.name}.damaged" in capsys.readouterr().err
    save(store, 20)
    assert loaded_step(store) == 20, "the damaged one is not in the way"
    assert file.with_name(file.name + ".damaged").exists()


def test_where_both_states_are_damaged_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_in(tmp_path)
    for step in (10, 20):
        save(store, step)
        (store.folder / f"state-{step:010d}.safetensors").write_bytes(b"")
    assert loaded_step(store) is None
    assert capsys.readouterr().err.count("is damaged") == 2


def test_a_state_that_is_not_accepted_is_passed_over_and_stays(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    save(store, 20)
    loaded = store.load(accept=lambda info: info["step"] < 15)
    assert loaded is not None and loaded[1]["step"] == 10
    assert loaded_step(store) == 20


def test_a_state_saved_before_refused_ones_is_kept(tmp_path: Path) -> None:
    """Where a milestone was lost, training starts again before it, and newer states are still there."""
    store = store_in(tmp_path)
    save(store, 900)
    save(store, 1000)
    for step in (100, 200, 300):
        save(store, step)
        loaded = store.load(accept=lambda info: info["step"] < 500)
        assert loaded is not None and loaded[1]["step"] == step
    assert len(names(store)) == 4


def test_a_state_that_can_not_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path)
    save(store, 10)

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"cannot read .*state-0000000010\.safetensors: Permission denied"):
            store.load()
    assert loaded_step(store) == 10


@pytest.mark.workflow
def test_a_curve_of_any_length_can_be_saved(tmp_path: Path) -> None:
    """The header of safetensors ends at 100 MB."""
    store = store_in(tmp_path)
    curve = [{"step": step, "loss": 0.123456789, "note": "x" * 11_000} for step in range(10_000)]
    store.save({}, {"step": 1, "curve": curve})
    loaded = store.load()
    assert loaded is not None and loaded[1]["curve"] == curve


def test_a_state_is_due_after_its_time_or_its_steps_and_not_right_after_a_save(tmp_path: Path) -> None:
    assert not store_in(tmp_path).is_due(1000)
    assert store_in(tmp_path, every_seconds=1e-9).is_due(1)
    by_steps = store_in(tmp_path, every_steps=10)
    assert [step for step in range(1, 12) if by_steps.is_due(step)] == [10, 11]
    save(by_steps, 11)
    assert [step for step in range(11, 23) if by_steps.is_due(step)] == [21, 22]
    resumed = store_in(tmp_path, every_steps=10)
    assert loaded_step(resumed) == 11
    assert [step for step in range(11, 23) if resumed.is_due(step)] == [21, 22], "counted from the state on"


def test_when_a_state_is_due_does_not_depend_on_the_time_of_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, every_seconds=30.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that has jumped back by decades
    assert not store.is_due(1)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31)
    assert store.is_due(1)


def test_a_place_that_is_a_file_is_an_error_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*state-0000000010\.safetensors"):
        save(store_in(tmp_path), 10)


def test_a_full_disk_is_an_error_of_the_users_and_keeps_the_earlier_states(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    save(store, 20)
    before = names(store)
    with no_file_larger_than(100), pytest.raises(UserError, match=r"cannot write .*state-0000000030\.safetensors"):
        save(store, 30)
    assert names(store) == before
    assert loaded_step(store) == 20
    save(store, 30)
    assert loaded_step(store) == 30


SAVING = """
import sys, torch
from pathlib import Path
from maskdm.training.state import StateStore
store = StateStore(Path(sys.argv[1]), 60.0)
print("ready", flush=True)
for step in range(1, 100_000):
    store.save({"raw": {"a": torch.full((200_000,), float(step))}}, {"step": step})
"""


@pytest.mark.workflow
def test_a_process_killed_while_it_saves_leaves_a_whole_state(tmp_path: Path) -> None:
    """At five moments, each in a process of its own that does nothing but save."""
    for round_number in range(5):
        folder = tmp_path / str(round_number)
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while not list(folder.glob("state-*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.0034 * round_number)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        loaded = StateStore(folder, 60.0).load()
        assert loaded is not None
        assert set(loaded[0]["raw"]["a"].tolist()) == {float(loaded[1]["step"])}
        assert not list(folder.glob("*.damaged"))


# --- progress


def test_progress_is_noted_once_a_second_with_the_time_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    note, file = ProgressNote(tmp_path, total=100, done=20), tmp_path / "progress.json"
    now += 0.5
    note.update(25)
    assert not file.exists()
    now += 3.5
    note.update(30)
    said = json.loads(file.read_text(encoding="utf-8"))
    assert (said["done"], said["total"], said["unit"]) == (30, 100, "step")
    assert said["seconds_left"] == 28.0, "70 steps at 10 in 4 s: what an earlier process has done took it no time"
    now += 0.9
    note.update(40)
    assert json.loads(file.read_text(encoding="utf-8")) == said
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_progress_that_can_not_be_noted_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    note = ProgressNote(tmp_path / "gone", total=10)
    now = 2.0
    note.update(5)
    assert list(tmp_path.iterdir()) == []


# --- pieces


def test_a_piece_comes_back_and_others_are_not_there(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "shards")
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    assert pieces.load("a") is None
    pieces.save("a", {"images": images}, {"scores": {"fid": 0.1 + 0.2}})
    piece = Pieces(tmp_path / "shards").load("a")
    assert piece is not None
    assert torch.equal(piece[0]["images"], images) and piece[0]["images"].dtype == torch.uint8
    assert piece[1]["scores"] == {"fid": 0.1 + 0.2}
    assert pieces.load("b") is None


def test_a_piece_without_tensors_keeps_its_values(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path)
    pieces.save("scores", {}, {"scores": {"fid": 1.5}})
    piece = pieces.load("scores")
    assert piece is not None and piece[1]["scores"] == {"fid": 1.5}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_reported_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    pieces = Pieces(tmp_path)
    pieces.save("a", {"images": torch.zeros(300, dtype=torch.uint8)}, {})
    file = tmp_path / "a.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert pieces.load("a") is None
    assert f"warning: {file} is damaged" in capsys.readouterr().err
    pieces.save("a", {"images": torch.ones(300, dtype=torch.uint8)}, {})
    piece: Any = pieces.load("a")
    assert piece[0]["images"].sum() == 300
