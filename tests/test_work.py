"""Work folders: whose they are, what is set aside and taken back, and what is kept of finished work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from maskdm import paths
from maskdm.config import StageConfig
from maskdm.errors import UserError
from maskdm.work import Work, differences, plain

OUTPUT, RECORD = Path("results/pretrain/arm/seed-0"), Path("results/records/pretrain-arm-seed-0.json")
WHAT = "pretrain arm seed 0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def claim(lr: float = 0.1) -> Work:
    return Work.claim(OUTPUT, WHAT, {"pretrain": {"lr": lr, "batch_size": 8}, "seed": 0})


def begin(lr: float = 0.1, content: str = "half") -> Work:
    work = claim(lr)
    (work.folder / "state").write_text(content)
    return work


def publish(content: str = "weights") -> None:
    (OUTPUT / "sub").mkdir(parents=True, exist_ok=True)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "checkpoint").write_text(content)
    (OUTPUT / "sub" / "curve").write_text("1,2")
    RECORD.write_text("{}")


def finish(lr: float = 0.1) -> Work:
    work = begin(lr)
    publish()
    work.keep([OUTPUT, RECORD])
    return work


def results() -> dict[str, str]:
    return {str(f): f.read_text() for f in sorted(Path("results").rglob("*")) if f.is_file()}


# --- whose it is


def test_the_same_inputs_find_the_same_work_with_its_key_and_starts_are_counted() -> None:
    first, second = begin(), claim()
    assert (first.key, first.fingerprint, first.starts) == (second.key, second.fingerprint, 1)
    assert second.starts == 2
    assert (second.folder / "state").read_text() == "half"
    owner = json.loads((second.folder / "owner.json").read_text())
    assert owner["what"] == WHAT and owner["inputs"]["pretrain"]["lr"] == 0.1


def test_unfinished_work_of_other_inputs_is_set_aside_with_what_differs_and_taken_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = begin(0.1)
    second = begin(0.2, "other")
    said = capsys.readouterr().err
    assert "begun with other inputs (pretrain.lr was 0.1, is 0.2): set aside in .work/set-aside/" in said
    assert first.key != second.key
    again = claim(0.1)
    assert (again.folder / "state").read_text() == "half"
    assert again.key == first.key
    said = capsys.readouterr().err
    assert "taking up what was set aside" in said and "pretrain.lr was 0.2, is 0.1" in said
    assert (claim(0.2).folder / "state").read_text() == "other"


def test_nothing_is_set_aside_where_nothing_was_done() -> None:
    claim(0.1)
    claim(0.2)
    assert not paths.set_aside(OUTPUT).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', None])
def test_work_that_does_not_say_whose_it_is_is_set_aside(
    capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    owner = begin().folder / "owner.json"
    owner.unlink() if content is None else owner.write_text(content)
    assert not (claim().folder / "state").exists()
    assert "does not say whose it is" in capsys.readouterr().err
    aside = list(paths.set_aside(OUTPUT).glob("unknown-*/state"))
    assert [file.read_text() for file in aside] == ["half"]


def test_an_owner_whose_inputs_were_changed_is_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    """A bit that flipped in the inputs must not give the work to those who have them."""
    owner = begin(0.1).folder / "owner.json"
    owner.write_text(owner.read_text().replace("0.1", "0.3"))
    assert not (claim(0.3).folder / "state").exists()
    assert "does not say whose it is" in capsys.readouterr().err


def test_what_a_killed_process_was_writing_is_removed() -> None:
    left = begin().folder / "sub" / "state-1.safetensors.123.building"
    left.parent.mkdir()
    left.write_text("torn")
    assert not (claim().folder / "sub" / left.name).exists()


def test_sections_and_tuples_are_inputs_as_json_has_them() -> None:
    given = plain({"pretrain": StageConfig(lr=0.1, batch_size=8), "milestones": (1, 2)})
    assert given["milestones"] == [1, 2]
    assert given["pretrain"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 1}}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b was 1, is 2"]),
        ({"a": 1}, {"b": 1}, ["a was 1, is null", "b was null, is 1"]),
        ({"a": "x" * 99}, {"a": None}, [f'a was "{"x" * 36}…, is null']),
    ],
)
def test_differences_are_told_by_dotted_path(before: Any, after: Any, said: list[str]) -> None:
    assert list(differences(before, after)) == said


def test_a_place_that_is_a_file_is_an_error_of_the_users() -> None:
    Path(".work").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write \.work"):
        claim()


# --- finished work


def test_finished_work_is_restored_to_the_byte_and_nothing_else_is_kept() -> None:
    work = finish()
    before = results()
    assert sorted(path.name for path in work.folder.iterdir()) == ["finished", "owner.json"]
    shutil.rmtree("results")
    assert claim().restore()
    assert results() == before and len(before) == 3


def test_finished_work_takes_no_room() -> None:
    finish()
    assert (OUTPUT / "checkpoint").stat().st_nlink == 2


def test_finished_work_is_copied_where_links_are_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    finish()
    before = results()
    assert (OUTPUT / "checkpoint").stat().st_nlink == 1
    shutil.rmtree("results")
    assert claim().restore() and results() == before


def test_outputs_that_are_there_already_are_left_alone() -> None:
    """A new copy would make every later stage stale."""
    finish()
    (OUTPUT / ".snakemake_timestamp").touch()
    before = (OUTPUT / "checkpoint").stat().st_mtime_ns, (OUTPUT / "checkpoint").stat().st_ino
    assert claim().restore()
    assert ((OUTPUT / "checkpoint").stat().st_mtime_ns, (OUTPUT / "checkpoint").stat().st_ino) == before


@pytest.mark.parametrize("change", ["missing", "other", "extra"])
def test_outputs_that_are_not_those_are_replaced(change: str) -> None:
    finish()
    before = results()
    if change == "missing":
        (OUTPUT / "checkpoint").unlink()
    elif change == "other":
        (OUTPUT / "checkpoint").unlink()
        (OUTPUT / "checkpoint").write_text("another")
    else:
        (OUTPUT / "extra").write_text("")
    assert claim().restore() and results() == before


def test_unfinished_work_restores_nothing() -> None:
    assert not begin().restore()


@pytest.mark.parametrize("damage", ["weights", "gone", "manifest", "manifest-text", "empty"])
def test_damaged_finished_work_is_reported_and_forgotten(capsys: pytest.CaptureFixture[str], damage: str) -> None:
    kept = finish().folder / "finished"
    shutil.rmtree("results")
    weights, manifest = kept / "files" / OUTPUT / "checkpoint", kept / "manifest.json"
    if damage == "weights":
        weights.write_text("weightx")
    elif damage == "gone":
        weights.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace("checkpoint", "checkpoins"))
    else:
        manifest.write_text("" if damage == "empty" else "[1]")
    work = claim()
    assert not work.restore()
    assert "is damaged" in capsys.readouterr().err
    assert not kept.exists() and not Path("results").exists()


def test_finished_work_is_set_aside_until_work_of_other_inputs_is_finished_too() -> None:
    """A mistake in params.yaml, seen and undone after seconds, must not cost days."""
    finish(0.1)
    before = results()
    begin(0.2)
    shutil.rmtree("results")  # as an engine does before it starts the stage
    assert claim(0.1).restore() and results() == before
    finish(0.2)
    assert not claim(0.1).restore()
    claim(0.2)
    assert not list(paths.set_aside(OUTPUT).glob("*/finished")), "room is not taken without end"


def test_work_that_can_not_be_read_now_is_not_taken_for_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    work = finish()
    shutil.rmtree("results")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", "checkpoint")

    with monkeypatch.context() as patched:
        patched.setattr("maskdm.work.file_sha256", refuse)
        with pytest.raises(UserError, match="cannot read checkpoint: Permission denied"):
            claim().restore()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        with pytest.raises(UserError, match=r"\.work/.*Permission denied"):
            claim()
    assert work.folder.exists() and claim().restore()


def test_a_kept_output_that_is_edited_in_place_is_not_restored() -> None:
    """Its hard link changes with it."""
    finish()
    with (OUTPUT / "checkpoint").open("a") as file:
        file.write("edited")
    assert not claim().restore()
