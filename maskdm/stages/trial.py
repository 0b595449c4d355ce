"""What a trial of tuning does: the whole arm with other values, at a fraction of the budget, scored."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskdm import device
from maskdm.compute import plan_arm
from maskdm.config import Params
from maskdm.data.arrays import ImageArrays
from maskdm.drawing import draw_images, load_model
from maskdm.stages import finetune, pretrain
from maskdm.stages.inputs import open_data
from maskdm.stages.scoring import Scorer
from maskdm.stages.training import Spent, Trainer, TrainingJob
from maskdm.tracking import StageRun
from maskdm.training import NonFiniteLossError


def run_trial(
    params: Params, arm: str, trial: str, output: Path, tracked: StageRun, record: dict[str, Any]
) -> dict[str, Any]:
    """Train, draw and score; what came out.

    A loss that becomes non-finite is a result too: the trial has `failed`, and says why.

    Args:
        params: of the trial (`Params.for_trial`).
        arm: its key.
        trial: its name.
        output: names the work folder, where a killed trial goes on.
        tracked: gets curves and scores.
        record: gets the accounts of both training stages.

    Raises:
        UserError: data or features are missing or do not fit.
    """
    compute, images, plan = device.resolve(params.compute), open_data(params), plan_arm(params, arm)
    scorer = Scorer(params, compute, images.sha256)
    spent = Spent().after(plan.pretrain.num_steps, plan.pretrain).after(plan.finetune.num_steps, plan.finetune)
    result: dict[str, Any] = {**spent.as_dict(), **scorer.origin}
    try:
        weights = _train(params, arm, trial, images, output, tracked, record)
    except NonFiniteLossError as error:
        print(f"{arm} trial {trial} has failed, {error.reason}: the arm is tuned over the others", file=sys.stderr)
        return {**result, "failed": error.reason}
    model = load_model(params, weights, images.num_classes, compute)
    count, title = params.sampling.num_samples, f"{arm} trial {trial}"
    drawn = draw_images(params, model, images.num_classes, params.seeds[0], count, compute, f"sample {title}")
    scores = scorer.score(drawn, f"score {title}").as_dict()
    tracked.log(100, **scores)
    return {**result, **scores}


def _train(
    params: Params,
    arm: str,
    trial: str,
    images: ImageArrays,
    output: Path,
    tracked: StageRun,
    record: dict[str, Any],
) -> Path:
    """Pretrain and finetune; the file of the finetuned weights."""
    seed = params.seeds[0]
    job = pretrain.pretraining_job(params, arm, seed, output / "pretrain")
    pretrained = _run(replace(job, trial=trial), images, tracked, record)
    job = finetune.finetuning_job(params, arm, seed, images.num_classes, pretrained, output / "finetune")
    return _run(replace(job, trial=trial), images, tracked, record)


def _run(job: TrainingJob, images: ImageArrays, tracked: StageRun, record: dict[str, Any]) -> Path:
    """Run one training stage of the trial; the file of its weights."""
    trainer, own = Trainer(job, images), dict[str, Any]()
    state = trainer.run(tracked, own, keep=lambda _: None, prefix=f"{job.stage}/")
    trainer.save_state(state)
    weights = trainer.store.folder / "weights.safetensors"
    trainer.save_weights(weights, state)
    record[job.stage] = own
    return weights
