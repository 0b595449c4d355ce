"""Stage `pretrain`: masked denoising score matching; the network sees only the visible patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from maskdm.base.machine import is_follower
from maskdm.config import Training, paths
from maskdm.data.inputs import open_training_data
from maskdm.stages.runner import Task
from maskdm.training.ranks import sharing
from maskdm.training.trainer import Trainer


def run(task: Task, folder: Path) -> None:
    """Pretrain an arm; an arm without masks, such as `scratch`, writes its initial weights.

    Raises:
        UserError: the images or the initial weights do not fit, memory does not suffice, or the loss is not finite.
    """
    training = task.run.pretrain
    images = open_training_data(training, verify=not is_follower())
    init = starting_weights(training, images.num_classes)
    with sharing(task.job.words, task.params.compute, is_shared=training.num_steps > 0) as ranks:
        trainer = Trainer(training, images, task.work, ranks, init)
        trainer.run(task.log_row)
        if ranks.is_first:
            trainer.save_weights(folder / paths.CHECKPOINT)
            trainer.save_curve(folder / paths.CURVE)
            task.record.update(account(trainer))


def starting_weights(training: Training, num_classes: int) -> dict[str, Tensor] | None:
    """The weights of `pretrain.checkpoint`, by parameter name; None if they are to be drawn from the seed.

    Raises:
        UserError: the file is missing or its weights do not fit.
    """
    checkpoint = training.params.pretrain_of(training.arm).checkpoint
    if checkpoint is None:
        return None
    from maskdm.models.exported import weights_for

    return weights_for(Path(checkpoint), training.params, num_classes)


def account(trainer: Trainer) -> dict[str, Any]:
    """What was trained, how, and what it took, for the record.

    Args:
        trainer: after its run.
    """
    training, facts, how = trainer.training, trainer.facts(), trainer.how_it_ran()
    if "compile_seconds" in how:
        print(f"{training.title}: compiled in {how['compile_seconds']:.1f} s, before the first step", flush=True)
    return {**facts, "timings": trainer.state.timings, **how}
