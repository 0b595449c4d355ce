"""What was measured on this machine, kept between calls: a file that may be lost, damaged or another machine's."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskdm.config import paths

FORMAT = "maskdm-calibration/1"
FILE = paths.WORK / "calibration.json"


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        value: seconds (the lower quartile of repetitions), or bytes.
        spread: half the width of the middle half of the repetitions, as a share of the value.
        day: when it was measured, YYYY-MM-DD.
    """

    value: float
    spread: float
    day: str


class MeasurementStore:
    """Measurements by a fingerprint of all that they depend on.

    A file that can't be read is ignored and written anew; what belongs to other params or another machine is kept
    beside what is measured now, and never used for it.

    Args:
        file: where they are kept.
        forget: start with none.
    """

    def __init__(self, file: Path = FILE, forget: bool = False) -> None:
        self._file = file
        self._measured = {} if forget else _read(file)

    def get(self, key: str) -> Measurement | None:
        """The measurement of that fingerprint, if there is one."""
        return self._measured.get(key)

    def put(self, key: str, measurement: Measurement) -> None:
        """Remember a measurement; `save` keeps it."""
        self._measured[key] = measurement

    def save(self) -> None:
        """Write the file; a folder that can't be written costs the next call its seconds, and nothing else."""
        content = {"format": FORMAT, "measured": {key: asdict(m) for key, m in self._measured.items()}}
        building = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            building.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            building.replace(self._file)
        except OSError as error:
            print(f"what was measured is not kept in {self._file}: {error.strerror}", file=sys.stderr)


def _read(file: Path) -> dict[str, Measurement]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("measured"), dict)
    ):
        return {}
    return {key: m for key, entry in content["measured"].items() if (m := _measurement(entry)) is not None}


def _measurement(entry: Any) -> Measurement | None:
    """An entry of the file, unless it is damaged."""
    try:
        measurement = Measurement(float(entry["value"]), float(entry["spread"]), str(entry["day"]))
    except (TypeError, KeyError, ValueError):
        return None
    is_sound = math.isfinite(measurement.value) and measurement.value >= 0 and math.isfinite(measurement.spread)
    return measurement if is_sound else None
