"""Resumable training state, in a work folder that is no output of any stage."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from maskdm.checkpoint import load_all, save_weights
from maskdm.errors import UserError
from maskdm.publishing import cannot_write

States = dict[str, dict[str, Tensor]]


class StateStore:
    """The newest state of one training stage.

    Args:
        folder: the work folder, e.g. `.work/results/pretrain/patch-m50/seed-0`.
        fingerprint: of everything that the state depends on; a state of another one is discarded.
        every_seconds: after how long `is_due`.
    """

    def __init__(self, folder: Path, fingerprint: str, every_seconds: float) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._file = folder / "state.safetensors"
        self._every_seconds, self._last = every_seconds, time.monotonic()

    def load(self) -> tuple[States, dict[str, Any]] | None:
        """The state to go on from, or None."""
        if not self._file.exists():
            return None
        try:
            states, info = load_all(self._file)
        except UserError as error:
            print(f"starting over: {error}", file=sys.stderr)
            return None
        if info.get("fingerprint") != self.fingerprint:
            print(f"starting over: the state in {self.folder} belongs to other params or data", file=sys.stderr)
            return None
        return states, info

    @property
    def is_due(self) -> bool:
        """Whether the last save is long enough ago."""
        return time.monotonic() - self._last >= self._every_seconds

    def save(self, states: States, info: dict[str, Any]) -> None:
        """Replace the state, atomically.

        Raises:
            UserError: the place can't be written.
        """
        building = self._file.with_suffix(".building")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_weights(building, states, {"fingerprint": self.fingerprint, **info})
            with building.open("rb") as file:
                os.fsync(file.fileno())
            building.replace(self._file)
        except OSError as error:
            raise cannot_write(self._file, error) from error
        self._last = time.monotonic()

    def clear(self) -> None:
        """Forget the state: the stage has published its output."""
        self._file.unlink(missing_ok=True)  # first: what lies beside it is of no use without it
        shutil.rmtree(self.folder, ignore_errors=True)
