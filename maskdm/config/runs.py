"""One arm with one seed, resolved once: masks, steps, FLOPs, and the values that the result of each stage depends on.

Stages, plan, report and tracking read a `Run`; none of them computes these things again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Literal

from maskdm.base.checksums import short_hash
from maskdm.base.errors import ParamsError
from maskdm.config.flops import Split, split_budget
from maskdm.config.geometry import Grid, Mask
from maskdm.config.paths import ARM_STAGES
from maskdm.config.schema import Params, Section, StageConfig, suggestion, validated

# Values that change only rounding: no result is recomputed when they change.
ROUNDING = {"micro_batch_size"}
# The values of `evaluation` that features of real images depend on; the others are about samples.
OF_FEATURES = {"features", "reference", "batch_size", "prc_neighborhood", "classifier_epochs"}
OF_A_MASK = ("strategy", "mask_rate", "block_size")  # the grid follows from image size and patch size


@dataclass(frozen=True)
class Spent:
    """Compute spent so far.

    Attributes:
        images_seen: images that the network was trained on, repetitions included.
        tokens_seen: visible patches of these images.
        flops: FLOPs of forward and backward.
    """

    images_seen: int = 0
    tokens_seen: int = 0
    flops: int = 0

    def as_dict(self) -> dict[str, int]:
        """The plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """One training stage of one arm and seed.

    Attributes:
        stage: its name; it also names the stream of randomness, so arms with one seed share draws of equal shape.
        params: the experiment; `dataset` is the dataset of this stage.
        arm: the key of the arm.
        seed: the seed of the run.
        config: learning rate, batch size, warm-up.
        mask: how masks are drawn; strategy `none` in finetuning.
        num_steps: number of optimizer updates.
        trial: the name of the tuning trial; None if this is not a trial.
        milestones: the steps after which weights are kept.
        before: compute spent before this stage.
    """

    stage: Literal["pretrain", "finetune"]
    params: Params
    arm: str
    seed: int
    config: StageConfig
    mask: Mask
    num_steps: int
    trial: str | None = None
    milestones: tuple[int, ...] = ()
    before: Spent = Spent()

    @property
    def title(self) -> str:
        """A name for messages and progress displays."""
        return f"{self.stage} {self.arm} {f'seed {self.seed}' if self.trial is None else f'trial {self.trial}'}"

    @property
    def grid(self) -> Grid:
        """The token grid."""
        return self.mask.grid

    @property
    def num_visible(self) -> int:
        """S, the number of patches of an image that enter the network."""
        return self.mask.num_visible

    @property
    def realised_mask_rate(self) -> float:
        """1 − S/N, the mask rate that is possible on this grid."""
        return self.mask.realised_mask_rate

    @property
    def batch_size(self) -> int:
        """Images per step."""
        return self.config.batch_size

    @cached_property
    def flops_per_step(self) -> int:
        """FLOPs of forward and backward for a whole batch, 2 per multiply-add."""
        return self.batch_size * self.params.image_flops(self.num_visible)

    @property
    def flops(self) -> int:
        """FLOPs of the stage."""
        return self.num_steps * self.flops_per_step

    def spent_after(self, num_steps: int) -> Spent:
        """Compute spent after this many steps of the stage, earlier stages included."""
        images = num_steps * self.batch_size
        return Spent(
            self.before.images_seen + images,
            self.before.tokens_seen + images * self.num_visible,
            self.before.flops + num_steps * self.flops_per_step,
        )

    @property
    def values(self) -> dict[str, Any]:
        """The values that the result of this stage depends on, in addition to its inputs."""
        known = {"arm": self.arm, "seed": self.seed, **_network(self.params), "num_steps": self.num_steps}
        if not self.num_steps:  # the result is the random initialisation
            return known
        return {
            **known,
            "milestones": list(self.milestones),
            "diffusion": _plain(self.params.diffusion),
            "training": _plain(self.params.training),
            self.stage: _plain(self.config, ROUNDING | {"share", "steps", "dataset", "checkpoint"}),
            "mask": {key: getattr(self.mask, key) for key in OF_A_MASK},
            "compute": _machine(self.params),
        }


@dataclass(frozen=True)
class Run:
    """One arm with one seed, or one trial of an arm's tuning.

    Attributes:
        params: the experiment, with the values of this trial or of the chosen trial.
        arm: the key of the arm.
        seed: the seed of all randomness.
        trial: the name of the tuning trial; None if this is not a trial.
        pretrain: masked pretraining; it has no steps for strategy `none`.
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
        """Whether images are also drawn from the pretrained weights: `sampling.primer` asks for it and they exist."""
        return self.params.sampling.primer and self.pretrain.mask.strategy != "none"

    @property
    def mask(self) -> dict[str, Any]:
        """Strategy, mask rate and block size as given in params.yaml."""
        return self.params.arm(self.arm).model_dump(include={*OF_A_MASK})

    def values(self, stage: str) -> dict[str, Any]:
        """Exactly the values that the result of a stage depends on, in addition to its inputs; in plain text."""
        params, spent = self.params, self.finetune.before.as_dict()
        arm_and_seed = {"arm": self.arm, "seed": self.seed}
        scored = {"sampling": _plain(params.sampling, {"grid_images", "primer"}), "evaluation": _evaluation(params)}
        match stage:
            case "tune":
                pretrain, finetune = (_flat(training) for training in (self.pretrain, self.finetune))
                return {"trial": self.trial, "pretrain": pretrain, "finetune": finetune, **scored}
            case "pretrain":
                return self.pretrain.values
            case "finetune":
                return {**self.finetune.values, "budget": params.budget.milestones, "before": spent}
            case "sample":
                return {
                    **arm_and_seed,
                    **_network(params),
                    "diffusion": _plain(params.diffusion),
                    "sampling": _plain(params.sampling, {"primer"}),
                    "primer": self.has_primer,
                    "compute": _machine(params),
                }
            case "evaluate":
                return {
                    **arm_and_seed,
                    "mask": self.mask,
                    "realised_mask_rate": self.pretrain.realised_mask_rate,
                    "flip": params.training.flip,
                    **scored,
                    "primer": spent if self.has_primer else None,
                    "compute": {"device": params.compute.device},
                }
        raise AssertionError(stage)

    def fingerprint(self, stage: str | None = None) -> str:
        """A short hash of the values of a stage; if `stage` is None, of all values that the scores depend on."""
        if stage is not None:
            return short_hash(self.values(stage))
        every = {name: self.values(name) for name in ARM_STAGES}
        return short_hash(shared_values("prepare", self.params), every)


def shared_values(stage: str, params: Params) -> dict[str, Any]:
    """Exactly the values that the result of an experiment-wide stage depends on, in addition to its inputs."""
    match stage:
        case "prepare":
            datasets = {name: _plain(dataset) for name, dataset in params.datasets.items()}
            return {"dataset": _plain(params.dataset), "datasets": datasets}
        case "features":
            evaluation = params.evaluation.model_dump(mode="json", include=OF_FEATURES)
            return {"evaluation": evaluation, "compute": {"device": params.compute.device}}
        case "scale":
            return {
                **_network(params),
                "diffusion": _plain(params.diffusion),
                "sampling": _plain(params.sampling, {"grid_images", "primer"}),
                "evaluation": _evaluation(params),
                "compute": _machine(params),
            }
        case "choose":
            return {"arms": list(params.arms), "trials": list(params.tuning.trials), "tuning": _plain(params.tuning)}
        case "report":
            sections = dict.fromkeys(("compute", "data", "saving", "tracking"), True)
            not_shown = {**sections, "pretrain": ROUNDING, "finetune": ROUNDING}
            return {**_plain(params, not_shown), "order": list(params.arms)}
    raise AssertionError(stage)


def _plain(section: Section, exclude: set[str] | dict[str, Any] | None = None) -> dict[str, Any]:
    """A section as plain values, without those that are None."""
    return section.model_dump(mode="json", exclude=exclude, exclude_none=True)


def _network(params: Params) -> dict[str, Any]:
    """The values that describe the network, except the number of classes."""
    return {"image_shape": list(params.dataset.shape), "model": _plain(params.model)}


def _machine(params: Params) -> dict[str, Any]:
    return {"device": params.compute.device, "precision": params.compute.precision}


def _evaluation(params: Params) -> dict[str, Any]:
    return _plain(params.evaluation, {"weights"})


def _flat(training: Training) -> dict[str, Any]:
    """The values of a stage, with its section merged in, so that differences are named `finetune.lr` in trials too."""
    values = training.values
    own = values.pop(training.stage, {})
    return {**values, **own}


def resolve(params: Params, arm: str, seed: int, trial: str | None = None, chosen: dict[str, Any] | None = None) -> Run:
    """Resolve one arm and seed.

    Pretraining takes its share of the budget and finetuning spends the rest, so all arms spend the same to within half
    a step.

    Args:
        params: the experiment.
        arm: the key of the arm.
        seed: the seed of the run; a trial uses `tuning.seed` instead.
        trial: the name of a tuning trial; None resolves the arm itself.
        chosen: the values of the trial that was chosen for the arm; None uses the values of params.yaml.

    Raises:
        ParamsError: there is no such arm, a value is not valid, or the budget is too small for the arm.
    """
    if trial is not None:
        params, seed = for_trial(params, arm, params.tuning.trials[trial]), params.tuning.seed
    elif chosen:
        params = with_values(params, arm, chosen)
    _check_stages(params, arm)
    try:
        mask = params.mask_of(arm)
        split = _split(params, arm, mask.num_visible)
    except ValueError as error:
        raise ParamsError(f"arms.{arm}: {error}") from None
    of_run = partial(Training, arm=arm, seed=seed, trial=trial)
    pretrain = of_run(
        stage="pretrain",
        params=params.for_pretraining(arm),
        config=params.pretrain_of(arm),
        mask=mask,
        num_steps=split.pretrain_steps,
    )
    finetune = of_run(
        stage="finetune",
        params=params,
        config=params.finetune_of(arm),
        mask=Mask("none", params.grid),
        num_steps=split.finetune_steps,
        milestones=split.milestone_steps,
        before=pretrain.spent_after(split.pretrain_steps),
    )
    milestones = tuple(zip(params.budget.milestones, split.milestone_steps, strict=True))
    return Run(params, arm, seed, trial, pretrain, finetune, milestones)


def _split(params: Params, arm: str, num_visible: int) -> Split:
    """Split the budget of an arm into steps.

    The budget is the cost of `budget.unmasked_steps` steps of the section `finetune`, whatever the arm's own batch size
    is; `budget.match` says what cost means.

    Raises:
        ValueError: the budget is too small for the arm.
    """
    pretrain, num_patches = params.pretrain_of(arm), params.grid.num_patches

    def cost(stage: StageConfig, num_visible: int) -> int:
        if params.budget.match == "steps":
            return 1
        return stage.batch_size * (params.image_flops(num_visible) if params.budget.match == "flops" else 1)

    return split_budget(
        params.budget.unmasked_steps * cost(params.finetune, num_patches),
        pretrain.share,
        pretrain.steps,
        cost(pretrain, num_visible),
        cost(params.finetune_of(arm), num_patches),
        params.budget.milestones,
    )


def _check_stages(params: Params, arm: str) -> None:
    """Check whether an arm's own values and the rest of params.yaml fit each other.

    Raises:
        ParamsError: they do not.
    """
    devices = params.compute.devices
    for section, stage in (("pretrain", params.pretrain_of(arm)), ("finetune", params.finetune_of(arm))):
        where, micro = f"arms.{arm}: {section}", stage.micro_batch_size
        if stage.batch_size % devices:
            raise ParamsError(f"{where}.batch_size {stage.batch_size} is not divisible by compute.devices {devices}")
        if isinstance(micro, int) and stage.batch_size // devices % micro:
            raise ParamsError(
                f"{where}.micro_batch_size {micro} does not divide the {stage.batch_size // devices} images of each "
                f"of compute.devices {devices}"
            )
    named = params.pretrain_of(arm).dataset
    if named is not None and named not in params.datasets:
        hint = suggestion(named, list(params.datasets)) if params.datasets else ", which is empty"
        raise ParamsError(f"arms.{arm}: pretrain.dataset {named!r} is not a key of `datasets`{hint}")
    here, there = params.dataset, params.for_pretraining(arm).dataset
    if named is not None and here.held_out and here.may_share_images_with(there):
        raise ParamsError(
            f"arms.{arm}: pretrain.dataset {named!r} may hold images that dataset.held_out keeps from training: "
            "give it another source or root, or classes that `dataset` does not use"
        )
    if params.sampling.primer and there.shape != here.shape:
        raise ParamsError(
            f"sampling.primer: arms.{arm} is pretrained on images of {there.shape}, which can't be compared with those "
            f"of dataset, {here.shape}"
        )


def with_values(params: Params, arm: str, values: dict[str, Any]) -> Params:
    """The params with a trial's values instead of an arm's own, and without tuning.

    Args:
        params: the experiment.
        arm: the key of the arm.
        values: by dotted path; those of `pretrain` are ignored by an arm without pretraining.

    Raises:
        ParamsError: a path or a value is not valid.
    """
    content = params.model_dump(mode="json", exclude_unset=True)
    content["tuning"]["trials"] = {}
    own = content["arms"][arm]
    for path, value in values.items():
        section, _, key = path.partition(".")
        if section == "training":
            content["training"][key] = value
        elif section not in ("pretrain", "finetune"):
            raise ParamsError(f"{path}: a trial may change pretrain.*, finetune.* and training.*")
        elif section == "finetune" or params.arm(arm).strategy != "none":
            own.setdefault(section, {})[key] = value
    changed = validated(content)
    _check_stages(changed, arm)
    return changed


def for_trial(params: Params, arm: str, values: dict[str, Any]) -> Params:
    """The params of a trial: its values, with the seed and the fraction of the budget that `tuning` gives.

    Raises:
        ParamsError: a path or a value is not valid.
    """
    given, fraction = with_values(params, arm, values), params.tuning.budget_fraction
    own, steps = given.arm(arm), given.pretrain_of(arm).steps
    if steps is not None:
        own = own.model_copy(update={"pretrain": {**own.pretrain, "steps": max(1, round(fraction * steps))}})
    unmasked_steps = max(1, round(fraction * params.budget.unmasked_steps))
    budget = given.budget.model_copy(update={"unmasked_steps": unmasked_steps, "milestones": [1.0]})
    tuning = given.tuning.model_copy(update={"seed": params.tuning.seed + 1})  # must differ from seeds
    changes = {"arms": {arm: own}, "seeds": [params.tuning.seed], "budget": budget, "tuning": tuning}
    return given.model_copy(update=changes)
