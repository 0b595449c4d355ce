"""Everything that training changes, and its exact resume from states saved in the stage's work folder."""

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
INFO = "info"  # the set that holds a state's plain values


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        model: the network.
        ema: its averaged weights; None on other ranks than the first.
        optimizer: AdamW over the network's parameters.
        loss_sum: the sum of the losses since the last row of the curve, a scalar on the device; None before step 0.
        num_losses: how many losses that sum has.
        step: optimizer updates done.
        curve: rows of step, mean loss, learning rate and compute spent; a function of the seed alone.
        timings: for each row of the curve, cumulative seconds and peak memory.
        device_seconds: spent in training steps so far.
        data_wait_seconds: the part of these spent waiting for data.
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
        """All tensors by kind and name, not copied: raw, ema, exp_avg, exp_avg_sq, step, and the sum of losses."""
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
        """All plain values by name."""
        return {name: getattr(self, name) for name in PLAIN_VALUES}

    def restore(self, sets: Sets, plain: dict[str, Any]) -> None:
        """Restore what `tensors` and `plain` returned."""
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
    """The last two states of a training stage on disk, so that one is whole whatever happens.

    Args:
        folder: the stage's work folder, `.work/OUTPUT/KEY`.
        every_seconds: the longest time between saves.
        every_steps: the most steps between saves; None: no limit.

    Attributes:
        last_step: the step of the state last saved or loaded; 0 if there is none.
    """

    def __init__(self, folder: Path, every_seconds: float, every_steps: int | None = None) -> None:
        self.folder = folder
        self._every_seconds, self._every_steps = every_seconds, every_steps
        self._last_time, self.last_step = time.monotonic(), 0

    def load(self, accept: Callable[[dict[str, Any]], bool] = lambda info: True) -> tuple[Sets, dict[str, Any]] | None:
        """The tensors and plain values of the newest undamaged state, or None; damaged ones are renamed.

        Args:
            accept: whether a state may be used, by its plain values.
        """
        for file in reversed(self._files()):
            if (loaded := load_undamaged(file)) is None:
                continue
            sets, _ = loaded
            try:
                info = json.loads(sets.pop(INFO)["json"].numpy().tobytes())
                step = int(info["step"])
            except (KeyError, ValueError, TypeError, RecursionError) as error:
                put_aside(file, f"it does not say which step it belongs to: {error}")
                continue
            if accept(info):
                self.last_step = step
                return sets, info
        return None

    def is_due(self, step: int) -> bool:
        """Whether it is time to save; asked at every step, so it uses neither disk nor device."""
        if self._every_steps is not None and step - self.last_step >= self._every_steps:
            return True
        return time.monotonic() - self._last_time >= self._every_seconds

    def save(self, sets: Sets, info: dict[str, Any]) -> None:
        """Save a state atomically and delete all but the last two.

        Args:
            sets: its tensors.
            info: its plain values, `step` among them.

        Raises:
            UserError: the file can't be written; earlier states are unchanged.
        """
        step = int(info["step"])
        own = self.folder / f"state-{step:010d}.safetensors"
        plain = torch.frombuffer(bytearray(json.dumps(info).encode()), dtype=torch.uint8)  # a header is limited in size
        with replace_file(own) as building:
            save_tensors(building, {**sets, INFO: {"json": plain}}, {})
        older = [file for file in self._files() if file.name < own.name]  # newer ones were not accepted by `load`
        for file in older[: -(STATES_KEPT - 1)]:
            file.unlink(missing_ok=True)
        self._last_time, self.last_step = time.monotonic(), step

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.safetensors"))


class ProgressNote:
    """A small file in the work folder that says how far training is, for `maskdm status`; written once a second.

    Args:
        folder: the work folder.
        total: steps in all.
        done: steps done by earlier processes.
    """

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        self._folder, self._total, self._before = folder, total, done
        self._started = self._written = time.monotonic()

    def update(self, done: int) -> None:
        """Note how many steps are done in all; a disk that refuses the file does no harm."""
        now = time.monotonic()
        if now - self._written < NOTE_EVERY_SECONDS or done <= self._before:
            return
        self._written = now
        left = (self._total - done) * (now - self._started) / (done - self._before)
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        note = {"done": done, "total": self._total, "unit": "step", "seconds_left": round(left, 1), "time": when}
        with suppress(OSError):
            building = self._folder / f"{PROGRESS}.building"
            building.write_text(json.dumps(note), encoding="utf-8")
            building.replace(self._folder / PROGRESS)


class Pieces:
    """Finished parts of a stage's work by name, for example batches of samples.

    Args:
        folder: a folder in the stage's work folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and plain values of a finished part, or None; a damaged one is renamed."""
        loaded = load_undamaged(self._file(name))
        return loaded and (loaded[0].get("piece", {}), loaded[1])

    def save(self, name: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Keep a finished part.

        Raises:
            UserError: the file can't be written.
        """
        with replace_file(self._file(name)) as building:
            save_tensors(building, {"piece": tensors}, info)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def load_undamaged(file: Path) -> tuple[Sets, dict[str, Any]] | None:
    """What a file of tensors in a work folder holds, or None; if it is damaged it is renamed, with a warning.

    Raises:
        UserError: it can't be read now.
    """
    try:
        return load_tensors(file) if file.exists() else None
    except DamagedError as error:
        put_aside(file, error.reason)
        return None


def put_aside(file: Path, reason: str) -> None:
    """Rename a damaged file of a work folder, so that nothing uses it, and print a warning."""
    damaged = file.with_name(file.name + ".damaged")
    file.replace(damaged)
    print(
        f"warning: {file} is damaged and was renamed to {damaged.name}; what is missing is computed again ({reason})",
        file=sys.stderr,
        flush=True,
    )
