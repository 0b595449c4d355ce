"""Stage `pretrain`: masked denoising score matching on the visible patches alone."""

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
    """Pretrain an arm; `scratch` writes its initialisation.

    Raises:
        UserError: the images or the weights to start from do not fit, or the loss is not finite.
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
    """The weights of `pretrain.checkpoint`; None where there are none, and the seed draws them.

    Raises:
        UserError: they are missing or do not fit.
    """
    checkpoint = training.params.pretrain_of(training.arm).checkpoint
    if checkpoint is None:
        return None
    from maskdm.models.exported import weights_for

    return weights_for(Path(checkpoint), training.params, num_classes)


def account(trainer: Trainer) -> dict[str, Any]:
    """What a training was and took, for the record.

    Args:
        trainer: after its run.
    """
    training, facts, how = trainer.training, trainer.facts(), trainer.how_it_ran()
    if "compile_seconds" in how:
        print(f"{training.title}: compiled in {how['compile_seconds']:.1f} s, before the first step", flush=True)
    return {**facts, "timings": trainer.state.timings, **how}
