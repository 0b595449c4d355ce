"""One training stage of an arm: its state is built or restored, trained, saved on the way, and recorded."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from maskdm.base import interrupts, rng
from maskdm.base.errors import NonFiniteLossError, UserError
from maskdm.base.interrupts import Stopped
from maskdm.base.progress import Progress
from maskdm.base.publishing import replace_file
from maskdm.base.tensors import save_tensors
from maskdm.config import DiffusionConfig, Training
from maskdm.data.arrays import ImageArrays
from maskdm.data.batches import Batches, is_resident
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import uses_plain_attention
from maskdm.training import devices
from maskdm.training.loop import Watcher, train
from maskdm.training.objective import Objective
from maskdm.training.optimizer import Ema, make_optimizer
from maskdm.training.ranks import ALONE, Ranks
from maskdm.training.state import ProgressNote, StateStore, TrainState, load_undamaged

DOES_NOT_FIT = "or images kept on the device (data.device_resident), did not fit; try data.device_resident: false"
CURVE_COLUMNS = ("step", "loss", "lr", "images_seen", "tokens_seen", "flops")
LogRow = Callable[[dict[str, float]], None]


class Trainer(Watcher):
    """Trains one stage of an arm: the constructor builds everything, `run` trains.

    Args:
        training: the stage: network, masks, steps, milestones, learning rate.
        images: the dataset.
        folder: the work folder, where rank 0 keeps states and milestones until the stage is done.
        ranks: the processes that share every batch.
        init: the weights to start from, by parameter name; None: drawn from the seed. Rank 0's count.

    Attributes:
        compute: device and precision.
        state: what is trained.
        batches: step → this rank's images and labels.
        objective: the loss of a step.

    Raises:
        UserError: a class-conditional model has no labels, CUDA is not available, or memory does not suffice.
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
        if not training.num_steps:  # initial weights fit every diffusion process
            self.architecture = {k: v for k, v in self.architecture.items() if k not in DiffusionConfig.model_fields}
        self.store = StateStore(folder, params.saving.every_seconds, params.saving.every_steps)
        self.compile_seconds = 0.0
        with devices.explain_out_of_memory(f"{training.title}: the network with its optimizer, {DOES_NOT_FIT}"):
            self.state = self._fresh_state(images.num_classes, init)
            self.objective = Objective(self.state.model, training, self.compute, ranks)
            device, memory = self.compute.device, self.compute.memory_bytes
            self.batches = Batches(
                images,
                training.batch_size,
                training.seed,
                training.stage,
                device,
                with_labels=params.model.class_conditional,
                resident=is_resident(params.data.device_resident, images, device, memory),
                rank=ranks.rank,
                num_ranks=ranks.num_ranks,
            )

    def run(self, log_row: LogRow = lambda row: None) -> None:
        """Train from the newest saved state or from the start, and save the state at the end.

        Args:
            log_row: receives every row of the curve with its timing, on rank 0.

        Raises:
            UserError: the loss is not finite, memory does not suffice, or a state can't be saved.
            Stopped: a signal came; the state is saved.
        """
        self._restore()
        step, num_steps, title = self.state.step, self.training.num_steps, self.training.title
        self._log_row, self._note = log_row, ProgressNote(self.folder, num_steps, step)
        self._bar = Progress(num_steps, title, "step", initial=step) if self.ranks.is_first else None
        with (
            devices.explain_out_of_memory(self._needs_less_memory()),
            closing(self._bar) if self._bar else nullcontext(),
            interrupts.deferring() as self._signals,
        ):
            if step < num_steps:
                self.compile_seconds = self.objective.rehearse(step, self.batches)
            try:
                train(self.state, self.batches, self.objective, self)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}. {self._keep_last_finite()}", error.reason) from None
            self._save_state()

    def log(self, row: dict[str, float]) -> None:
        """Show a row of the curve and pass it on; on rank 0."""
        if self._bar is not None:
            step = int(row["step"])
            self._log_row(row)
            self._bar.update_to(step, f"loss {row['loss']:.4f}")
            self._note.update(step)

    def should_save(self, step: int) -> bool:
        """Whether it is time to save, or a signal asks to stop; rank 0's answer counts."""
        return self._signals.requested is not None or self.store.is_due(step)

    def save(self, state: TrainState) -> None:
        """Save the weights of a milestone, and the state when it is time; after a signal, stop.

        Raises:
            Stopped: rank 0 has received a signal.
        """
        signal = self.ranks.broadcast(self._signals.requested)
        if self.ranks.is_first and state.step in self.training.milestones:
            with replace_file(self.milestone(state.step)) as building:
                self.save_weights(building)
        if signal or self.store.is_due(state.step):
            self._save_state()
        if signal:
            steps = f"{state.step} of {self.training.num_steps}"
            raise Stopped(signal, f"saved {self.training.title} at step {steps}; the same command resumes it")

    def milestone(self, step: int) -> Path:
        """Where the weights of a milestone are kept until the stage publishes them."""
        return self.folder / "milestones" / f"{step}.safetensors"

    def save_weights(self, path: Path) -> None:
        """Write the raw and the averaged weights as they are now."""
        training, sets = self.training, self.state.tensors()
        info = {
            "architecture": self.architecture,
            "arm": training.arm,
            "seed": training.seed,
            "stage": training.stage,
            "step": self.state.step,
            **training.spent_after(self.state.step).as_dict(),
        }
        save_tensors(path, {kind: sets[kind] for kind in ("raw", "ema")}, info)

    def save_curve(self, path: Path) -> None:
        """Write the curve as CSV in full precision: equal runs give equal bytes."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.state.curve)

    def facts(self) -> dict[str, Any]:
        """What was trained and what it took, for the record."""
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
        """The choices that change results by rounding alone, for the record."""
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

    def _restore(self) -> None:
        """Restore the newest state that rank 0 has saved, if any."""
        saved = self.store.load(accept=self._milestones_are_kept) if self.ranks.is_first else None
        if (saved := self.ranks.broadcast(saved)) is None:
            return
        self.state.restore(*saved)
        if self.training.config.micro_batch_size == "auto":  # the size found before, so that resuming is exact
            self.objective.micro_batch_size = saved[1]["micro_batch_size"]
        if self.ranks.is_first:
            print(f"{self.training.title}: resuming from step {self.state.step}", flush=True)

    def _save_state(self) -> None:
        """Save the state on rank 0, unless it is saved already."""
        if self.ranks.is_first and self.store.last_step != self.state.step:
            plain = {**self.state.plain(), "micro_batch_size": self.objective.micro_batch_size}
            self.store.save(self.state.tensors(), plain)

    def _milestones_are_kept(self, info: dict[str, Any]) -> bool:
        """Whether the weights of all milestones before a state are undamaged; others have to be trained again."""
        steps = (step for step in self.training.milestones if step <= info["step"])
        return all(load_undamaged(self.milestone(step)) is not None for step in steps)

    def _needs_less_memory(self) -> str:
        """What to change if memory does not suffice."""
        training, micro = self.training, self.objective.micro_batch_size
        whole = training.batch_size
        tokens = f"{training.num_visible} visible tokens of {training.grid.num_patches} patches each"
        size = f"{whole} images" if micro == whole else f"{whole} images in micro-batches of {micro}"
        masks = "" if training.mask.strategy == "none" else ", or a higher mask_rate"
        return (
            f"{training.title}: batches of {size}, {tokens}, did not fit; try {training.stage}.micro_batch_size below "
            f"{micro} (the result is the same), or compute.precision: bf16{masks}"
        )

    def _keep_last_finite(self) -> str:
        """Write the weights before the bad step, which no later update has changed; a sentence that says where."""
        raw = {name: parameter.detach() for name, parameter in self.state.model.named_parameters()}
        if not all(bool(tensor.isfinite().all()) for tensor in raw.values()):
            return f"If a state was saved, it is in {self.folder}"
        file = self.folder / "before-non-finite-loss.safetensors"
        if self.ranks.is_first:
            with replace_file(file) as building:
                save_tensors(building, {"raw": raw}, {"architecture": self.architecture})
        return f"The weights before that step are in {file}"

    def _fresh_state(self, num_classes: int, init: dict[str, Tensor] | None) -> TrainState:
        training, config = self.training, self.training.params.training
        model = build_model(training.params, num_classes)
        if init is None:
            model.initialise(rng.generator(training.seed, "init"))
        else:
            model.load_state_dict(init)
        if self.compute.compile_mode is not None and self.ranks.num_ranks > 1:
            for block in model.blocks:
                block.compile(dynamic=False)
        model.to(self.compute.device)
        ema = Ema(model, config.ema_decay) if self.ranks.is_first else None
        return TrainState(model, ema, make_optimizer(model, config, training.config.lr))
