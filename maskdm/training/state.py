"""What training changes, and its exact resume: states on disk, each with a checksum, in the stage's work folder."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskdm.base.publishing import replace_file
from maskdm.base.tensors import DamagedError, Sets, load_tensors, save_tensors
from maskdm.training.optimizer import Ema

PLAIN_VALUES = ("num_losses", "step", "curve", "timings", "device_seconds", "data_wait_seconds")
STATES_KEPT = 2
PROGRESS = "progress.json"
NOTE_EVERY_SECONDS = 1.0
INFO = "info"  # the set of a state's plain values


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        model: the network.
        ema: its averaged weights; None on ranks that keep none.
        optimizer: AdamW over the network's parameters.
        loss_sum: of the losses since the last row of the curve, a scalar on the device; None before the first step.
        num_losses: how many they are.
        step: optimizer updates done.
        curve: one row per logging interval: step, mean loss, lr, compute spent; a function of the seed alone.
        timings: for each of its rows, what the machine took for it.
        device_seconds: in training steps so far.
        data_wait_seconds: those of them that were spent waiting for data.
    """

    model: nn.Module
    ema: Ema | None
    optimizer: torch.optim.Optimizer
    loss_sum: Tensor | None = None
    num_losses: int = 0
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    device_seconds: float = 0.0
    data_wait_seconds: float = 0.0

    def tensors(self) -> Sets:
        """All tensors by kind and name: raw, ema, exp_avg, exp_avg_sq, step; and the sum of losses."""
        named = dict(self.model.named_parameters())
        sets: Sets = {"raw": named}  # type: ignore[dict-item]
        if self.ema is not None:
            sets["ema"] = self.ema.state_dict()
        moments = self.optimizer.state
        for key in ("exp_avg", "exp_avg_sq", "step"):
            sets[key] = {name: moments[p][key] for name, p in named.items() if key in moments[p]}
        if self.loss_sum is not None:
            sets["loss"] = {"sum": self.loss_sum}
        return sets

    def plain(self) -> dict[str, Any]:
        """All plain values."""
        return {name: getattr(self, name) for name in PLAIN_VALUES}

    def restore(self, sets: Sets, plain: dict[str, Any]) -> None:
        """Become what the state was when `tensors` and `plain` were taken."""
        named = dict(self.model.named_parameters())

        def stored(kind: str) -> dict[str, Tensor]:
            return {name: tensor.to(named[name].device) for name, tensor in sets.get(kind, {}).items()}

        self.model.load_state_dict(stored("raw"))
        if self.ema is not None:
            self.ema.load_state_dict(stored("ema"))
        moments = {kind: stored(kind) for kind in ("step", "exp_avg", "exp_avg_sq")}
        for name in moments["exp_avg"]:
            self.optimizer.state[named[name]] = {kind: tensors[name].clone() for kind, tensors in moments.items()}
        if "loss" in sets:
            self.loss_sum = sets["loss"]["sum"].to(next(iter(named.values())).device).clone()
        for name in PLAIN_VALUES:
            setattr(self, name, copy(plain[name]))


class StateStore:
    """The last two states of a training stage, so that one is whole whatever happens.

    Args:
        folder: the work folder, e.g. `.work/results/pretrain/patch-m50/seed-0`; of one key of its stamp.
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
