"""Results that look like real ones without a run: what the figures and the page are tried on; and stamps for such."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from maskdm.base.checksums import CHECKSUM
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description
from maskdm.config import Params, parse_params
from maskdm.config.jobs import STAGE_VERSIONS, Jobs
from maskdm.config.paths import GIVEN
from maskdm.config.stamps import FILE, STAMP, Stamp, stamp_folder, stamped
from maskdm.report.comparison import Findings, compare_arms
from maskdm.report.results import Choice, Missing, Results, Run, Trial, milestone_key
from maskdm.report.tables import summary_frame
from tests.factories import protocol

SCRATCH: dict[str, Any] = {"strategy": "none"}
BUDGET_FLOPS = 7.5e11
ORIGIN = {"extractor": "classifier", "extractor_sha256": "e" * 64, "data_sha256": "d" * 64}
SCALE: dict[str, Any] = {
    "floor": {"fid": 0.087, "kid": 0.0002, "kid_std": 0.0, "precision": 0.9, "recall": 0.9, "num_samples": 898},
    "untrained": {"fid": 31.4, "kid": 1.9, "kid_std": 0.0, "precision": 0.0, "recall": 0.0, "num_samples": 898},
    "protocol": protocol().as_dict(),
}
# By mask rate, how an arm's final FID stands to scratch's.
GAINS = {0.25: 0.02, 0.4375: -0.02, 0.5: -0.02, 0.75: -0.045, 0.9: -0.055}


def masked(strategy: str, mask_rate: float, block_size: int | None = None, **more: Any) -> dict[str, Any]:
    """An arm of params.yaml."""
    block = {} if block_size is None else {"block_size": block_size}
    return {"strategy": strategy, "mask_rate": mask_rate, **block, **more}


def seven_arms() -> dict[str, dict[str, Any]]:
    """The default experiment's."""
    return {
        "scratch": SCRATCH,
        "patch-m50": masked("patch", 0.5),
        "patch-m75": masked("patch", 0.75),
        "block2-m50": masked("block", 0.5, 2),
        "block2-m75": masked("block", 0.75, 2),
        "crop-m44": masked("crop", 0.4375),
        "crop-m75": masked("crop", 0.75),
    }


def thirteen_arms() -> dict[str, dict[str, Any]]:
    """Those of experiments/digits."""
    arms: dict[str, dict[str, Any]] = {"scratch": SCRATCH}
    for family, size in (("patch", None), ("block", 2), ("crop", None)):
        for rate in (0.25, 0.4375 if family == "crop" else 0.5, 0.75, 0.9):
            arms[f"{family}{size or ''}-m{rate * 100:.0f}"] = masked(family, rate, size)
    return arms


def make_params(
    arms: dict[str, dict[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    milestones: Sequence[float] = (0.4, 0.6, 0.8, 1.0),
    trials: dict[str, dict[str, Any]] | None = None,
    **dataset: Any,
) -> Params:
    """An experiment on 16×16 digits in 4×4-pixel patches."""
    return parse_params(
        {
            "name": "made-up",
            "seeds": list(seeds),
            "dataset": {"source": "digits", "image_size": 16, "channels": 1, **dataset},
            "datasets": {},
            "model": {"patch_size": 4, "dim": 64, "depth": 3, "num_heads": 4},
            "diffusion": {"schedule": "cosine", "prediction": "x_0"},
            "budget": {"match": "flops", "unmasked_steps": 1000, "milestones": list(milestones)},
            "training": {},
            "pretrain": {"share": 0.3, "lr": 4e-3, "batch_size": 128},
            "finetune": {"lr": 4e-3, "batch_size": 64},
            "sampling": {"num_samples": 898},
            "evaluation": {},
            "compute": {"device": "cpu", "precision": "fp32"},
            "tuning": {"seed": 1000, "budget_fraction": 0.3, "trials": trials or {}},
            "arms": seven_arms() if arms is None else arms,
        }
    )


def make_results(
    params: Params,
    missing: Collection[str | tuple[str, int]] = (),
    fids: dict[str, Sequence[float]] | None = None,
    failed_trials: Collection[str] = (),
    spread: float = 0.035,
) -> Results:
    """Results of every arm and seed but the missing ones.

    Args:
        params: the experiment.
        missing: arms, or pairs of arm and seed.
        fids: final FIDs by arm, one per seed; the others are made up.
        failed_trials: names of trials that diverged, with every arm.
        spread: standard deviation over seeds of made-up FIDs, relative to scratch's.
    """
    rng = np.random.default_rng(7)
    wanted = [(arm, seed) for arm in params.arms for seed in params.seeds]
    there = [(a, s) for a, s in wanted if a not in missing and (a, s) not in missing]
    given = {(arm, seed): f for arm, of in (fids or {}).items() for seed, f in zip(params.seeds, of, strict=True)}
    lucks = {seed: rng.normal(0, 0.05) for seed in params.seeds}
    runs = []
    for arm, seed in wanted:  # of the missing ones, too: the others must not depend on them
        made_up = _made_up_fid(params, arm) * (1 + lucks[seed] + rng.normal(0, spread))
        run = _run(params, arm, seed, given.get((arm, seed), made_up), rng)
        runs += [run] if (arm, seed) in there else []
    return Results(
        manifest={
            "count": 1797,
            "sha256": "d" * 64,
            "source": {"kind": "digits"},
            "protocol": {"note": "as <shipped>"},
        },
        prepare_record={"wall_seconds": 1.0},
        features_record={"wall_seconds": 1.0, "classifier_accuracy": 0.98, **ORIGIN},
        real=_images(params, 64, rng),
        scale=SCALE,
        runs=runs,
        choices=_choices(params, failed_trials, rng),
        missing=[Missing(a, s, "no such file", "maskdm evaluate") for a, s in wanted if (a, s) not in there],
    )


def stamp_outputs(params: Params, *stages: str) -> None:
    """Stamp the outputs in the working directory as if these stages, or all but the report, had made them now."""
    for job in Jobs(params).all():
        if job.stage not in (stages or set(STAGE_VERSIONS) - {"report"}) or not job.output.exists():
            continue
        with suppress(UserError):  # no arm has values without a choice
            _stamp(job.output, job.wanted())


def _stamp(output: Path, stamp: Stamp) -> None:
    if output.is_dir():
        (output / FILE).unlink(missing_ok=True)
        stamp_folder(output, stamp)
    else:
        content = json.loads(output.read_bytes())
        plain = {key: value for key, value in content.items() if key not in (STAMP, CHECKSUM)}
        publish_description(output, stamped(plain, stamp))


def findings(params: Params, results: Results) -> Findings:
    """What the report finds in results."""
    return compare_arms(params, results, summary_frame(params, results))


def _made_up_fid(params: Params, arm: str) -> float:
    rate = params.arm(arm).mask_rate
    return 0.454 + (0.0 if rate is None else GAINS.get(rate, -0.03))


def _run(params: Params, arm: str, seed: int, fid: float, rng: np.random.Generator) -> Run:
    share = params.pretrain_of(arm).share
    pretrain, finetune = _curve(0.0, share, 40, rng), _curve(share, 1.0, 100, rng)
    config = params.arm(arm)
    return Run(
        arm,
        seed,
        metrics={
            **{key: getattr(config, key) for key in ("strategy", "mask_rate", "block_size")},
            "realised_mask_rate": params.mask_of(arm).realised_mask_rate,
            "flip": 0.0,
            **ORIGIN,
            "milestones": {
                milestone_key(f): _milestone(f, fid, share, finetune, rng) for f in params.budget.milestones
            },
        },
        pretrain_record={"wall_seconds": 7.0},
        finetune_record={"wall_seconds": 14.0},
        pretrain_curve=pretrain,
        finetune_curve=finetune,
        samples=_images(params, 64, rng),
        wall_seconds={"pretrain": 2 + 22 * share, "finetune": 20 * (1 - share) + seed, "sample": 6.0, "evaluate": 4.5},
    )


def _milestone(fraction: float, fid: float, share: float, curve: pd.DataFrame, rng: np.random.Generator) -> dict:
    """Scores that fall towards the final ones; those of masked arms later."""
    late = 1 + (0.9 + 3 * share) * (1 / fraction - 1) ** 1.2
    row = curve.iloc[(curve["flops"] - fraction * BUDGET_FLOPS).abs().argmin()]
    return {
        "step": int(row["step"]),
        "flops": float(row["flops"]),
        "images_seen": int(row["images_seen"]),
        "tokens_seen": int(row["tokens_seen"]),
        "fid": fid * late * (1 + (0 if fraction == 1 else rng.normal(0, 0.03))),
        "kid": fid * late / 30,
        "kid_std": 0.0007,
        "precision": 0.52,
        "recall": 0.8,
        "num_samples": 898,
    }


def _curve(start: float, end: float, rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """A loss that falls with compute, in a stage that spends the budget from `start` to `end`."""
    count = rows if end > start else 0
    done = np.linspace(start, end, count + 1)[1:]
    step = 10.0 * np.arange(1, count + 1)
    loss = 0.06 + 0.4 * np.exp(-25 * (done - start)) * (1 + 0.05 * rng.standard_normal(count))
    return pd.DataFrame(
        {
            "step": step,
            "loss": loss + 0.003 * rng.standard_normal(count),
            "lr": 0.004,
            "images_seen": step * 64,
            "tokens_seen": step * 1024,
            "flops": done * BUDGET_FLOPS,
            "device_seconds": done * 20,
            "data_wait_seconds": done * 0.2,
            "peak_memory_gib": 0.4,
        }
    )


def _images(params: Params, count: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures with something to see: a bright blob on a dark, noisy ground. (N, H, W, C) uint8."""
    size, channels = params.dataset.image_size, params.dataset.channels
    y, x = np.mgrid[:size, :size] / size
    center = rng.uniform(0.3, 0.7, (count, 2, 1, 1))
    blob = np.exp(-((y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2) / 0.05)
    tint = rng.uniform(0.5, 1.0, (count, 1, 1, channels))
    return np.uint8(np.clip(blob[..., None] * tint + rng.normal(0.08, 0.04, (count, size, size, channels)), 0, 1) * 255)


def _choices(params: Params, failed: Collection[str], rng: np.random.Generator) -> dict[str, Choice]:
    if not params.tuning.enabled:
        return {arm: Choice(arm, GIVEN, {}, []) for arm in params.arms}
    return {arm: _choice(params, arm, failed, rng) for arm in params.arms}


def _choice(params: Params, arm: str, failed: Collection[str], rng: np.random.Generator) -> Choice:
    tried = []
    for name, values in params.tuning.trials.items():
        kid = None if name in failed else float(rng.lognormal(-3.2, 0.4))
        reason = "loss not finite at step 40" if name in failed else None
        scores = {"kid": kid, "fid": None if kid is None else 30 * kid}
        tried.append(Trial(arm, name, values, reason, scores, 11.0))
    best = min((t for t in tried if t.failed is None), key=lambda trial: trial.scores["kid"] or 0.0)
    return Choice(arm, best.name, best.values, tried)
