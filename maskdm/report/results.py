"""What the report reads: enumerated from params.yaml, never globbed, and checked for being of one piece."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm import paths
from maskdm.config import Params
from maskdm.errors import UserError

SCORES = ("fid", "kid", "kid_std", "precision", "recall")
MILESTONE_KEYS = ("step", "flops", "images_seen", *SCORES)
# Two runs' scores may be compared only where these agree.
COMPARABLE_KEYS = ("extractor", "extractor_sha256", "num_samples", "data_sha256")
FLOOR_KEYS = ("fid_floor", "kid_floor", "floor_num_samples")
MASK_KEYS = ("strategy", "mask_rate", "block_size")
METRICS_KEYS = (*MASK_KEYS, "realised_mask_rate", *COMPARABLE_KEYS, *FLOOR_KEYS, "milestones")
CURVE_COLUMNS = ("step", "loss", "lr", "images_seen", "tokens_seen", "flops")
MAX_SHOWN = 64  # images of a panel in samples.png, at most


@dataclass(frozen=True)
class Run:
    """What one arm with one seed left behind."""

    arm: str
    seed: int
    metrics: dict[str, Any]
    pretrain_record: dict[str, Any]
    finetune_record: dict[str, Any]
    pretrain_curve: pd.DataFrame
    finetune_curve: pd.DataFrame
    samples: np.ndarray  # (N, H, W, C) uint8, the first of the final milestone

    @property
    def file(self) -> Path:
        """Where the metrics come from."""
        return paths.metrics(self.arm, self.seed)


@dataclass(frozen=True)
class Results:
    """Everything the report shows."""

    manifest: dict[str, Any]
    prepare_record: dict[str, Any]
    features_record: dict[str, Any]
    real: np.ndarray  # (N, H, W, C) uint8, spread over the first shard
    runs: list[Run]

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of every stage read."""
        of_runs = [r for run in self.runs for r in (run.pretrain_record, run.finetune_record)]
        return [self.prepare_record, self.features_record, *of_runs]


def read_results(params: Params) -> Results:
    """Read the results of every arm and seed of params.yaml; those of removed arms are not looked at.

    Raises:
        UserError: a file is missing, unreadable, stale, or not comparable with the others.
    """
    manifest = _read_json(paths.DATA / "manifest.json", "maskdm prepare", ("count", "sha256", "shards"))
    prepare = _read_json(paths.record("prepare"), "maskdm prepare", ("wall_seconds",))
    features = _read_json(paths.record("features"), "maskdm features", ("wall_seconds",))
    runs = [_read_run(params, arm, seed) for arm in params.arms for seed in params.seeds]
    _check_comparable(runs, manifest)
    return Results(manifest, prepare, features, _read_real(manifest), runs)


def milestone_key(fraction: float) -> str:
    """How a milestone is named in files."""
    return f"{fraction:.3f}"


def _read_run(params: Params, arm: str, seed: int) -> Run:
    final = paths.samples(arm, seed) / f"milestone-{milestone_key(params.budget.milestones[-1])}.npy"
    return Run(
        arm,
        seed,
        metrics=_read_metrics(params, arm, seed),
        pretrain_record=_read_record("pretrain", arm, seed),
        finetune_record=_read_record("finetune", arm, seed),
        pretrain_curve=_read_curve(paths.pretrain(arm, seed), command("pretrain", arm, seed)),
        finetune_curve=_read_curve(paths.finetune(arm, seed), command("finetune", arm, seed)),
        samples=np.array(_open_images(final, command("sample", arm, seed))[:MAX_SHOWN]),
    )


def _read_record(stage: str, arm: str, seed: int) -> dict[str, Any]:
    return _read_json(paths.record(stage, arm, seed), command(stage, arm, seed), ("train_seconds",))


def _read_metrics(params: Params, arm: str, seed: int) -> dict[str, Any]:
    file, made_by = paths.metrics(arm, seed), command("evaluate", arm, seed)
    metrics = _read_json(file, made_by, METRICS_KEYS)
    for key in MASK_KEYS:
        asked = getattr(params.arm(arm), key)
        if metrics[key] != asked:
            raise UserError(
                f"{file} is stale: arm {arm} was made with {key} {metrics[key]}, params.yaml has {asked}; "
                f"run its stages again, from `{command('pretrain', arm, seed)}` to `{made_by}`"
            )
    for fraction in params.budget.milestones:
        milestone = (metrics["milestones"] or {}).get(milestone_key(fraction))
        if milestone is None:
            raise UserError(f"{file} lacks milestone {milestone_key(fraction)} of arm {arm}: run `{made_by}`")
        _require(milestone, MILESTONE_KEYS, file, made_by)
    return metrics


def _read_json(file: Path, made_by: str, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, made_by, error) from error
    _require(content, keys, file, made_by)
    return content


def _require(content: Any, keys: tuple[str, ...], file: Path, made_by: str) -> None:
    missing = [k for k in keys if k not in content] if isinstance(content, dict) else list(keys)
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: make it again with `{made_by}`")


def _read_curve(folder: Path, made_by: str) -> pd.DataFrame:
    file = folder / "curve.csv"
    try:
        curve = pd.read_csv(file, dtype="float64")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise _unreadable(file, made_by, error) from error
    _require(dict.fromkeys(curve.columns), CURVE_COLUMNS, file, made_by)
    return curve


def _read_real(manifest: dict[str, Any]) -> np.ndarray:
    shard = _open_images(paths.DATA / manifest["shards"][0]["file"], "maskdm prepare")
    # Spread over the shard: a folder tree is read class by class, and its first images would be one class.
    return np.array(shard[np.unique(np.linspace(0, len(shard) - 1, MAX_SHOWN).astype(int))])


def _open_images(file: Path, made_by: str) -> np.ndarray:
    try:
        images: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(file, made_by, error) from error
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or not len(images):
        raise UserError(
            f"{file}: expected uint8 images (N, H, W, 1 or 3), got {images.dtype} {images.shape}; run `{made_by}`"
        )
    return images


def _unreadable(file: Path, made_by: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{file} is missing: make it with `{made_by}`")
    return UserError(f"{file} cannot be read ({error}): make it again with `{made_by}`")


def command(stage: str, arm: str, seed: int) -> str:
    """The command that makes what a stage leaves behind for an arm and seed."""
    return f"maskdm {stage} --arm {arm} --seed {seed}"


def _check_comparable(runs: list[Run], manifest: dict[str, Any]) -> None:
    first = runs[0]
    for run in runs:
        made_by = command("evaluate", run.arm, run.seed)
        if run.metrics["data_sha256"] != manifest["sha256"]:
            raise UserError(f"{run.file} was scored against other data than {paths.DATA} holds: run `{made_by}`")
        for key in COMPARABLE_KEYS:
            ours, others = run.metrics[key], first.metrics[key]
            if ours != others:
                raise UserError(
                    f"{run.file} and {first.file} are not comparable: {key} is {ours} and {others}; "
                    f"run `{made_by}` or `{command('evaluate', first.arm, first.seed)}`"
                )
