"""Stage `finetune`: unmasked denoising score matching, starting from the pretrained checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maskdm.base import rng
from maskdm.base.machine import is_follower
from maskdm.base.publishing import link_or_copy, publish_description
from maskdm.base.tensors import load_weights
from maskdm.config import Run, paths
from maskdm.data.inputs import open_training_data
from maskdm.method.backbones import build_model
from maskdm.method.transfer import adapted_weights
from maskdm.stages.pretrain import account
from maskdm.stages.runner import Task
from maskdm.training.ranks import sharing
from maskdm.training.trainer import Trainer


def run(task: Task, folder: Path) -> None:
    """Finetune an arm and keep the weights of every milestone.

    Raises:
        UserError: the checkpoint does not fit, memory does not suffice, or the loss is not finite.
    """
    arm = task.run
    images = open_training_data(arm.finetune, verify=not is_follower())
    init = pretrained_weights(arm, paths.pretrain(arm.arm, arm.seed) / paths.CHECKPOINT, images.num_classes)
    with sharing(task.job.words, task.params.compute) as ranks:
        trainer = Trainer(arm.finetune, images, task.work, ranks, init)
        trainer.run(task.log_row)
        if ranks.is_first:
            for fraction, step in arm.milestones:
                link_or_copy(trainer.milestone(step), folder / paths.milestone_file(fraction))
            publish_description(folder / paths.MILESTONES, _describe(arm))
            trainer.save_curve(folder / paths.CURVE)
            task.record.update(account(trainer))


def pretrained_weights(run: Run, checkpoint: Path, num_classes: int) -> dict[str, Tensor]:
    """The weights to start from, by parameter name; if pretraining used another dataset, they are adapted.

    Args:
        run: the arm and seed.
        checkpoint: written by its pretraining.
        num_classes: of the dataset of finetuning.

    Raises:
        UserError: the checkpoint is damaged or does not fit.
    """
    params, pretraining = run.params, run.pretrain.params
    which, other = params.finetune_of(run.arm).init_from, params.pretrain_of(run.arm).dataset
    if other is None:
        return load_weights(checkpoint, which, params.architecture(num_classes))[0]
    architecture = pretraining.architecture(open_training_data(run.pretrain).num_classes)
    state, _ = load_weights(checkpoint, which, architecture)
    fresh = build_model(params, num_classes)
    fresh.initialise(rng.generator(run.seed, "init"))
    adapted, changes = adapted_weights(state, fresh.state_dict(), pretraining.grid, params.grid)
    if not is_follower():
        print(f"{run.finetune.title}: {', '.join([f'pretrained on {other}', *changes])}", flush=True)
    return adapted


def _describe(run: Run) -> dict[str, dict[str, int]]:
    """For each milestone, by its fraction of the budget: its step, and the compute spent, pretraining included."""
    return {
        f"{fraction:.3f}": {"step": step, **run.finetune.spent_after(step).as_dict()}
        for fraction, step in run.milestones
    }
