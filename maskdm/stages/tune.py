"""Stage `tune`: one trial of one arm: the whole arm with other values and a fraction of the budget, scored."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskdm.base.errors import NonFiniteLossError
from maskdm.base.machine import is_follower
from maskdm.base.publishing import replace_file
from maskdm.base.tensors import load_weights
from maskdm.config import Training
from maskdm.config.paths import ORIGIN_KEYS
from maskdm.data.inputs import open_training_data
from maskdm.method.backbones import build_model
from maskdm.models.drawing import draw_images
from maskdm.scoring.headline import SCORE_KEYS
from maskdm.scoring.scorer import Scorer
from maskdm.stages.finetune import pretrained_weights
from maskdm.stages.pretrain import account, starting_weights
from maskdm.stages.runner import Task
from maskdm.training import devices
from maskdm.training.ranks import Ranks, sharing
from maskdm.training.state import Pieces
from maskdm.training.trainer import Trainer


def run(task: Task, _: Path) -> dict[str, Any]:
    """Train, draw samples and score them; the content of the trial's file in results/tuning.

    A loss that is not finite is a result too: `failed` says so, and another trial will be chosen.

    Raises:
        UserError: data, features or weights do not fit, or memory does not suffice.
    """
    trial, tuning = task.run, task.job.params.tuning
    assert trial.trial is not None
    compute = devices.resolve(trial.params.compute, trial.params.compute.devices)
    scorer = Scorer(trial.params, compute)
    result: dict[str, Any] = {
        "arm": trial.arm,
        "trial": trial.trial,
        "values": tuning.trials[trial.trial],
        "seed": trial.seed,
        "budget_fraction": tuning.budget_fraction,
        "failed": None,
        **dict.fromkeys((*SCORE_KEYS, *ORIGIN_KEYS, "protocol")),
        **trial.finetune.spent_after(trial.finetune.num_steps).as_dict(),
        **scorer.origin,
    }
    title = f"{trial.arm} trial {trial.trial}"
    with sharing(task.job.words, trial.params.compute) as ranks:
        try:
            weights = _train(task, ranks)
        except NonFiniteLossError as error:
            if ranks.is_first:
                print(f"{title} has failed, {error.reason}: the arm is tuned over the others", file=sys.stderr)
            return {**result, "failed": error.reason}
        drawn = _draw(task, weights, f"sample {title}", ranks)
        if not ranks.is_first:
            return result
        scores = scorer.score(drawn, f"score {title}").as_dict()
    return {**result, **scores}


def _train(task: Task, ranks: Ranks) -> Path | None:
    """Pretrain and finetune; returns the file of the finetuned weights on rank 0, None on others."""
    trial = task.run
    images = open_training_data(trial.pretrain, verify=not is_follower())
    init = starting_weights(trial.pretrain, images.num_classes)
    pretrained = _train_stage(task, trial.pretrain, images, ranks, init)
    images = open_training_data(trial.finetune, verify=not is_follower())
    init = None if pretrained is None else pretrained_weights(trial, pretrained, images.num_classes)
    return _train_stage(task, trial.finetune, images, ranks, init)


def _train_stage(task: Task, training: Training, images: Any, ranks: Ranks, init: Any) -> Path | None:
    """Run one training stage of the trial; returns the file of its weights on rank 0, None on others."""
    trainer = Trainer(training, images, task.work / training.stage, ranks, init)
    prefix = f"{training.stage}/"
    trainer.run(partial(task.log_row, prefix=prefix))
    if not ranks.is_first:
        return None
    weights = trainer.folder / "weights.safetensors"
    with replace_file(weights) as building:
        trainer.save_weights(building)
    task.record[training.stage] = account(trainer)
    return weights


def _draw(task: Task, weights: Path | None, title: str, ranks: Ranks) -> np.ndarray:
    """Draw samples from the weights, which rank 0 sends to the others; rank 0 returns the samples."""
    trial, params = task.run, task.run.params
    compute = devices.resolve(params.compute, params.compute.devices)
    num_classes = open_training_data(trial.finetune).num_classes
    averaged = {} if weights is None else load_weights(weights, "ema", params.architecture(num_classes))[0]
    model = build_model(params, num_classes)
    model.load_state_dict(ranks.broadcast(averaged))
    model.eval().to(compute.device)
    kept = Pieces(task.work / "samples") if ranks.is_first else None
    count = params.sampling.num_samples
    return draw_images(params, model, num_classes, trial.seed, count, compute, title, kept, ranks)
