"""Stage `pretrain`: masked denoising score matching on the visible patches alone."""

from __future__ import annotations

from maskdm import paths
from maskdm.compute import plan_arm
from maskdm.config import Params
from maskdm.masking import Masking
from maskdm.publishing import publish_folder
from maskdm.stages.inputs import open_data, with_chosen_values
from maskdm.stages.session import stage_session
from maskdm.stages.training import Trainer, TrainingJob, write_curve

CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.csv"


def run(params: Params, arm: str, seed: int) -> None:
    """Pretrain an arm into results/pretrain/ARM/seed-SEED; `scratch` publishes its initialisation.

    Raises:
        UserError: the dataset or the arm's values are missing, or the loss is not finite.
    """
    params = with_chosen_values(params, arm)
    images, job, output = open_data(params, verify=True), pretraining_job(params, arm, seed), paths.pretrain(arm, seed)
    with stage_session(params, "pretrain", arm, seed, inputs=job.inputs(images.sha256), output=output) as session:
        if session.is_to_do:
            trainer = Trainer(job, images, session.folder)
            state = trainer.run(session.tracked, session.record)
            with publish_folder(output) as folder:
                trainer.save_weights(folder / CHECKPOINT, state)
                write_curve(folder / CURVE, state)


def pretraining_job(params: Params, arm: str, seed: int) -> TrainingJob:
    """What pretraining an arm is.

    Args:
        params: the experiment, the arm's chosen values applied.
        arm: its key.
        seed: of the run.
    """
    config = params.arm(arm)
    return TrainingJob(
        params=params,
        stage="pretrain",
        arm=arm,
        seed=seed,
        config=params.pretrain_of(arm),
        plan=plan_arm(params, arm).pretrain,
        masking=Masking(config.strategy, params.grid, config.mask_rate or 0.0, config.block_size),
    )
