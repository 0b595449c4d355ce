"""Stage `pretrain`: masked denoising score matching on the visible patches alone."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maskdm.config import Training, paths
from maskdm.data.inputs import open_training_data
from maskdm.models.exported import weights_for
from maskdm.stages.joint import sharing
from maskdm.stages.runner import Task, is_follower
from maskdm.stages.training import Trainer, write_curve


def run(task: Task, folder: Path) -> None:
    """Pretrain an arm; `scratch` writes its initialisation.

    Raises:
        UserError: the images or the weights to start from do not fit, or the loss is not finite.
    """
    training = task.run.pretrain
    images = open_training_data(training, verify=not is_follower())
    init = starting_weights(training, images.num_classes)
    with sharing(task.job, is_shared=training.num_steps > 0) as ranks:
        trainer = Trainer(training, images, task.work, ranks, init)
        state = trainer.run(task.tracked, task.record)
        if ranks.is_first:
            trainer.save_weights(folder / paths.CHECKPOINT)
            write_curve(folder / paths.CURVE, state)


def starting_weights(training: Training, num_classes: int) -> dict[str, Tensor] | None:
    """The weights of `pretrain.checkpoint`; None where there are none, and the seed draws them.

    Raises:
        UserError: they are missing or do not fit.
    """
    checkpoint = training.params.pretrain_of(training.arm).checkpoint
    return None if checkpoint is None else weights_for(Path(checkpoint), training.params, num_classes)[0]
