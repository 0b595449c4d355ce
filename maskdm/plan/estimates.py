"""What every stage of every arm costs: the numbers of `maskdm plan`, before they are laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import ceil
from typing import Literal

import torch

from maskdm.base.checksums import short_hash
from maskdm.config import Params, Run, Training, resolve
from maskdm.method.backbones.building import build_model
from maskdm.plan.calibration import Calibration, Work, machine
from maskdm.plan.store import Measurement, MeasurementStore
from maskdm.training.devices import Compute
from maskdm.training.memory import NUM_CLASSES, MemoryCounter, micro_batch_size

FLOAT32 = 4
SETS_KEPT = 2  # of weights in a checkpoint: raw and averaged
SETS_TO_RESUME = 4  # in a resumable state: these and AdamW's two moments


@dataclass(frozen=True)
class StageEstimate:
    """One stage of an arm and seed.

    Attributes:
        stage: which.
        num_visible: S.
        num_patches: N.
        num_steps: optimizer updates; evaluations of the network on a batch while sampling.
        batch_size: images of each.
        micro_batch_size: of these, that enter the network at once.
        flops_per_step: of such a step.
        memory: bytes at the peak, of the device.
        disk: bytes of the stage's output.
        seconds: on this machine; None without a calibration.
    """

    stage: Literal["pretrain", "finetune", "sample"]
    num_visible: int
    num_patches: int
    num_steps: int
    batch_size: int
    micro_batch_size: int
    flops_per_step: float
    memory: float
    disk: float
    seconds: float | None

    @property
    def flops(self) -> float:
        """Of the whole stage."""
        return self.num_steps * self.flops_per_step

    @property
    def realised_mask_rate(self) -> float:
        """1 − S/N."""
        return 1 - self.num_visible / self.num_patches


@dataclass(frozen=True)
class Total:
    """Of several stages, one after the other."""

    flops: float
    memory: float
    disk: float
    seconds: float | None


@dataclass(frozen=True)
class Tuning:
    """All trials of all arms; their weights are not kept."""

    num_trials: int
    total: Total


@dataclass(frozen=True)
class Estimates:
    """The whole plan.

    Attributes:
        arms: by key, one seed each.
        seeds: the total over all arms and seeds, tuning left out.
        tuning: None where nothing is tuned.
        resumable: bytes that a training stage needs on disk while it runs, for its state and milestones.
    """

    arms: dict[str, list[StageEstimate]]
    seeds: Total
    tuning: Tuning | None
    resumable: float


def forward_flops(params: Params) -> float:
    """FLOPs of one evaluation of the network on one whole image.

    Training costs three times that, but for the first layers, whose inputs need no gradient.
    """
    model, num_patches = params.model, params.grid.num_patches
    first = num_patches * params.patch_dim * model.dim + (4 * model.dim**2 if model.mlp_time_embed else 0)
    return (params.image_flops(num_patches) + 2 * first) / 3


def work_of(params: Params, compute: Compute) -> Work:
    """What has to be timed: the shapes of all planned stages; trials are scaled from them."""
    steps, batches = set[tuple[int, int]](), set[int]()
    for arm in params.arms:
        run = resolve(params, arm, params.seeds[0])
        for stage in (run.pretrain, run.finetune):
            if stage.num_steps:
                steps.add((micro_batch_of(stage, compute), stage.num_visible))
                batches.add(stage.batch_size)
    num_patches, sampled = params.grid.num_patches, min(params.sampling.batch_size, params.sampling.num_samples)
    return Work(frozenset(steps), frozenset(batches), sampled, num_patches, params.image_flops)


def estimate(params: Params, compute: Compute, calibration: Calibration | None, store: MeasurementStore) -> Estimates:
    """Put the plan's numbers together.

    Args:
        params: the experiment.
        compute: the device that memory is counted for.
        calibration: seconds on this machine; without one there are none.
        store: remembers counted memory.
    """
    estimator = _Estimator(params, compute, calibration, store)
    arms = {arm: estimator.stages(resolve(params, arm, params.seeds[0])) for arm in params.arms}
    one_seed = total_of([stage for stages in arms.values() for stage in stages])
    store.save()
    return Estimates(
        arms=arms,
        seeds=repeated(one_seed, len(params.seeds)),
        tuning=estimator.tuning(),
        resumable=estimator.resumable,
    )


def micro_batch_of(training: Training, compute: Compute) -> int:
    """Images of a rank that enter the network at once."""
    devices = training.params.compute.devices
    return micro_batch_size(training.params, compute, training.config, training.num_visible, devices)


def total_of(stages: list[StageEstimate] | list[Total]) -> Total:
    """Stages one after the other: the largest memory, the sum of all else."""
    seconds = [stage.seconds for stage in stages]
    return Total(
        flops=sum(stage.flops for stage in stages),
        memory=max(stage.memory for stage in stages),
        disk=sum(stage.disk for stage in stages),
        seconds=None if None in seconds else sum(s for s in seconds if s is not None),
    )


def repeated(total: Total, times: int) -> Total:
    """The same so many times."""
    return total_of([total] * times)


class _Estimator:
    """What all arms have in common."""

    def __init__(
        self, params: Params, compute: Compute, calibration: Calibration | None, store: MeasurementStore
    ) -> None:
        self._params, self._compute, self._calibration, self._store = params, compute, calibration, store
        with torch.device("meta"):
            self._model = build_model(params, NUM_CLASSES)

    @property
    def weights(self) -> int:
        """Bytes of one set of weights."""
        return FLOAT32 * sum(p.numel() for p in self._model.parameters())

    @cached_property
    def _counter(self) -> MemoryCounter:
        return MemoryCounter(self._params, self._compute)

    @property
    def resumable(self) -> float:
        """A state beside the one that replaces it, and the milestones so far beside the output that they go to."""
        return (2 * SETS_TO_RESUME + SETS_KEPT * len(self._params.budget.milestones)) * self.weights

    def stages(self, run: Run) -> list[StageEstimate]:
        """The stages of an arm that do something."""
        num_milestones = len(run.milestones)
        if not run.pretrain.num_steps:  # the stage `pretrain` publishes the initialisation, and that is all
            return [self._trained(run.finetune, 1 + num_milestones), self._sampled(num_milestones)]
        pretraining = self if run.params.pretrain_of(run.arm).dataset is None else self._on(run.pretrain.params)
        return [
            pretraining._trained(run.pretrain, 1),
            self._trained(run.finetune, num_milestones),
            self._sampled(num_milestones + run.params.sampling.primer * (1 + (run.pretrain.num_visible == 1))),
        ]

    def _on(self, params: Params) -> _Estimator:
        """The same for images of another size."""
        return _Estimator(params, self._compute, self._calibration, self._store)

    def tuning(self) -> Tuning | None:
        """All trials of all arms: each is an arm of its own, sampled once, its files removed afterwards."""
        params = self._params
        if not params.tuning.enabled:
            return None
        trials = [
            total_of(self.stages(resolve(params, arm, params.tuning.seed, trial)))
            for arm in params.arms
            for trial in params.tuning.trials
        ]
        total = total_of(trials)
        return Tuning(len(trials), Total(total.flops, total.memory, 0, total.seconds))

    def _trained(self, plan: Training, num_checkpoints: int) -> StageEstimate:
        calibration = self._calibration
        devices = self._params.compute.devices
        micro = micro_batch_of(plan, self._compute)
        held = self.weights if plan.stage == "finetune" else 0  # what it starts from
        return StageEstimate(
            stage=plan.stage,
            num_visible=plan.num_visible,
            num_patches=plan.grid.num_patches,
            num_steps=plan.num_steps,
            batch_size=plan.batch_size,
            micro_batch_size=micro,
            flops_per_step=plan.flops_per_step,
            memory=held + self._memory("training", plan.batch_size // devices, micro, plan.num_visible),
            disk=num_checkpoints * SETS_KEPT * self.weights,
            seconds=plan.num_steps * calibration.step_seconds(plan, micro) if calibration else None,
        )

    def _sampled(self, num_milestones: int) -> StageEstimate:
        params, calibration = self._params, self._calibration
        config, num_patches = params.sampling, params.grid.num_patches
        batch = min(config.batch_size, config.num_samples)
        num_evaluations = num_milestones * config.num_steps * ceil(config.num_samples / batch)
        used = config.num_samples / (batch * ceil(config.num_samples / batch))  # the last batch may be smaller
        image = math.prod(params.dataset.shape)
        return StageEstimate(
            stage="sample",
            num_visible=num_patches,
            num_patches=num_patches,
            num_steps=num_evaluations,
            batch_size=batch,
            micro_batch_size=batch,
            flops_per_step=used * batch * forward_flops(params),
            memory=self._memory("sampling", batch, config.num_samples),
            disk=num_milestones * config.num_samples * image,
            seconds=num_evaluations * used * calibration.evaluation if calibration else None,
        )

    def _memory(self, kind: Literal["training", "sampling"], *arguments: int) -> float:
        """Counted once, and remembered: counting takes half a second."""
        params, precision = self._params, self._compute.describe()
        image = (params.dataset.image_size, params.dataset.channels)
        key = short_hash("memory", machine(), precision, params.compute, params.model, image, kind, arguments)
        if (known := self._store.get(key)) is None:
            known = Measurement(getattr(self._counter, kind)(*arguments), 0.0, datetime.now(UTC).date().isoformat())
            self._store.put(key, known)
        return known.value
