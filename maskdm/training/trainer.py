"""One training stage: the state is built or restored, trained, saved on the way, and accounted for."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from maskdm.base import interrupts, rng
from maskdm.base.errors import NonFiniteLossError, UserError
from maskdm.base.interrupts import Deferral, Stopped
from maskdm.base.progress import Progress
from maskdm.base.publishing import replace_file
from maskdm.base.tensors import DamagedError, Sets, load_tensors, save_tensors
from maskdm.config import DiffusionConfig, Training
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches, is_resident
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import Block, uses_plain_attention
from maskdm.training import devices
from maskdm.training.loop import Watcher, train
from maskdm.training.objective import Objective
from maskdm.training.optimizer import Ema, make_optimizer
from maskdm.training.ranks import ALONE, Ranks
from maskdm.training.state import ProgressNote, StateStore, TrainState, put_aside

DOES_NOT_FIT = "or images kept on the device (data.device_resident), did not fit; try data.device_resident: false"
CURVE_COLUMNS = ("step", "loss", "lr", "images_seen", "tokens_seen", "flops")
Log = Callable[[dict[str, float]], None]


class Trainer:
    """Trains one stage of an arm; everything is built here, then `run` trains.

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
        objective: the loss of a step.

    Raises:
        UserError: a class-conditional model and no labels; CUDA asked for and not there; memory does not suffice.
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
        self.compute = devices.resolve(params.compute, params.compute.devices)
        self.architecture = params.architecture(images.num_classes)
        if not training.num_steps:  # initial weights serve every diffusion
            self.architecture = {k: v for k, v in self.architecture.items() if k not in DiffusionConfig.model_fields}
        self.store = StateStore(folder, params.saving.every_seconds, params.saving.every_steps)
        self.compile_seconds = 0.0
        with devices.explain_out_of_memory(f"{training.title}: the network with its optimizer, {DOES_NOT_FIT}"):
            self.state = self._fresh_state(images.num_classes, init)
            self.objective = Objective(self.state.model, training, self.compute, ranks)
            self.batches = self._make_batches(images)
        self._good: Sets = {}  # the tensors of the last state that is known to be good

    def run(self, log: Log = lambda row: None) -> None:
        """Train from the newest saved state, or from the start, and save the state at the end.

        Args:
            log: gets every row of the curve, with its timing; on the first rank.

        Raises:
            UserError: the loss is not finite, memory does not suffice, or a state can't be saved.
            Stopped: a signal came; the state is saved.
        """
        self._restore()
        with self._watching(log) as watcher:
            if self.state.step < self.training.num_steps:
                self.compile_seconds = self.objective.rehearse(self.state.step, self.batches, self.state.optimizer)
            train(self.state, self.batches, self.objective, watcher)
            self._good = self.state.tensors()
            self._save()

    def save(self, state: TrainState, signal: int) -> None:
        """Save a good state: the weights of a milestone; the state itself if it is time for that.

        Args:
            state: known to be good.
            signal: that the first rank has got, which is to end all of them; 0: none.

        Raises:
            Stopped: there is one.
        """
        signal = self.ranks.shared(signal)
        self._good = state.tensors()
        if self.ranks.is_first and state.step in self.training.milestones:
            with replace_file(self.milestone(state.step)) as building:
                self.save_weights(building)
        if signal or self.store.is_due(state.step):
            self._save()
        if signal:
            of = f"{state.step} of {self.training.num_steps}"
            raise Stopped(signal, f"saved {self.training.title} at step {of}; the same command goes on from there")

    def milestone(self, step: int) -> Path:
        """Where the weights of a milestone are kept until the stage publishes them."""
        return self.folder / "milestones" / f"{step}.safetensors"

    def save_weights(self, path: Path) -> None:
        """Write the raw and the averaged weights of the last good state; after `run`, the final one."""
        training = self.training
        info = {
            "architecture": self.architecture,
            "arm": training.arm,
            "seed": training.seed,
            "stage": training.stage,
            "step": self.state.step,
            **training.spent_after(self.state.step).as_dict(),
        }
        save_tensors(path, {kind: self._good[kind] for kind in ("raw", "ema")}, info)

    def save_curve(self, path: Path) -> None:
        """Write the curve as CSV, full precision: equal runs give equal bytes."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.state.curve)

    def facts(self) -> dict[str, Any]:
        """What the training was and took, for records."""
        training, seconds, waited = self.training, self.state.device_seconds, self.state.data_wait_seconds
        return {
            "steps": training.num_steps,
            "num_visible": training.num_visible,
            "realised_mask_rate": training.realised_mask_rate,
            "flops_per_step": training.flops_per_step,
            "flops": training.flops,
            "device_seconds": round(seconds, 3),
            "data_wait_seconds": round(waited, 3),
            "data_wait_share": round(waited / seconds, 4) if seconds else 0.0,
            "images_per_second": round(training.num_steps * training.batch_size / seconds, 1) if seconds else None,
            "num_parameters": sum(p.numel() for p in self.state.model.parameters()),
        }

    def how_it_ran(self) -> dict[str, Any]:
        """What of the machine and its use changes rounding alone, for records."""
        params, compute = self.training.params, self.compute
        tokens = self.training.num_visible + (2 if params.model.class_conditional else 1)
        is_plain = uses_plain_attention(params.compute.attention, compute.device.type, compute.dtype, tokens)
        facts = {
            **compute.describe(),
            "attention": "plain" if is_plain else "fused",
            "activation_checkpointing": params.compute.activation_checkpointing,
            "devices": self.ranks.num_ranks,
            "micro_batch_size": self.objective.micro_batch_size,
        }
        return facts if compute.compile_mode is None else facts | {"compile_seconds": self.compile_seconds}

    @contextmanager
    def _watching(self, log: Log) -> Iterator[Watcher]:
        """What surrounds the steps: on the first rank a progress bar and signals; on all, clear errors."""
        with devices.explain_out_of_memory(self._needs_less_memory()):
            if not self.ranks.is_first:
                yield _Follower(self)
                return
            bar = Progress(self.training.num_steps, self.training.title, "step", initial=self.state.step)
            try:
                with interrupts.deferring() as signals:
                    yield _Watcher(self, log, bar, signals)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}. {self._keep_last_good()}", error.reason) from None
            finally:
                bar.close()

    def _restore(self) -> None:
        """Continue from what the first rank has saved, if anything."""
        saved = self.store.load(accept=self._milestones_are_kept) if self.ranks.is_first else None
        if (shared := self.ranks.shared(saved)) is not None:
            self.state.restore(*shared)
            if self.training.config.micro_batch_size == "auto":  # as before, so that resuming is exact
                self.objective.micro_batch_size = shared[1]["micro_batch_size"]
            if self.ranks.is_first:
                print(f"{self.training.title}: going on from step {self.state.step}", flush=True)

    def _save(self) -> None:
        """Save the last good state, unless that was done at this step; on the first rank."""
        if self.ranks.is_first and self.store.last_step != self.state.step:
            self.store.save(self._good, {**self.state.plain(), "micro_batch_size": self.objective.micro_batch_size})

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
        training, micro = self.training, self.objective.micro_batch_size
        whole = training.batch_size
        tokens = f"{training.num_visible} visible tokens of {training.grid.num_patches} patches each"
        size = f"{whole} images" if micro == whole else f"{whole} images in micro-batches of {micro}"
        advice = [
            f"{training.stage}.micro_batch_size below {micro} (the result is the same)",
            "compute.precision: bf16",
        ]
        if training.mask.strategy != "none":
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

    def _make_batches(self, images: ImageArrays) -> Batches:
        training, ranks, device = self.training, self.ranks, self.compute.device
        resident = is_resident(training.params.data.device_resident, images, device, self.compute.memory_bytes)
        return Batches(
            images,
            training.batch_size,
            training.seed,
            training.stage,
            device,
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


class _Follower(Watcher):
    """What another rank than the first does around the steps: its part of saving, when the first one says so."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def save(self, state: TrainState) -> None:
        """Take part in saving a state."""
        self._trainer.save(state, signal=0)


class _Watcher(Watcher):
    """What the first rank does around the steps.

    Args:
        trainer: saves states.
        log: gets the rows.
        bar: shows them.
        signals: whether to stop.
    """

    def __init__(self, trainer: Trainer, log: Log, bar: Progress, signals: Deferral) -> None:
        self._trainer, self._log, self._bar, self._signals = trainer, log, bar, signals
        self._note = ProgressNote(trainer.folder, trainer.training.num_steps, trainer.state.step)

    def log(self, row: dict[str, float]) -> None:
        """Pass a row on and show it."""
        self._log(row)
        self._bar.update_to(int(row["step"]), f"loss {row['loss']:.4f}")
        self._note.update(int(row["step"]))

    def should_save(self, step: int) -> bool:
        """Whether it is time to save, or to stop."""
        return self._signals.requested is not None or self._trainer.store.is_due(step)

    def save(self, state: TrainState) -> None:
        """Save; then stop, if a signal has come."""
        self._trainer.save(state, self._signals.requested or 0)
