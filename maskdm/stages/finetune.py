"""Stage `finetune`: ordinary denoising score matching, from the pretrained checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maskdm import paths, rng
from maskdm.architecture import architecture_of
from maskdm.checkpoint import load_weights
from maskdm.checksums import file_sha256
from maskdm.company import is_follower
from maskdm.compute import ArmPlan, build_model, plan_arm
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.masking import Masking
from maskdm.publishing import link_or_copy, publish_description, publish_folder
from maskdm.stages import pretrain
from maskdm.stages.inputs import open_data, open_pretraining_data, read_json, require, with_chosen_values
from maskdm.stages.joint import joint_session
from maskdm.stages.training import Spent, Trainer, TrainingJob, write_curve
from maskdm.tracking import publish_arm
from maskdm.training import TrainState
from maskdm.transfer import carried_over

MILESTONES = "milestones.json"
CURVE = "curve.csv"
RUN = "run.json"


def run(params: Params, arm: str, seed: int) -> None:
    """Finetune an arm into results/finetune/ARM/seed-SEED, keeping the weights of every milestone.

    Raises:
        UserError: the dataset or the checkpoint is missing or does not fit, or was made with other values than
            params.yaml has now, or the loss is not finite.
    """
    params = with_chosen_values(params, arm)
    images, output = open_data(params, verify=not is_follower()), paths.finetune(arm, seed)
    pretrained = require(paths.pretrain(arm, seed), "pretrain", arm, seed)
    job = finetuning_job(params, arm, seed, images.num_classes, pretrained / pretrain.CHECKPOINT)
    _check_pretrained_with(params, arm, seed, pretrained)
    inputs = {**job.inputs(images.sha256), RUN: params.trained_with(arm)}
    with joint_session(params, "finetune", arm, seed, inputs=inputs, output=output) as (session, ranks):
        if session.is_to_do:
            trainer = Trainer(job, images, session.folder, ranks)
            state = trainer.run(session.tracked, session.record)
            if ranks.is_first:
                _publish(params, trainer, state, output)
    publish_arm(params, arm, seed, through="finetune")


def _check_pretrained_with(params: Params, arm: str, seed: int, pretrained: Path) -> None:
    """The engines pretrain again where values or images change; who calls the stages by hand must not forget it."""
    there = open_pretraining_data(params, arm)
    expected = {"trained_with": pretrain.trained_with(params, arm), "data_sha256": there.sha256}
    found = read_json(pretrained / pretrain.RUN, "pretrain")
    if any(found.get(key) != value for key, value in expected.items()):
        raise UserError(
            f"{pretrained} was pretrained with other values than params.yaml has now (of model, diffusion, budget, "
            "training or pretrain, or the arm's mask), or on other images; run first: maskdm pretrain "
            f"--arm {arm} --seed {seed}"
        )


def _publish(params: Params, trainer: Trainer, state: TrainState, output: Path) -> None:
    job, plan = trainer.job, plan_arm(params, trainer.job.arm)
    with publish_folder(output) as folder:
        for fraction, step in plan.milestones:
            link_or_copy(trainer.milestone(step), folder / milestone_file(fraction))
        publish_description(folder / MILESTONES, _describe(job, plan))
        write_curve(folder / CURVE, state)
        publish_description(folder / RUN, {"trained_with": params.trained_with(job.arm)})


def milestone_file(fraction: float) -> str:
    """The weights at a fraction of the budget."""
    return f"{milestone_name(fraction)}.safetensors"


def milestone_name(fraction: float) -> str:
    """`milestone-0.500`: files of a milestone start with it."""
    return f"milestone-{fraction:.3f}"


def finetuning_job(params: Params, arm: str, seed: int, num_classes: int, checkpoint: Path | None) -> TrainingJob:
    """What finetuning an arm is.

    Args:
        params: the experiment, the arm's chosen values applied.
        arm: its key.
        seed: of the run.
        num_classes: of the dataset.
        checkpoint: the pretrained weights; None where the first rank gives them to this one.

    Raises:
        UserError: the checkpoint is damaged or does not fit.
    """
    config, plan = params.finetune_of(arm), plan_arm(params, arm)
    init, sha256 = None, ""
    if checkpoint is not None:
        init, sha256 = _pretrained(params, arm, seed, num_classes, checkpoint), file_sha256(checkpoint)
    return TrainingJob(
        params=params,
        stage="finetune",
        arm=arm,
        seed=seed,
        config=config,
        plan=plan.finetune,
        masking=Masking("none", params.grid),
        milestones=tuple(step for _, step in plan.milestones),
        spent=Spent().after(plan.pretrain.num_steps, plan.pretrain),
        init=init,
        init_sha256=sha256,
    )


def _pretrained(params: Params, arm: str, seed: int, num_classes: int, checkpoint: Path) -> dict[str, Tensor]:
    """The weights to start from; those of another dataset are made to fit this one."""
    which, other = params.finetune_of(arm).init_from, params.pretrain_of(arm).dataset
    if other is None:
        return load_weights(checkpoint, which, architecture_of(params, num_classes))[0]
    there = params.for_pretraining(arm)
    architecture = architecture_of(there, open_pretraining_data(params, arm).num_classes)
    state, _ = load_weights(checkpoint, which, architecture)
    fresh = build_model(params, num_classes)
    fresh.initialise(rng.generator(seed, "init"))
    carried, changes = carried_over(state, fresh.state_dict(), there.grid, params.grid)
    if not is_follower():
        print(f"finetune {arm} seed {seed}: {', '.join([f'pretrained on {other}', *changes])}", flush=True)
    return carried


def _describe(job: TrainingJob, plan: ArmPlan) -> dict[str, dict[str, int]]:
    """Fraction of the budget → step and compute spent by then, pretraining included."""
    return {
        f"{fraction:.3f}": {"step": step, **job.spent.after(step, job.plan).as_dict()}
        for fraction, step in plan.milestones
    }
