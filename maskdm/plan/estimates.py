"""What every stage of every arm costs: the numbers of `maskdm plan`, before they are laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from math import ceil
from typing import Literal

import torch

from maskdm.compute import StagePlan, build_model, image_flops, plan_arm
from maskdm.config import Params, StageConfig, fingerprint
from maskdm.device import Compute
from maskdm.memory import NUM_CLASSES, MemoryCounter, micro_batch_size
from maskdm.plan.calibration import Calibration, Work, machine
from maskdm.plan.steps import forward_flops
from maskdm.plan.store import Measurement, MeasurementStore

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


def work_of(params: Params, compute: Compute) -> Work:
    """What has to be timed: the shapes of all planned stages; trials are scaled from them."""
    steps, batches = set[tuple[int, int]](), set[int]()
    for arm in params.arms:
        plan = plan_arm(params, arm)
        for stage, config, on in (
            (plan.pretrain, params.pretrain_of(arm), params.for_pretraining(arm)),
            (plan.finetune, params.finetune_of(arm), params),
        ):
            if stage.num_steps:
                micro = micro_batch_size(on, compute, config, stage.num_visible, params.training.devices)
                steps.add((micro, stage.num_visible))
                batches.add(stage.batch_size)
    num_patches, sampled = params.grid.num_patches, min(params.sampling.batch_size, params.sampling.num_samples)
    return Work(frozenset(steps), frozenset(batches), sampled, num_patches, partial(image_flops, params))


def estimate(params: Params, compute: Compute, calibration: Calibration | None, store: MeasurementStore) -> Estimates:
    """Put the plan's numbers together.

    Args:
        params: the experiment.
        compute: the device that memory is counted for.
        calibration: seconds on this machine; without one there are none.
        store: remembers counted memory.
    """
    estimator = _Estimator(params, compute, calibration, store)
    arms = {arm: estimator.stages(params, arm) for arm in params.arms}
    one_seed = total_of([stage for stages in arms.values() for stage in stages])
    store.save()
    return Estimates(
        arms=arms,
        seeds=repeated(one_seed, len(params.seeds)),
        tuning=estimator.tuning(),
        resumable=estimator.resumable,
    )


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

    def stages(self, params: Params, arm: str) -> list[StageEstimate]:
        """The stages of an arm that do something."""
        plan, num_milestones = plan_arm(params, arm), len(params.budget.milestones)
        if not plan.pretrain.num_steps:  # the stage `pretrain` publishes the initialisation, and that is all
            finetune = self._trained("finetune", plan.finetune, params.finetune_of(arm), 1 + num_milestones)
            return [finetune, self._sampled(num_milestones)]
        pretraining = self if params.pretrain_of(arm).dataset is None else self._on(params.for_pretraining(arm))
        return [
            pretraining._trained("pretrain", plan.pretrain, params.pretrain_of(arm), 1),
            self._trained("finetune", plan.finetune, params.finetune_of(arm), num_milestones),
            self._sampled(num_milestones + params.sampling.primer * (1 + (plan.pretrain.num_visible == 1))),
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
            total_of(self.stages(params.for_trial(arm, values), arm))
            for arm in params.arms
            for values in params.tuning.trials.values()
        ]
        total = total_of(trials)
        return Tuning(len(trials), Total(total.flops, total.memory, 0, total.seconds))

    def _trained(
        self, name: Literal["pretrain", "finetune"], plan: StagePlan, config: StageConfig, num_checkpoints: int
    ) -> StageEstimate:
        calibration = self._calibration
        devices = self._params.training.devices
        micro = micro_batch_size(self._params, self._compute, config, plan.num_visible, devices)
        held = self.weights if name == "finetune" else 0  # what it starts from
        return StageEstimate(
            stage=name,
            num_visible=plan.num_visible,
            num_patches=self._params.grid.num_patches,
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
        key = fingerprint("memory", machine(), precision, params.compute, params.model, image, kind, arguments)
        if (known := self._store.get(key)) is None:
            known = Measurement(getattr(self._counter, kind)(*arguments), 0.0, datetime.now(UTC).date().isoformat())
            self._store.put(key, known)
        return known.value
