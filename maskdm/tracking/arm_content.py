"""What an arm's run in MLflow carries: a pure function of params and the files in results/."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.config import Params

ARM_STAGES = ("pretrain", "finetune", "sample", "evaluate")
SECTIONS = {"dataset", "model", "diffusion", "budget", "training", "sampling", "evaluation", "compute"}
SCORES = ("fid", "kid", "precision", "recall", "flops")


@dataclass
class ArmContent:
    """What an arm's run carries.

    Attributes:
        params: what the arm was given, flat.
        points: a deterministic metric's value by (key, step): another value is another result.
        measures: timings and the like, which differ between equal runs.
        tags: provenance.
        images: the PNG grids.
    """

    params: dict[str, str]
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)

    @property
    def images_sha256(self) -> str:
        """A hash of all images with their names."""
        files = [(image.name, hashlib.sha256(image.read_bytes()).hexdigest()) for image in self.images]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    @property
    def has_results(self) -> bool:
        """Whether there is anything to publish."""
        return bool(self.points or self.measures or self.tags or self.images)

    @property
    def is_complete(self) -> bool:
        """Whether the arm has been evaluated."""
        return any(key == "fid" for key, _ in self.points)


def read_arm(params: Params, arm: str, seed: int, through: str = "evaluate", base: Path = Path()) -> ArmContent:
    """Gather what results/ holds of an arm; what isn't there is left out.

    Args:
        params: the whole params.
        arm: its key.
        seed: its seed.
        through: the last stage whose results to read: those of later ones may still be of an older run.
        base: the folder that results/ is in.

    Raises:
        ValueError: a file is not what its stage writes.
    """
    stages = ARM_STAGES[: ARM_STAGES.index(through) + 1]
    content = ArmContent(arm_params(params, arm, seed))
    for stage, folder in (("pretrain", paths.pretrain(arm, seed)), ("finetune", paths.finetune(arm, seed))):
        if stage in stages:
            content.points |= dict(_curve(stage, base / folder / "curve.csv"))
    if "sample" in stages:
        content.images = sorted((base / paths.samples(arm, seed)).glob("*.png"))
    if "evaluate" in stages:
        _add_metrics(content, _read_json(base / paths.metrics(arm, seed)))
    _add_records(content, {stage: _read_json(base / paths.record(stage, arm, seed)) for stage in stages})
    return content


def arm_params(params: Params, arm: str, seed: int) -> dict[str, str]:
    """An arm's effective params, flat: its own by their bare name, the sections' with a dot."""
    own, visible = params.arm(arm), params.visible_of(arm)
    nested = {
        "arm": arm,
        "seed": seed,
        "strategy": own.strategy,
        "mask_rate": own.mask_rate or 0.0,  # a number, so that charts can place `none`
        "realised_mask_rate": visible.realised_mask_rate(params.grid),
        "num_visible": visible.num_visible,
        "block_size": own.block_size,
        **params.model_dump(mode="json", include=SECTIONS),
        "pretrain": pretrain_params(params, arm),
        "finetune": params.finetune_of(arm).model_dump(mode="json"),
    }
    return {key: str(value) for key, value in _flat(nested) if value is not None}


def pretrain_params(params: Params, arm: str) -> dict[str, Any]:
    """What an arm's pretraining was given: nothing but a share of 0 where there is none."""
    own = params.pretrain_of(arm)
    return own.model_dump(mode="json") if own.share else {"share": own.share}


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _curve(stage: str, file: Path) -> Iterator[tuple[tuple[str, int], float]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            loss = _finite(row["loss"])
            if loss is not None:
                yield (f"{stage}/loss", int(row["step"])), loss


def _add_metrics(content: ArmContent, metrics: dict[str, Any]) -> None:
    """Scores at the milestones; steps are percents of the budget, so that arms share their abscissae."""
    for fraction, scores in metrics.get("milestones", {}).items():
        percent = round(100 * float(fraction))
        values = {(key, percent): _finite(scores.get(key)) for key in SCORES}
        content.points |= {at: value for at, value in values.items() if value is not None}
    fid_floor = _finite(metrics.get("fid_floor"))
    if fid_floor is not None:
        content.points["fid_floor", 0] = fid_floor
    content.params |= {key: str(metrics[key]) for key in ("num_samples", "extractor") if metrics.get(key)}
    if metrics.get("data_sha256"):
        content.tags["data_sha256"] = str(metrics["data_sha256"])


def _add_records(content: ArmContent, records: dict[str, dict[str, Any]]) -> None:
    measures = {f"{stage}_seconds": _finite(record.get("wall_seconds")) for stage, record in records.items()}
    measures |= {
        f"{stage}_images_per_second": _finite(record.get("images_per_second")) for stage, record in records.items()
    }
    measures["train_seconds"] = _train_seconds(records, content.params["strategy"])
    memory = [_finite(record.get("peak_memory_gib")) for record in records.values()]
    measures["peak_memory_gib"] = max((gib for gib in memory if gib is not None), default=None)
    content.measures = {key: value for key, value in measures.items() if value is not None}
    latest = next((record for record in reversed(records.values()) if record), {})
    if latest.get("git_commit"):
        content.tags["git_commit"] = str(latest["git_commit"])
    content.tags |= {f"version.{name}": str(version) for name, version in latest.get("versions", {}).items()}


def _train_seconds(records: dict[str, dict[str, Any]], strategy: str) -> float | None:
    """Seconds in steps of pretraining and finetuning together; nothing where one of them is unknown."""
    pretrain, finetune = (_finite(records.get(stage, {}).get("train_seconds")) for stage in ("pretrain", "finetune"))
    if finetune is None or (pretrain is None and strategy != "none"):
        return None
    return finetune + (pretrain or 0.0)


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _finite(value: Any) -> float | None:
    number = math.nan if value is None or value == "" else float(value)
    return number if math.isfinite(number) else None
