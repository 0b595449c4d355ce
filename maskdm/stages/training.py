"""What the stages `pretrain` and `finetune` share: build, resume, train, account."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskdm.base import interrupts, rng
from maskdm.base.errors import UserError
from maskdm.base.interrupts import Deferral, Stopped
from maskdm.base.progress import Progress
from maskdm.base.publishing import replace_file
from maskdm.base.tensors import DamagedError, load_tensors, save_tensors
from maskdm.config import DiffusionConfig, Training
from maskdm.config.architecture import architecture_of
from maskdm.config.formats import CURVE_COLUMNS
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches, is_resident, num_bytes
from maskdm.method.backbones.building import build_model
from maskdm.method.backbones.uvit import Block, uses_plain_attention
from maskdm.tracking import StageRun
from maskdm.training import devices, memory
from maskdm.training.loop import (
    NonFiniteLossError,
    TrainState,
    Watcher,
    restore_state,
    state_info,
    state_tensors,
    train,
)
from maskdm.training.optimizer import Ema, make_optimizer
from maskdm.training.ranks import ALONE, Ranks, Sets
from maskdm.training.state import ProgressNote, StateStore, put_aside

DOES_NOT_FIT = "or images kept on the device (data.device_resident), did not fit; try data.device_resident: false"


class Trainer:
    """Runs one training stage: everything is built here, then `run` trains.

    Args:
        training: what to do.
        images: the dataset.
        folder: where states and milestones are kept until the stage is done; the first rank's.
        ranks: that share every batch.
        init: weights to start from; None draws them from the seed, or the first rank gives them to this one.

    Attributes:
        compute: device and precision.
        state: what is trained.
        batches: step → this rank's images and labels.
        micro_batch_size: images of this rank that enter the network at once.

    Raises:
        UserError: a class-conditional model and no labels; CUDA asked for and not there.
    """

    def __init__(
        self,
        training: Training,
        images: ImageArrays,
        folder: Path,
        ranks: Ranks = ALONE,
        init: dict[str, Tensor] | None = None,
    ) -> None:
        params = training.params
        if params.model.class_conditional and images.labels is None:
            raise UserError("model.class_conditional needs a dataset with labels (class folders); this one has none")
        self.training, self.folder, self.ranks = training, folder, ranks
        self._taken: Sets = {}
        self.compute = devices.resolve(params.compute, params.compute.devices)
        self.architecture = architecture_of(params, images.num_classes)
        if not training.num_steps:  # initial weights serve every diffusion
            self.architecture = {k: v for k, v in self.architecture.items() if k not in DiffusionConfig.model_fields}
        self.store = StateStore(folder, params.saving.every_seconds, params.saving.every_steps)
        resident = is_resident(params.data.device_resident, images, self.compute.device, self.compute.memory_bytes)
        taken = num_bytes(images) if resident else 0
        self.micro_batch_size = ranks.shared(
            memory.micro_batch_size(params, self.compute, training.config, training.num_visible, ranks.num_ranks, taken)
        )
        with devices.explain_out_of_memory(f"{training.title}: the network with its optimizer, {DOES_NOT_FIT}"):
            self.state = self._fresh_state(images.num_classes, init)
            self.batches = self._make_batches(images, resident)

    def run(self, tracked: StageRun, record: dict[str, Any], prefix: str = "") -> TrainState:
        """Train from the newest saved state, or from the start.

        Args:
            tracked: gets every row of the curve.
            record: gets time and compute.
            prefix: of what is tracked.

        Raises:
            UserError: the loss is not finite, memory does not suffice, or a state can't be saved.
            Stopped: a signal came; the state is saved.
        """
        self._restore()
        if not self.ranks.is_first:
            self._follow()
            return self.state
        bar = Progress(self.training.num_steps, self.training.title, "step", initial=self.state.step)
        try:
            with interrupts.deferring() as signals, devices.explain_out_of_memory(self._needs_less_memory()):
                self._train(_Watcher(self, tracked, bar, signals, prefix))
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error}. {self._keep_last_good()}", error.reason) from None
        finally:
            bar.close()
        self._account(record, tracked, prefix)
        return self.state

    def milestone(self, step: int) -> Path:
        """Where the weights of a milestone are kept until the stage publishes them."""
        return self.folder / "milestones" / f"{step}.safetensors"

    def take(self, state: TrainState, signal: int) -> None:
        """Keep a good state: the weights of a milestone; the state itself if it is time for that.

        Args:
            state: known to be good.
            signal: that the first rank has got, which is to end all of them; 0: none.

        Raises:
            Stopped: there is one.
        """
        signal = self.ranks.shared(signal)
        self._taken = state_tensors(state)
        if self.ranks.is_first:
            if state.step in self.training.milestones:
                with replace_file(self.milestone(state.step)) as building:
                    self.save_weights(building)
            if signal or self.store.is_due(state.step):
                self._save()
        if signal:
            of = f"{state.step} of {self.training.num_steps}"
            raise Stopped(signal, f"saved {self.training.title} at step {of}; the same command goes on from there")

    def save_weights(self, path: Path) -> None:
        """Write the raw and the averaged weights of the last state taken; after `run`, the final one."""
        spent = self.training.spent_after(self.state.step)
        info = {
            "architecture": self.architecture,
            "arm": self.training.arm,
            "seed": self.training.seed,
            "stage": self.training.stage,
            "step": self.state.step,
            **spent.as_dict(),
        }
        save_tensors(path, {"raw": self._taken["raw"], "ema": self._taken["ema"]}, info)

    def _train(self, watcher: Watcher) -> None:
        """Train to the end, and save: whatever becomes of publishing."""
        train(self.state, self.training, self.batches, self.compute, watcher, self.ranks, self.micro_batch_size)
        self._taken = state_tensors(self.state)
        if self.ranks.is_first:
            self._save()

    def _follow(self) -> None:
        """What another rank than the first does."""
        with devices.explain_out_of_memory(self._needs_less_memory()):
            self._train(_Follower(self))

    def _restore(self) -> None:
        """Go on from what the first rank has saved, if anything."""
        saved = self.store.load(accept=self._milestones_are_kept) if self.ranks.is_first else None
        if (shared := self.ranks.share_state(saved)) is not None:
            restore_state(self.state, *shared)
            if self.ranks.is_first:
                print(f"{self.training.title}: going on from step {self.state.step}", flush=True)

    def _save(self) -> None:
        """Save the state that was taken, unless that was done at this step."""
        if self.store.last_step != self.state.step:
            self.store.save(self._taken, state_info(self.state))

    def _milestones_are_kept(self, info: dict[str, Any]) -> bool:
        """Whether all milestones before a state can be published; one that can't has to be trained for again."""
        for step in (step for step in self.training.milestones if step <= info["step"]):
            file = self.milestone(step)
            try:
                load_tensors(file)
            except DamagedError as error:
                if file.exists():
                    put_aside(file, error.reason)
                return False
        return True

    def _needs_less_memory(self) -> str:
        """What to lower where memory does not suffice."""
        training, micro = self.training, self.micro_batch_size
        whole = training.batch_size
        tokens = f"{training.num_visible} visible tokens of {training.grid.num_patches} patches each"
        size = f"{whole} images" if micro == whole else f"{whole} images in micro-batches of {micro}"
        advice = [
            f"{training.stage}.micro_batch_size below {micro} (the result is the same)",
            "compute.precision: bf16",
        ]
        if training.strategy != "none":
            advice.append("a higher mask_rate")
        return f"{training.title}: batches of {size}, {tokens}, did not fit; try {', or '.join(advice)}"

    def _keep_last_good(self) -> str:
        """Write the weights of before the bad step, which no later update has touched; says where they are."""
        raw = {name: parameter.detach() for name, parameter in self.state.model.named_parameters()}
        if not all(bool(tensor.isfinite().all()) for tensor in raw.values()):
            return f"The last state that was saved, if any, is in {self.folder}"
        file = self.folder / "before-non-finite-loss.safetensors"
        with replace_file(file) as building:
            save_tensors(building, {"raw": raw}, {"architecture": self.architecture})
        return f"The weights of before are in {file}"

    def _make_batches(self, images: ImageArrays, resident: bool) -> Batches:
        training, ranks = self.training, self.ranks
        return Batches(
            images,
            training.batch_size,
            training.seed,
            training.stage,
            self.compute.device,
            with_labels=training.params.model.class_conditional,
            resident=resident,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )

    def _fresh_state(self, num_classes: int, init: dict[str, Tensor] | None) -> TrainState:
        training, ranks, config = self.training, self.ranks, self.training.params.training
        model = build_model(training.params, num_classes)
        if init is None:
            model.initialise(rng.generator(training.seed, "init"))
        else:
            model.load_state_dict(init)
        ranks.share_weights(model)
        if self.compute.compile_mode is not None and ranks.num_ranks > 1:
            for block in (module for module in model.modules() if isinstance(module, Block)):
                block.compile(dynamic=False)
        model.to(self.compute.device)
        ema = Ema(model, config.ema_decay) if ranks.is_first else None
        return TrainState(model, ema, make_optimizer(model, config, training.config.lr))

    def _account(self, record: dict[str, Any], tracked: StageRun, prefix: str) -> None:
        training, seconds, waited = self.training, self.state.device_seconds, self.state.data_wait_seconds
        facts = {
            "steps": training.num_steps,
            "num_visible": training.num_visible,
            "realised_mask_rate": training.realised_mask_rate,
            "flops_per_step": training.flops_per_step,
            "flops": training.flops,
            "device_seconds": round(seconds, 3),
            "data_wait_seconds": round(waited, 3),
            "data_wait_share": round(waited / seconds, 4) if seconds else 0.0,
            "images_per_second": round(training.num_steps * training.batch_size / seconds, 1) if seconds else None,
            "num_parameters": num_parameters(self.state.model),
        }
        record.update(facts, timings=self.state.timings, **self.compute.describe(), **self._how_it_ran())
        if self.compute.compile_mode is not None:
            print(
                f"{training.title}: compiled in {self.state.compile_seconds:.1f} s, before the first step", flush=True
            )
        tracked.tags(**self.compute.describe())
        in_curve = {*training.before.as_dict(), "device_seconds", "data_wait_seconds"}  # cumulative, with every row
        once = {prefix + name: fact for name, fact in facts.items() if fact is not None and name not in in_curve}
        tracked.log(training.num_steps, **once)

    def _how_it_ran(self) -> dict[str, Any]:
        """For records: what of the machine and its use changes rounding alone."""
        params, compute = self.training.params, self.compute
        tokens = self.training.num_visible + (2 if params.model.class_conditional else 1)
        is_plain = uses_plain_attention(params.compute.attention, compute.device.type, compute.dtype, tokens)
        facts = {
            "attention": "plain" if is_plain else "fused",
            "activation_checkpointing": params.compute.activation_checkpointing,
            "devices": self.ranks.num_ranks,
            "micro_batch_size": self.micro_batch_size,
        }
        return facts if compute.compile_mode is None else facts | {"compile_seconds": self.state.compile_seconds}


class _Follower:
    """What another rank than the first does around the steps: its part of saving, when the first one says so.

    Args:
        trainer: keeps states.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def log(self, row: dict[str, float]) -> None:
        """The first rank does."""

    def wants(self, step: int) -> bool:
        """Nobody asks this rank."""
        return False

    def take(self, state: TrainState) -> None:
        """Take part in taking a state."""
        self._trainer.take(state, signal=0)


class _Watcher:
    """What the trainer does around the steps.

    Args:
        trainer: keeps states.
        tracked: gets the rows.
        bar: shows them.
        signals: whether to stop.
        prefix: of what is tracked.
    """

    def __init__(self, trainer: Trainer, tracked: StageRun, bar: Progress, signals: Deferral, prefix: str) -> None:
        self._trainer, self._tracked, self._bar, self._signals, self._prefix = trainer, tracked, bar, signals, prefix
        self._note = ProgressNote(trainer.folder, trainer.training.num_steps, trainer.state.step)

    def log(self, row: dict[str, float]) -> None:
        """Track a row and show it."""
        step = int(row["step"])
        self._tracked.log(step, **{self._prefix + name: value for name, value in row.items() if name != "step"})
        self._bar.update_to(step, f"loss {row['loss']:.4f}")
        self._note.update(step)

    def wants(self, step: int) -> bool:
        """Whether it is time to save, or to stop."""
        return self._signals.requested is not None or self._trainer.store.is_due(step)

    def take(self, state: TrainState) -> None:
        """Save; then stop, if a signal has come."""
        self._trainer.take(state, self._signals.requested or 0)


def write_curve(path: Path, state: TrainState) -> None:
    """The curve as CSV, full precision: equal runs give equal bytes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(state.curve)


def num_parameters(model: nn.Module) -> int:
    """How many weights there are to train."""
    return sum(p.numel() for p in model.parameters())
