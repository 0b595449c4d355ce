"""Stage `pretrain`: masked denoising score matching on the visible patches alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.company import is_follower
from maskdm.compute import plan_arm
from maskdm.config import Params, fingerprint
from maskdm.exported import weights_for
from maskdm.masking import Masking
from maskdm.publishing import publish_description, publish_folder
from maskdm.stages.inputs import open_pretraining_data, with_chosen_values
from maskdm.stages.joint import joint_session
from maskdm.stages.training import Trainer, TrainingJob, write_curve

CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.csv"
RUN = "run.json"


def run(params: Params, arm: str, seed: int) -> None:
    """Pretrain an arm into results/pretrain/ARM/seed-SEED; `scratch` publishes its initialisation.

    Raises:
        UserError: the dataset or the arm's values are missing, or the loss is not finite.
    """
    params = with_chosen_values(params, arm)
    images, output = open_pretraining_data(params, arm, verify=not is_follower()), paths.pretrain(arm, seed)
    job = pretraining_job(params, arm, seed, images.num_classes)
    inputs = {**job.inputs(images.sha256), "pretrain_dataset": _dataset(params, arm)}
    is_shared = job.plan.num_steps > 0
    with joint_session(params, "pretrain", arm, seed, inputs=inputs, output=output, is_shared=is_shared) as (
        session,
        ranks,
    ):
        if session.is_to_do:
            trainer = Trainer(job, images, session.folder, ranks)
            state = trainer.run(session.tracked, session.record)
            if ranks.is_first:
                with publish_folder(output) as folder:
                    trainer.save_weights(folder / CHECKPOINT)
                    write_curve(folder / CURVE, state)
                    origin = {"data_sha256": images.sha256, "init_sha256": job.init_sha256 or None}
                    publish_description(folder / RUN, {"trained_with": trained_with(params, arm), **origin})


def trained_with(params: Params, arm: str) -> str:
    """A fingerprint of all params that an arm's pretrained weights depend on; those of finetuning are none.

    Args:
        params: the experiment, the arm's chosen values applied.
        arm: its key.
    """
    config = params.arm(arm)
    mask = config.model_dump(include={"strategy", "mask_rate", "block_size"})
    # without what is not given, as in `Params.trained_with`
    pretrain = {} if config.strategy == "none" else params.pretrain_of(arm).model_dump(mode="json", exclude_none=True)
    training = params.training.model_dump(mode="json", exclude={"devices", "log_every"})
    steps = plan_arm(params, arm).pretrain.num_steps
    return fingerprint(params.model, params.diffusion, training, mask, pretrain, _dataset(params, arm), steps)


def _dataset(params: Params, arm: str) -> dict[str, Any] | None:
    """The dataset of its own that an arm is pretrained on."""
    if params.pretrain_of(arm).dataset is None:
        return None
    return params.pretrain_dataset_of(arm).model_dump(mode="json")


def pretraining_job(params: Params, arm: str, seed: int, num_classes: int = 0) -> TrainingJob:
    """What pretraining an arm is.

    Args:
        params: the experiment, the arm's chosen values applied.
        arm: its key.
        seed: of the run.
        num_classes: of what it is pretrained on.

    Raises:
        UserError: the weights to start from are missing or do not fit.
    """
    config, there = params.arm(arm), params.for_pretraining(arm)
    checkpoint = params.pretrain_of(arm).checkpoint
    init, init_sha256 = (None, "") if checkpoint is None else weights_for(Path(checkpoint), there, num_classes)
    return TrainingJob(
        params=there,
        stage="pretrain",
        arm=arm,
        seed=seed,
        config=params.pretrain_of(arm),
        plan=plan_arm(params, arm).pretrain,
        masking=Masking(config.strategy, there.grid, config.mask_rate or 0.0, config.block_size),
        init=init,
        init_sha256=init_sha256,
    )
