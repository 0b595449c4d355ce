"""What the stages `pretrain` and `finetune` share: build, resume, train, account."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from maskdm import device, paths, rng
from maskdm.checkpoint import architecture_of, save_weights
from maskdm.compute import StagePlan, build_model
from maskdm.config import Params, StageConfig, fingerprint
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches
from maskdm.diffusion import Diffusion
from maskdm.errors import UserError
from maskdm.formats import CURVE_COLUMNS
from maskdm.masking import Masking
from maskdm.optimization import Ema, make_optimizer
from maskdm.progress import Progress
from maskdm.resume import StateStore
from maskdm.stages.versions import STAGE_VERSIONS
from maskdm.tracking import StageRun
from maskdm.training import NonFiniteLossError, TrainRun, TrainState, restore_state, state_tensors, train


@dataclass(frozen=True)
class Spent:
    """Compute spent so far.

    Attributes:
        images_seen: images that went through the network.
        tokens_seen: patches of them that did.
        flops: forward and backward.
    """

    images_seen: int = 0
    tokens_seen: int = 0
    flops: int = 0

    def after(self, num_steps: int, plan: StagePlan) -> Spent:
        """What is spent after so many more steps."""
        images = num_steps * plan.batch_size
        return Spent(
            self.images_seen + images,
            self.tokens_seen + images * plan.num_visible,
            self.flops + num_steps * plan.flops_per_step,
        )

    def as_dict(self) -> dict[str, int]:
        """Plain values."""
        return {"images_seen": self.images_seen, "tokens_seen": self.tokens_seen, "flops": self.flops}


@dataclass(frozen=True)
class TrainingJob:
    """One training stage of one arm and seed.

    Attributes:
        params: the experiment.
        stage: which.
        arm: its key.
        seed: of the run.
        config: optimisation of this stage.
        plan: steps and cost.
        masking: how M is drawn.
        output: the folder that the stage publishes; names its work folder.
        milestones: steps whose weights are kept.
        spent: before this stage.
        init: weights to start from; None draws them from the seed.
        init_sha256: of the file that `init` comes from.
        trial: of tuning, if it is one; for messages.
    """

    params: Params
    stage: Literal["pretrain", "finetune"]
    arm: str
    seed: int
    config: StageConfig
    plan: StagePlan
    masking: Masking
    output: Path
    milestones: tuple[int, ...] = ()
    spent: Spent = Spent()
    init: dict[str, Tensor] | None = None
    init_sha256: str = ""
    trial: str | None = None

    @property
    def title(self) -> str:
        """For messages and progress."""
        run = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"
        return f"{self.stage} {self.arm} {run}"

    def fingerprint(self, data_sha256: str) -> str:
        """Of everything that the job's result depends on."""
        p = self.params
        sections = (p.model, p.diffusion, p.training, p.compute)
        own = (
            self.stage,
            STAGE_VERSIONS[self.stage],
            self.seed,
            self.config,
            self.plan.num_steps,
            self.milestones,
        )
        mask = (self.masking.strategy, self.masking.mask_rate, self.masking.block_size)
        return fingerprint(*sections, *own, mask, self.init_sha256, data_sha256)


class Trainer:
    """Runs a `TrainingJob`: everything is built here, then `run` trains.

    Args:
        job: what to do.
        images: the dataset.

    Raises:
        UserError: a class-conditional model and no labels; CUDA asked for and not there.
    """

    def __init__(self, job: TrainingJob, images: ImageArrays) -> None:
        params = job.params
        if params.model.class_conditional and images.labels is None:
            raise UserError("model.class_conditional needs a dataset with labels (class folders); this one has none")
        self.job = job
        self.compute = device.resolve(params.compute)
        self.architecture = architecture_of(params, images.num_classes)
        self.state = self._fresh_state(images.num_classes)
        self.store = StateStore(paths.work(job.output), job.fingerprint(images.sha256), params.saving.every_seconds)
        self.batches = Batches(
            images,
            job.config.batch_size,
            job.seed,
            job.stage,
            self.compute.device,
            with_labels=params.model.class_conditional,
        )

    def run(
        self, tracked: StageRun, record: dict[str, Any], keep: Callable[[TrainState], None], prefix: str = ""
    ) -> TrainState:
        """Train from the newest saved state, or from the start.

        Args:
            tracked: gets every row of the curve.
            record: gets time and compute.
            keep: called at milestones with a good state.
            prefix: of what is tracked.
        """
        if (saved := self.store.load()) is not None:
            restore_state(self.state, *saved)
            print(f"{self.job.title}: going on from step {self.state.step}")
        first_step = self.state.step
        bar = Progress(self.job.plan.num_steps, self.job.title, "step", initial=first_step)

        def log(row: dict[str, float]) -> None:
            step = int(row["step"])
            tracked.log(step, **{prefix + name: value for name, value in row.items() if name != "step"})
            bar.update_to(step, f"loss {row['loss']:.4f}")

        def save(good: TrainState) -> None:
            if good.step in self.job.milestones:
                keep(good)
            if self.store.is_due:
                self.save_state(good)

        try:
            train(self.state, self._train_run(), self.batches, self.compute, log, save)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error}. {self._keep_last_good()}", error.reason) from None
        finally:
            bar.close()
        self._account(record, tracked, prefix)
        return self.state

    def save_state(self, state: TrainState) -> None:
        """Save a good state, so that the next run of the job goes on from it."""
        self.store.save(state_tensors(state), self._state_info(state))

    def save_weights(self, path: Path, state: TrainState) -> None:
        """Write the raw and the averaged weights of a state."""
        spent = self.job.spent.after(state.step, self.job.plan)
        states = {"raw": dict(state.model.state_dict()), "ema": state.ema.state_dict()}
        info = {
            "architecture": self.architecture,
            "arm": self.job.arm,
            "seed": self.job.seed,
            "stage": self.job.stage,
            "step": state.step,
            **spent.as_dict(),
        }
        save_weights(path, states, info)

    def _keep_last_good(self) -> str:
        """Write the weights of before the bad step, which no later update has touched; says where they are."""
        raw = dict(self.state.model.state_dict())
        if not all(bool(tensor.isfinite().all()) for tensor in raw.values()):
            return f"The last state that was saved, if any, is in {self.store.folder}"
        file = self.store.folder / "before-non-finite-loss.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(file, {"raw": raw}, {"architecture": self.architecture})
        return f"The weights of before are in {file}"

    def _fresh_state(self, num_classes: int) -> TrainState:
        job = self.job
        model = build_model(job.params, num_classes)
        if job.init is None:
            model.initialise(rng.generator(job.seed, "init"))
        else:
            model.load_state_dict(job.init)
        model.to(self.compute.device)
        training = job.params.training
        return TrainState(model, Ema(model, training.ema_decay), make_optimizer(model, training, job.config.lr))

    def _train_run(self) -> TrainRun:
        job, diffusion = self.job, self.job.params.diffusion
        return TrainRun(
            name=job.title,
            stage=job.config,
            training=job.params.training,
            num_steps=job.plan.num_steps,
            milestones=job.milestones,
            seed=job.seed,
            stream=job.stage,
            masking=job.masking,
            diffusion=Diffusion(diffusion.num_timesteps, diffusion.schedule, diffusion.prediction, self.compute.device),
            patch_size=job.params.model.patch_size,
            patch_dim=job.params.patch_dim,
            spent_after=lambda step: job.spent.after(step, job.plan).as_dict(),
        )

    def _state_info(self, state: TrainState) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "step": state.step,
            "curve": state.curve,
            "timings": state.timings,
        }

    def _account(self, record: dict[str, Any], tracked: StageRun, prefix: str) -> None:
        job, seconds, waited = self.job, self.state.device_seconds, self.state.data_wait_seconds
        facts = {
            "steps": job.plan.num_steps,
            "num_visible": job.plan.num_visible,
            "realised_mask_rate": 1 - job.plan.num_visible / job.params.grid.num_patches,
            "flops_per_step": job.plan.flops_per_step,
            "flops": job.plan.flops,
            "device_seconds": round(seconds, 3),
            "data_wait_seconds": round(waited, 3),
            "data_wait_share": round(waited / seconds, 4) if seconds else 0.0,
            "images_per_second": round(job.plan.num_steps * job.plan.batch_size / seconds, 1) if seconds else None,
            "num_parameters": num_parameters(self.state.model),
        }
        record.update(facts, timings=self.state.timings, **self.compute.describe())
        tracked.params(**self.compute.describe())
        in_curve = {*job.spent.as_dict(), "device_seconds", "data_wait_seconds"}  # cumulative, with every row
        once = {prefix + name: fact for name, fact in facts.items() if fact is not None and name not in in_curve}
        tracked.log(job.plan.num_steps, **once)


def write_curve(path: Path, state: TrainState) -> None:
    """The curve as CSV, full precision: equal runs give equal bytes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(state.curve)


def num_parameters(model: nn.Module) -> int:
    """How many weights there are to train."""
    return sum(p.numel() for p in model.parameters())
