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
            task.record.update(account(task, trainer))


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


def account(task: Task, trainer: Trainer, prefix: str = "") -> dict[str, Any]:
    """What was trained, how, and what it took, for the record; facts that are not in the curve are tracked too.

    Args:
        task: of the stage.
        trainer: after its run.
        prefix: of the names of tracked metrics.
    """
    training, facts, how = trainer.training, trainer.facts(), trainer.how_it_ran()
    if "compile_seconds" in how:
        print(f"{training.title}: compiled in {how['compile_seconds']:.1f} s, before the first step", flush=True)
    in_curve = {*training.before.as_dict(), "device_seconds", "data_wait_seconds"}
    once = {prefix + name: fact for name, fact in facts.items() if fact is not None and name not in in_curve}
    task.tracked.tags(**trainer.compute.describe())
    task.tracked.log(training.num_steps, **once)
    return {**facts, "timings": trainer.state.timings, **how}
