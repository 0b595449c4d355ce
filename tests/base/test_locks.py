"""One writer at a time: others wait and say for whom, and a dead one is not in the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from maskdm.base.errors import UserError
from maskdm.base.locks import holder_of, one_writer

HOLDING = """
import sys, time
from pathlib import Path
from maskdm.base.locks import one_writer
with one_writer(Path(sys.argv[1]), "pretrain x"):
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "x" / "lock"


def start_another(lock: Path, order: list[str]) -> threading.Thread:
    """Another writer, which has begun to wait."""

    def work() -> None:
        with one_writer(lock, "pretrain x"):
            order.append("second")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.3)
    return thread


@pytest.mark.parametrize(
    ("line", "whom"),
    [
        (None, str(os.getpid())),
        (json.dumps({"pid": 7, "host": "node-3"}), "7 on node-3"),
        ("", "?"),  # it is just being written
    ],
    ids=["its line", "another host's line", "no line"],
)
def test_another_writer_waits_and_says_for_whom(
    lock: Path, capsys: pytest.CaptureFixture[str], line: str | None, whom: str
) -> None:
    order: list[str] = []
    with one_writer(lock, "pretrain x"):
        if line is not None:
            lock.write_text(line, encoding="utf-8")
        thread = start_another(lock, order)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"pretrain x: waiting for process {whom}, which works on it" in capsys.readouterr().err


def test_the_holder_is_known_while_it_works_and_not_after(lock: Path) -> None:
    assert holder_of(lock) is None, "there is no such file"
    with one_writer(lock, "pretrain x"):
        holder = holder_of(lock)
        assert holder is not None
        assert (holder["pid"], holder["host"], holder["what"]) == (os.getpid(), socket.gethostname(), "pretrain x")
        assert holder_of(lock) is not None, "asking frees nothing"
    assert holder_of(lock) is None
    with pytest.raises(ValueError), one_writer(lock, "x"):
        raise ValueError
    assert holder_of(lock) is None


def test_a_killed_writer_does_not_block_the_next(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"at work\n"
    holder = holder_of(lock)
    assert holder is not None and holder["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert holder_of(lock) is None
    with one_writer(lock, "y"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_the_file_system_has_no_locks_there_is_a_warning(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = []
    with one_writer(lock, "pretrain x"):
        done.append(True)
    assert done
    error = capsys.readouterr().err
    assert f"warning: {lock} can't be locked ({os.strerror(code)})" in error and "only one process at a time" in error
    assert holder_of(lock) is None, "it is not known"


def test_any_other_refusal_is_an_error(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Bad file descriptor"), one_writer(lock, "x"):
        pass


@pytest.mark.parametrize("in_the_way", ["locks", "locks/x"])
def test_a_place_that_can_not_be_written_is_a_user_error(tmp_path: Path, lock: Path, in_the_way: str) -> None:
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=rf"cannot write {lock}: "), one_writer(lock, "x"):
        pass


def test_a_full_disk_is_a_user_error(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=rf"cannot write {lock}: No space left"), one_writer(lock, "x"):
        pass


def test_an_error_of_the_block_is_not_taken_for_one_of_the_lock(lock: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError) as caught, one_writer(lock, "x"):
        raise error
    assert caught.value is error
