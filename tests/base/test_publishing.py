"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskdm.base.errors import UserError
from maskdm.base.publishing import move, publish_folder, publish_json, publish_text
from maskdm.config import paths

OUTPUT = Path("results/pretrain/scratch/seed-0")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def other_filesystem(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the kernel refuses to rename or link into or out of, as if it were another file system."""
    folder = tmp_path_factory.mktemp("other")

    def refusing(function: Callable[..., None]) -> Callable[..., None]:
        def call(source: Path, target: Path, **options: Any) -> None:
            if len({Path(path).parent.resolve().is_relative_to(folder) for path in (source, target)}) == 2:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            function(source, target, **options)

        return call

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return folder


def publish(output: Path = OUTPUT, **files: str) -> None:
    with publish_folder(output) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def content_of(folder: Path = OUTPUT) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text(encoding="utf-8") for f in folder.rglob("*") if f.is_file()}


def files_below(folder: Path) -> list[str]:
    return sorted(f.as_posix() for f in folder.rglob("*") if not f.is_dir())


def test_folder_is_what_the_block_wrote_and_nothing_else_is_left() -> None:
    with publish_folder(OUTPUT) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1", encoding="utf-8")
        (folder / "b").write_text("2", encoding="utf-8")
    assert content_of() == {"inner/a": "1", "b": "2"}
    assert len(files_below(Path())) == 2


def test_nothing_is_visible_before_the_block_ends() -> None:
    with publish_folder(OUTPUT) as folder:
        (folder / "a").write_text("1", encoding="utf-8")
        assert not OUTPUT.exists()
        assert all(part.name.startswith(".") for part in OUTPUT.parent.iterdir()), "no pattern of a stage sees it"
    assert OUTPUT.is_dir()


def test_old_folder_is_visible_until_the_block_ends() -> None:
    publish(a="old")
    with publish_folder(OUTPUT) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
        assert content_of() == {"a": "old"}
    assert content_of() == {"a": "new"}


def test_new_folder_replaces_the_old_one_whole() -> None:
    publish(a="old", b="old")
    publish(b="new", c="new")
    assert content_of() == {"b": "new", "c": "new"}
    assert len(files_below(Path())) == 2


@pytest.mark.parametrize("error", [UserError("mine"), ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_old_folder_stays_and_the_half_built_goes_when_the_block_raises(error: BaseException) -> None:
    publish(a="old")
    with pytest.raises(type(error)) as caught, publish_folder(OUTPUT) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
        raise error
    assert caught.value is error
    assert content_of() == {"a": "old"}
    assert len(files_below(Path())) == 1


def test_no_folder_appears_when_the_block_raises() -> None:
    with pytest.raises(UserError), publish_folder(OUTPUT) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
        raise UserError("no")
    assert not OUTPUT.exists() and files_below(Path()) == []


def test_leftover_of_a_killed_process_is_not_published() -> None:
    with publish_folder(OUTPUT) as folder:
        building = folder
    building.mkdir(parents=True)
    (building / "leftover").write_text("x", encoding="utf-8")
    publish(a="1")
    assert content_of() == {"a": "1"}


def test_leftover_of_a_process_killed_while_replacing_is_no_hindrance() -> None:
    with publish_folder(OUTPUT) as folder:
        old = folder.with_suffix(".old")
    old.mkdir(parents=True)
    (old / "leftover").write_text("x", encoding="utf-8")
    publish(a="1")
    publish(a="2")
    assert content_of() == {"a": "2"}
    assert len(files_below(Path())) == 1


def test_killed_process_publishes_nothing_and_the_next_one_does() -> None:
    code = f"""
import time
from pathlib import Path
from maskdm.base.publishing import publish_folder
with publish_folder(Path({str(OUTPUT)!r})) as folder:
    (folder / "a").write_text("half")
    Path("started").touch()
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not Path("started").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Path("started").exists() and not OUTPUT.exists()
    publish(b="whole")
    assert content_of() == {"b": "whole"}


@pytest.mark.parametrize("in_the_way", ["results", "results/pretrain", "results/pretrain/scratch"])
def test_file_where_a_folder_should_be_is_a_user_error(in_the_way: str) -> None:
    file = Path(in_the_way)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=f"cannot write {OUTPUT}"):
        publish(a="1")
    assert file.read_text(encoding="utf-8") == "mine"


def test_full_disk_is_a_user_error_and_the_old_folder_stays() -> None:
    publish(a="old")
    with pytest.raises(UserError, match=f"cannot write {OUTPUT}: No space left"), publish_folder(OUTPUT):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert content_of() == {"a": "old"}


def test_failed_replacement_leaves_the_old_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(a="old")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".building"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match="No space left"):
        publish(a="new")
    assert content_of() == {"a": "old"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_moving_to_another_filesystem_and_back(other_filesystem: Path, kind: str) -> None:
    here, there = Path("a/here"), other_filesystem / "b" / "there"
    (here if kind == "folder" else here.parent).mkdir(parents=True)
    (here / "inner" if kind == "folder" else here).write_text("1", encoding="utf-8")
    move(here, there)
    assert not here.exists()
    move(there, here)
    assert (here / "inner" if kind == "folder" else here).read_text(encoding="utf-8") == "1"
    assert files_below(other_filesystem) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_another_filesystem_can_not_hold_stays_where_it_was(
    other_filesystem: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    here, there = Path("here"), other_filesystem / "there"
    if kind == "folder":
        here.mkdir()
    (here / "inner" if kind == "folder" else here).write_text("1", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            move(here, there)
    assert not there.exists() and here.exists()
    move(here, there)
    assert there.exists() and not here.exists()
    assert [path.name for path in other_filesystem.iterdir()] == ["there"]


def test_results_may_lie_on_another_filesystem_than_the_work_folder(other_filesystem: Path) -> None:
    paths.RESULTS.symlink_to(other_filesystem)
    publish(a="1")
    publish(a="2", b="2")
    publish_json(paths.record("prepare"), {"x": 1})
    assert content_of() == {"a": "2", "b": "2"}
    assert (other_filesystem / OUTPUT.relative_to(paths.RESULTS) / "b").is_file()
    assert paths.record("prepare").is_file()


def test_output_folder_that_is_a_link_is_replaced_by_the_new_folder(other_filesystem: Path) -> None:
    OUTPUT.parent.mkdir(parents=True)
    OUTPUT.symlink_to(other_filesystem)
    (other_filesystem / "mine").write_text("stays", encoding="utf-8")
    publish(a="1")
    assert content_of() == {"a": "1"} and not OUTPUT.is_symlink()
    assert (other_filesystem / "mine").is_file()


def test_equal_values_give_equal_bytes() -> None:
    publish_json(Path("a.json"), {"x": 0.1, "y": [1, None, "ε"], "z": {"b": 1, "a": 2}})
    publish_json(Path("b.json"), {"z": {"a": 2, "b": 1}, "y": [1, None, "ε"], "x": 0.1})
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    assert Path("a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_value_that_json_cannot_hold_is_refused_and_the_old_file_stays(value: object) -> None:
    file = Path("results/metrics/x.json")
    publish_json(file, {"fid": 1.0})
    before = file.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        publish_json(file, {"fid": value})
    assert file.read_bytes() == before
    assert files_below(Path()) == [file.as_posix()]


def test_text_is_replaced_whole_and_nothing_else_is_left() -> None:
    file = Path("results/a/b.txt")
    publish_text(file, "long " * 1000)
    publish_text(file, "short")
    assert file.read_text(encoding="utf-8") == "short"
    assert files_below(Path()) == [file.as_posix()]


def test_file_that_cannot_be_written_is_a_user_error() -> None:
    Path("results").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write results/metrics/x\.json"):
        publish_json(Path("results/metrics/x.json"), {})


def test_failed_text_leaves_nothing_behind() -> None:
    file = Path("results/metrics/x.json")
    (file / "inner").mkdir(parents=True)
    with pytest.raises(UserError):
        publish_json(file, {})
    assert files_below(Path()) == []


def test_folder_where_a_file_should_be_is_a_user_error() -> None:
    file = Path("results/metrics/x.json")
    (file / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write results/metrics/x\.json"):
        publish_json(file, {})
    assert (file / "inner").is_dir()
