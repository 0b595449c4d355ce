"""What a run in MLflow shall carry, and how the files of results/ are read for it."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskdm.scoring.protocol import said_of
from maskdm.tracking.dataset import DatasetEntry

Points = dict[tuple[str, int], float]


@dataclass
class RunContent:
    """What a run shall carry.

    Attributes:
        params: what it was given, flat.
        points: curves and scores by (key, step): another value is another result.
        measures: single values that equal runs may have otherwise, such as timings: the newest counts.
        withdrawn: metrics that it must not carry (any more).
        tags: provenance.
        images: the PNG grids.
        dataset: what it was trained on.
        status: mlflow's, where the run is over.
    """

    params: dict[str, str]
    points: Points = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    tags: dict[str, str] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    dataset: DatasetEntry | None = None
    status: str | None = None

    @property
    def images_sha256(self) -> str:
        """A hash of all images with their names."""
        files = [(image.name, hashlib.sha256(image.read_bytes()).hexdigest()) for image in self.images]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    @property
    def has_results(self) -> bool:
        """Whether there is anything to publish."""
        return bool(self.points or self.measures or self.tags or self.images)

    def add_protocol(self, scores: dict[str, Any]) -> None:
        """Tag with what a stage's scores are of; what can't be read of it is left out."""
        with suppress(ValueError, TypeError):
            if said := said_of(scores):
                self.tags["protocol"] = said

    def add_provenance(self, record: dict[str, Any]) -> None:
        """Tag with commit and versions of a stage's record."""
        if record.get("git_commit"):
            self.tags["git_commit"] = str(record["git_commit"])
        self.tags |= {f"version.{name}": str(version) for name, version in record.get("versions", {}).items()}


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def finite(value: Any) -> float | None:
    """A number, unless it is missing, empty or not finite."""
    number = math.nan if value is None or value == "" else float(value)
    return number if math.isfinite(number) else None


def only_numbers(values: dict[str, Any]) -> dict[str, float]:
    """The values that are finite numbers."""
    numbers = {key: finite(value) for key, value in values.items()}
    return {key: number for key, number in numbers.items() if number is not None}
