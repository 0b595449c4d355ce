"""What a killed stage goes on from: training states and finished pieces, each with a checksum, in its work folder."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskdm.base.publishing import replace_file
from maskdm.base.tensors import DamagedError, Sets, load_tensors, save_tensors

STATES_KEPT = 2
PROGRESS = "progress.json"
NOTE_EVERY_SECONDS = 1.0
INFO = "info"  # the set of a state's plain values


class StateStore:
    """The last two states of a training stage, so that one is whole whatever happens.

    Args:
        folder: the work folder, e.g. `.work/results/pretrain/patch-m50/seed-0`; whose it is, `Work` knows.
        every_seconds: after how long `is_due`.
        every_steps: after how many steps `is_due`, if that comes first; None: never.

    Attributes:
        last_step: of the state that was last saved or loaded; 0 where there is none.
    """

    def __init__(self, folder: Path, every_seconds: float, every_steps: int | None = None) -> None:
        self.folder = folder
        self._every_seconds, self._every_steps = every_seconds, every_steps
        self._last_time, self.last_step = time.monotonic(), 0

    def load(self, accept: Callable[[dict[str, Any]], bool] = lambda info: True) -> tuple[Sets, dict[str, Any]] | None:
        """The newest state that is whole, or None; a damaged one is reported and renamed.

        Args:
            accept: whether a state can be gone on from, by its info.
        """
        for file in reversed(self._files()):
            try:
                sets, info = load_tensors(file)
            except DamagedError as error:
                put_aside(file, error.reason)
                continue
            try:
                info = json.loads(sets.pop(INFO)["json"].numpy().tobytes())
                step = int(info["step"])
            except (KeyError, ValueError, TypeError, RecursionError) as error:
                put_aside(file, f"it does not say of which step it is: {error}")
                continue
            if accept(info):
                self.last_step = step
                return sets, info
        return None

    def is_due(self, step: int) -> bool:
        """Whether the last save is long enough ago; asked at every step, so it touches neither disk nor device."""
        if self._every_steps is not None and step - self.last_step >= self._every_steps:
            return True
        return time.monotonic() - self._last_time >= self._every_seconds

    def save(self, sets: Sets, info: dict[str, Any]) -> None:
        """Add a state, atomically, and drop all but the last two.

        Args:
            sets: its tensors.
            info: plain values; must hold `step`.

        Raises:
            UserError: the place can't be written; the states before are as they were.
        """
        step = int(info["step"])
        own = self.folder / f"state-{step:010d}.safetensors"
        plain = torch.frombuffer(bytearray(json.dumps(info).encode()), dtype=torch.uint8)  # a header has a limit
        with replace_file(own) as building:
            save_tensors(building, {**sets, INFO: {"json": plain}}, {})
        older = [file for file in self._files() if file.name < own.name]  # newer ones are there if they were refused
        for file in older[: -(STATES_KEPT - 1)]:
            file.unlink(missing_ok=True)
        self._last_time, self.last_step = time.monotonic(), step

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))


class ProgressNote:
    """Tells `maskdm status` how far a stage is, in a small file of its work folder; at most once a second.

    Args:
        folder: the work folder.
        total: how much there is to do.
        done: how much was done before.
        unit: what is counted.
    """

    def __init__(self, folder: Path, total: int, done: int = 0, unit: str = "step") -> None:
        self._folder, self._total, self._before, self._unit = folder, total, done, unit
        self._started = self._written = time.monotonic()

    def update(self, done: int) -> None:
        """Say how much is done in all; a disk that refuses it does not matter."""
        now = time.monotonic()
        if now - self._written < NOTE_EVERY_SECONDS or done <= self._before:
            return
        self._written = now
        left = (self._total - done) * (now - self._started) / (done - self._before)
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        note = {"done": done, "total": self._total, "unit": self._unit, "seconds_left": round(left, 1), "time": when}
        with suppress(OSError):
            building = self._folder / f"{PROGRESS}.building"
            building.write_text(json.dumps(note), encoding="utf-8")
            building.replace(self._folder / PROGRESS)


class Pieces:
    """Parts of a stage's work that are finished, e.g. batches of samples, by name.

    Args:
        folder: in the work folder of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the info of a finished part, or None; a damaged one is reported and made again."""
        file = self._file(name)
        if not file.exists():
            return None
        try:
            sets, info = load_tensors(file)
        except DamagedError as error:
            put_aside(file, error.reason)
            return None
        return sets.get("piece", {}), info

    def save(self, name: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Keep a finished part.

        Raises:
            UserError: the place can't be written.
        """
        with replace_file(self._file(name)) as building:
            save_tensors(building, {"piece": tensors}, info)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def put_aside(file: Path, reason: str) -> None:
    """Rename a damaged file of a work folder, so that nothing takes it for whole, and say so."""
    damaged = file.with_name(file.name + ".damaged")
    file.replace(damaged)
    print(
        f"warning: {file} is damaged and was renamed to {damaged.name}; going on from what was saved before it "
        f"({reason})",
        file=sys.stderr,
        flush=True,
    )
