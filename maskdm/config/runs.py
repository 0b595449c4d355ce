"""One arm and one seed, resolved once: masks, steps, FLOPs, and the values that each stage's result depends on.

Everything that runs, plans, reports or tracks an arm reads a `Run`; nothing computes these things again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from maskdm.base.checksums import short_hash
from maskdm.base.errors import ParamsError
from maskdm.config.geometry import Grid, Strategy, VisibleShape, visible_shape
from maskdm.config.schema import Params, Section, StageConfig

# Values that change rounding alone: no result is made again for them.
ROUNDING = {"micro_batch_size"}
# What a classifier or another extractor computes on the real images; the rest of `evaluation` is about samples.
OF_FEATURES = {"features", "reference", "batch_size", "prc_neighborhood", "classifier_epochs"}


@dataclass(frozen=True)
class Spent:
    """Compute spent so far.

    Attributes:
        images_seen: images that went through the network.
        tokens_seen: visible patches of these images.
        flops: forward and backward.
    """

    images_seen: int = 0
    tokens_seen: int = 0
    flops: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain values."""
        return {"images_seen": self.images_seen, "tokens_seen": self.tokens_seen, "flops": self.flops}


@dataclass(frozen=True)
class Training:
    """One training stage of one arm and seed.

    Attributes:
        stage: which; also the stream of its randomness, so that arms of a seed share their draws where shapes agree.
        params: the experiment, with the dataset of this stage as `dataset`.
        arm: its key.
        seed: of the run.
        trial: of tuning, if it is one.
        config: learning rate, batch size, warm-up.
        strategy: how masks are drawn.
        mask_rate: the paper's m.
        block_size: side of a block in patches, of strategy `block`.
        num_steps: optimizer updates.
        milestones: steps whose weights are kept.
        before: compute spent before this stage.
    """

    stage: Literal["pretrain", "finetune"]
    params: Params
    arm: str
    seed: int
    config: StageConfig
    num_steps: int
    trial: str | None = None
    strategy: Strategy = "none"
    mask_rate: float = 0.0
    block_size: int | None = None
    milestones: tuple[int, ...] = ()
    before: Spent = Spent()

    @property
    def title(self) -> str:
        """For messages and progress."""
        return f"{self.stage} {self.arm} {f'seed {self.seed}' if self.trial is None else f'trial {self.trial}'}"

    @property
    def grid(self) -> Grid:
        """The token grid."""
        return self.params.grid

    @cached_property
    def visible(self) -> VisibleShape:
        """S, and the window of `crop`."""
        return visible_shape(self.strategy, self.mask_rate, self.grid, self.block_size)

    @property
    def num_visible(self) -> int:
        """S, the tokens of an image that enter the network."""
        return self.visible.num_visible

    @property
    def realised_mask_rate(self) -> float:
        """1 − S/N, the mask rate that the grid gives."""
        return self.visible.realised_mask_rate(self.grid)

    @property
    def batch_size(self) -> int:
        """Images per step."""
        return self.config.batch_size

    @cached_property
    def flops_per_step(self) -> int:
        """Forward and backward of a whole batch, 2 FLOPs per multiply-add."""
        return self.batch_size * self.params.image_flops(self.num_visible)

    @property
    def flops(self) -> int:
        """FLOPs of the whole stage."""
        return self.num_steps * self.flops_per_step

    def spent_after(self, num_steps: int) -> Spent:
        """Compute spent after so many steps of this stage, earlier stages included."""
        images = num_steps * self.batch_size
        return Spent(
            self.before.images_seen + images,
            self.before.tokens_seen + images * self.num_visible,
            self.before.flops + num_steps * self.flops_per_step,
        )

    @property
    def values(self) -> dict[str, Any]:
        """What this stage's result depends on, beside its inputs."""
        known = {"arm": self.arm, "seed": self.seed, **_network(self.params), "num_steps": self.num_steps}
        if not self.num_steps:  # the initialisation
            return known
        return {
            **known,
            "milestones": list(self.milestones),
            "diffusion": _plain(self.params.diffusion),
            "training": _plain(self.params.training),
            self.stage: _plain(self.config, ROUNDING | {"share", "steps", "dataset", "checkpoint"}),
            "mask": {"strategy": self.strategy, "mask_rate": self.mask_rate, "block_size": self.block_size},
            "compute": _machine(self.params),
        }


@dataclass(frozen=True)
class Run:
    """One arm with one seed, or one trial of its tuning.

    Attributes:
        params: the experiment with the values that this run has: the chosen trial's, or the trial's own.
        arm: its key.
        seed: of all randomness.
        trial: of tuning, if it is one.
        pretrain: masked pretraining; no step for strategy `none`.
        finetune: unmasked finetuning.
        milestones: (fraction of the budget, finetuning steps done by then).
    """

    params: Params
    arm: str
    seed: int
    trial: str | None
    pretrain: Training
    finetune: Training
    milestones: tuple[tuple[float, int], ...]

    @property
    def flops(self) -> int:
        """FLOPs of both stages."""
        return self.pretrain.flops + self.finetune.flops

    @property
    def has_primer(self) -> bool:
        """Whether the pretrained weights are sampled too: if `sampling.primer` asks for it, and there are some."""
        return self.params.sampling.primer and self.pretrain.strategy != "none"

    @property
    def mask(self) -> dict[str, Any]:
        """The mask as params.yaml gives it."""
        config = self.params.arm(self.arm)
        return {"strategy": config.strategy, "mask_rate": config.mask_rate, "block_size": config.block_size}

    def values(self, stage: str) -> dict[str, Any]:
        """Exactly the values that the result of a stage depends on, beside its inputs; in clear."""
        return OF_A_RUN[stage](self)

    def fingerprint(self, stage: str | None = None) -> str:
        """A short hash of the values of a stage; without one, of all that this run's scores depend on."""
        if stage is not None:
            return short_hash(self.values(stage))
        every = {name: values(self) for name, values in OF_A_RUN.items() if name != "tune"}
        return short_hash(shared_values("prepare", self.params), every)


def resolve(params: Params, arm: str, seed: int, trial: str | None = None, chosen: dict[str, Any] | None = None) -> Run:
    """Resolve one arm and seed.

    Pretraining takes its share of the budget, finetuning what pretraining really left, so that all arms spend the same
    to within half a step.

    Args:
        params: the experiment.
        arm: its key.
        seed: of the run; a trial has the one of `tuning`.
        trial: of the arm's tuning, by name.
        chosen: the values of the trial that was chosen for the arm; None runs with the values as given.

    Raises:
        ParamsError: there is no such arm, a value is not possible, or the budget is too small for it.
    """
    if trial is not None:
        params, seed = params.for_trial(arm, params.tuning.trials[trial]), params.tuning.seed
    elif chosen:
        params = params.with_values(arm, chosen)
    config = params.arm(arm)
    try:
        split = params.split_of(arm)
    except ValueError as error:
        raise ParamsError(f"arms.{arm}: {error}") from None
    pretrain = Training(
        stage="pretrain",
        params=params.for_pretraining(arm),
        arm=arm,
        seed=seed,
        trial=trial,
        config=params.pretrain_of(arm),
        strategy=config.strategy,
        mask_rate=config.mask_rate or 0.0,
        block_size=config.block_size,
        num_steps=split.pretrain_steps,
    )
    finetune = Training(
        stage="finetune",
        params=params,
        arm=arm,
        seed=seed,
        trial=trial,
        config=params.finetune_of(arm),
        num_steps=split.finetune_steps,
        milestones=split.milestone_steps,
        before=pretrain.spent_after(split.pretrain_steps),
    )
    milestones = tuple(zip(params.budget.milestones, split.milestone_steps, strict=True))
    return Run(params, arm, seed, trial, pretrain, finetune, milestones)


def shared_values(stage: str, params: Params) -> dict[str, Any]:
    """Exactly the values that the result of a stage of the whole experiment depends on, beside its inputs."""
    return OF_AN_EXPERIMENT[stage](params)


def _plain(section: Section, exclude: set[str] | dict[str, Any] | None = None) -> dict[str, Any]:
    """A section as plain values, without what is not given."""
    return section.model_dump(mode="json", exclude=exclude, exclude_none=True)


def _network(params: Params) -> dict[str, Any]:
    """What describes the network, the classes of the dataset aside."""
    return {"image_shape": list(params.dataset.shape), "model": _plain(params.model)}


def _machine(params: Params) -> dict[str, Any]:
    return {"device": params.compute.device, "precision": params.compute.precision}


def _prepare(params: Params) -> dict[str, Any]:
    datasets = {name: _plain(dataset) for name, dataset in params.datasets.items()}
    return {"dataset": _plain(params.dataset), "datasets": datasets}


def _features(params: Params) -> dict[str, Any]:
    evaluation = params.evaluation.model_dump(mode="json", include=OF_FEATURES)
    return {"evaluation": evaluation, "compute": {"device": params.compute.device}}


def _scale(params: Params) -> dict[str, Any]:
    return {
        **_network(params),
        "diffusion": _plain(params.diffusion),
        "sampling": _plain(params.sampling, {"grid_images", "primer"}),
        "evaluation": _plain(params.evaluation, {"weights"}),
        "compute": _machine(params),
    }


def _choose(params: Params) -> dict[str, Any]:
    return {"arms": list(params.arms), "trials": list(params.tuning.trials), "tuning": _plain(params.tuning)}


def _report(params: Params) -> dict[str, Any]:
    unseen = {
        **dict.fromkeys(("compute", "data", "saving", "tracking"), True),
        "pretrain": ROUNDING,
        "finetune": ROUNDING,
    }
    return {**_plain(params, unseen), "order": list(params.arms)}


def _pretrain(run: Run) -> dict[str, Any]:
    return run.pretrain.values


def _finetune(run: Run) -> dict[str, Any]:
    return {**run.finetune.values, "budget": run.params.budget.milestones, "before": run.finetune.before.as_dict()}


def _tune(run: Run) -> dict[str, Any]:
    return {
        "trial": run.trial,
        "pretrain": _flat(run.pretrain),
        "finetune": _flat(run.finetune),
        "sampling": _plain(run.params.sampling, {"grid_images", "primer"}),
        "evaluation": _plain(run.params.evaluation, {"weights"}),
    }


def _flat(training: Training) -> dict[str, Any]:
    """Its values, those of its own section not below one: people read `finetune.lr was …` of a trial too."""
    values = training.values
    own = values.pop(training.stage, {})
    return {**values, **own}


def _sample(run: Run) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        **_network(run.params),
        "diffusion": _plain(run.params.diffusion),
        "sampling": _plain(run.params.sampling, {"primer"}),
        "primer": run.has_primer,
        "compute": _machine(run.params),
    }


def _evaluate(run: Run) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "mask": run.mask,
        "realised_mask_rate": run.pretrain.realised_mask_rate,
        "flip": run.params.training.flip,
        "sampling": _plain(run.params.sampling, {"grid_images", "primer"}),
        "primer": run.finetune.before.as_dict() if run.has_primer else None,
        "evaluation": _plain(run.params.evaluation, {"weights"}),
        "compute": {"device": run.params.compute.device},
    }


OF_AN_EXPERIMENT: dict[str, Callable[[Params], dict[str, Any]]] = {
    "prepare": _prepare,
    "features": _features,
    "scale": _scale,
    "choose": _choose,
    "report": _report,
}
OF_A_RUN: dict[str, Callable[[Run], dict[str, Any]]] = {
    "tune": _tune,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "sample": _sample,
    "evaluate": _evaluate,
}
