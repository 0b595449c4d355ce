"""params.yaml: the one schema, used by the commands, by Snakemake and by the tests.

Every knob is declared here, with its default and its meaning; an unknown key or a wrong type is a `ParamsError` that
says where and what would be right. `reading` opens the file and checks what sections demand of each other.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from maskdm.base.errors import ParamsError
from maskdm.config.flops import training_flops
from maskdm.config.geometry import WITH_BLOCKS, Grid, Mask, Strategy

PARAMS_FILE = Path("params.yaml")

EMBEDDED = ("digits", "swissroll")
HUGGING_FACE = re.compile(r"huggingface:(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?(:[\w.-]+)?")  # owner/name:configuration
SPLITS = {
    "mnist": ("train", "test", "all"),
    "fashion_mnist": ("train", "test", "all"),
    "svhn": ("train", "test", "extra"),
}
SOURCES = (*EMBEDDED, *SPLITS, "lsun", "image_folder")
FORMER_SOURCES = {
    "cifar10": "huggingface:uoft-cs/cifar10, split train or test, which needs pip install 'maskdm[datasets]'",
    "celeba": "huggingface:nielsr/CelebA-faces, all 202,599 images as split train, which needs pip install "
    "'maskdm[datasets]', or image_folder with root: the authors' img_align_celeba.zip; the usual crop is crop: box, "
    "crop_box: [57, 25, 128]",
}
LSUN_SCENES = (
    *("bedroom", "bridge", "church_outdoor", "classroom", "conference_room", "dining_room", "kitchen"),
    *("living_room", "restaurant", "tower"),
)
LSUN_OBJECTS = (
    *("airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining_table", "dog"),
    *("horse", "motorbike", "person", "potted_plant", "sheep", "sofa", "train", "tv-monitor"),
)
LSUN_CATEGORIES = (*LSUN_SCENES, *LSUN_OBJECTS, "test")  # the test images of all scenes are one database

# Where a name is added: here, and where it is computed (`maskdm.method`); masks have theirs in `geometry`.
Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "x_0", "v"]
Sampler = Literal["ddim", "ddpm", "dpmsolver++", "unipc"]
# The one that is trained on the dataset's own labels, the pixels as they are, and torch-fidelity's by name.
Extractor = Literal[
    "classifier",
    "pixels",
    "inception-v3-compat",
    "vgg16",
    "clip-rn50",
    "clip-rn101",
    "clip-rn50x4",
    "clip-rn50x16",
    "clip-rn50x64",
    "clip-vit-b-32",
    "clip-vit-b-16",
    "clip-vit-l-14",
    "clip-vit-l-14-336px",
    "dinov2-vit-s-14",
    "dinov2-vit-b-14",
    "dinov2-vit-l-14",
    "dinov2-vit-g-14",
]


def _number(value: Any) -> Any:
    """YAML 1.1 readers give `2e-4` as a string; YAML 1.2 (and DVC) as a number. Mean the number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _increasing_to_one(fractions: list[float]) -> list[float]:
    if fractions != sorted(set(fractions)) or fractions[-1] != 1.0 or fractions[0] <= 0.0:
        raise ValueError(f"expected increasing fractions in (0, 1] that end with 1.0, got {fractions}")
    if any(abs(100 * fraction - round(100 * fraction)) > 1e-9 for fraction in fractions):
        raise ValueError(f"expected whole percents, such as 0.25, got {fractions}")
    return fractions


def _side_or_sides(size: Any) -> Any:
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"expected a number of pixels, 1 or more, or [height, width], got {size!r}")
    return size if len({*sides}) == 2 else sides[0]


def _known_source(source: str) -> str:
    if source in SOURCES or HUGGING_FACE.fullmatch(source):
        return source
    if source in FORMER_SOURCES:
        raise ValueError(f"there is no source {source} any more: write {FORMER_SOURCES[source]}")
    raise ValueError(
        f"unknown dataset {source!r}{suggestion(source, [*SOURCES])}, or huggingface:NAME for a dataset there"
    )


def _check_lsun_category(split: str | None) -> None:
    """Raises: ValueError, if it names neither a category nor its database or folder."""
    if split is None:
        raise ValueError("source lsun needs split: its category, such as church_outdoor or bedroom")
    category = re.sub(r"(_train|_val)?(_lmdb)?$", "", split)
    if category not in LSUN_CATEGORIES:
        close = difflib.get_close_matches(category, LSUN_CATEGORIES, n=1)
        known = f"{', '.join(LSUN_SCENES)}, or an object such as cat"
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {known}"
        raise ValueError(f"source lsun has no category {category!r}; {hint}")


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of params.yaml: immutable, typed strictly, no key that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DatasetConfig(Section):
    """What `prepare` turns into arrays."""

    source: Annotated[str, AfterValidator(_known_source)] = Field(
        description="digits and swissroll are embedded; mnist, fashion_mnist, svhn: downloaded, or their original "
        "files in root; lsun: its databases in root; image_folder: your own; huggingface:NAME[:CONFIGURATION]"
    )
    root: str | None = Field(
        default=None,
        description="where the files lie, from this params.yaml; of image_folder a folder tree, .zip or .tar",
    )
    split: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="of a named dataset: train (the default), test, …; of lsun its category, e.g. church_outdoor",
    )
    image_size: Annotated[int | list[int], BeforeValidator(_side_or_sides)] = Field(
        description="side of the square images in pixels, or [height, width]"
    )
    channels: Literal[1, 3]
    crop: Literal["none", "center", "box"] = Field(
        default="center", description="largest centred square; none stretches"
    )
    crop_box: Annotated[list[Natural], Field(min_length=3, max_length=3)] | None = Field(
        default=None, description="crop box: top row, left column and side of the square, in pixels"
    )
    resize_filter: Literal["lanczos", "bicubic"] = Field(default="lanczos", description="antialiased, never nearest")
    on_bad_image: Literal["error", "skip"] = "error"
    max_pixels: Count = Field(default=64_000_000, description="an image with more is bad: guards against image bombs")
    classes: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None, description="use only the images of these classes, by name"
    )
    limit: Count | None = Field(default=None, description="use so many images, drawn by seed")
    fraction: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="use this part of the images, drawn by seed"
    )
    held_out: Fraction = Field(
        default=0.0, description="part of the images used that is never trained on, drawn by seed"
    )
    seed: Natural = Field(default=0, description="of limit, fraction and held_out")
    shard_images: Count = Field(default=8192, description="images per array file")

    @property
    def height(self) -> int:
        """H in pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """W in pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.height, self.width, self.channels

    def may_share_images_with(self, other: DatasetConfig) -> bool:
        """Whether both may hold the same images: of one source, unless their classes differ."""
        if (self.source, self.root, self.split) != (other.source, other.root, other.split):
            return False
        return self.classes is None or other.classes is None or not set(self.classes).isdisjoint(other.classes)

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "image_folder" and not self.root:
            raise ValueError("source image_folder needs root: the folder, .zip or .tar with your images")
        if self.source in EMBEDDED and self.root:
            raise ValueError(f"source {self.source} is embedded and takes no root; did you mean source: image_folder?")
        if self.split is not None and self.source in (*EMBEDDED, "image_folder"):
            raise ValueError(f"source {self.source} has no split: name a part by fraction, limit, classes or held_out")
        if self.split is not None and self.split not in SPLITS.get(self.source, (self.split,)):
            known = ", ".join(SPLITS[self.source])
            raise ValueError(f"source {self.source} has no split {self.split!r}; expected one of {known}")
        if self.source == "lsun":
            _check_lsun_category(self.split)
        return self

    @model_validator(mode="after")
    def _images_can_be_made(self) -> Self:
        if (self.crop == "box") != (self.crop_box is not None):
            raise ValueError("crop_box (top row, left column, side) belongs to crop: box, and crop: box needs it")
        if self.crop == "box" and self.height != self.width:
            raise ValueError(f"crop: box cuts a square, and image_size is {self.image_size}: use center or none")
        if self.crop_box is not None and self.crop_box[2] < 1:
            raise ValueError(f"crop_box {self.crop_box}: its side is {self.crop_box[2]}; expected 1 or more")
        if self.limit is not None and self.fraction is not None:
            raise ValueError(f"give limit ({self.limit}) or fraction ({self.fraction:g}), not both")
        if self.source == "swissroll" and self.shape != (1, 2, 1):
            raise ValueError("the points (x, y) of swissroll are images of image_size: [1, 2] with channels: 1")
        return self


class ModelConfig(Section):
    """U-ViT's architecture."""

    patch_size: Count
    dim: Count
    depth: Count = Field(description="blocks; odd: (depth−1)/2 in, one in the middle, (depth−1)/2 out")
    num_heads: Count
    mlp_ratio: Positive = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    class_conditional: bool = Field(default=False, description="a class token beside the time token")

    @model_validator(mode="after")
    def _dims_fit(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide dim {self.dim}")
        if self.dim % 2:
            raise ValueError(f"dim {self.dim} is odd; the time embedding needs pairs of sine and cosine")
        if self.depth % 2 == 0:
            raise ValueError(f"depth {self.depth} is even; U-ViT's long skips pair blocks around one in the middle")
        return self


class DiffusionConfig(Section):
    """The forward process and what the network predicts."""

    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Schedule = "linear"
    prediction: Prediction = "epsilon"

    @model_validator(mode="after")
    def _schedule_keeps_signal(self) -> Self:
        if self.schedule == "linear" and self.num_timesteps <= 20:
            raise ValueError(
                f"num_timesteps {self.num_timesteps} is too few for schedule linear: its last variance would be 1; "
                "use at least 21, or cosine"
            )
        return self


class BudgetConfig(Section):
    """What every arm may spend, pretraining and finetuning together."""

    match: Literal["flops", "images", "steps"] = Field(default="flops", description="what the arms have in common")
    unmasked_steps: Count = Field(description="the budget: the cost of so many unmasked finetuning steps")
    milestones: Annotated[list[Number], Field(min_length=1), AfterValidator(_increasing_to_one)] = Field(
        [0.5, 1.0], description="fractions of the budget at which weights are kept, sampled and scored"
    )


class TrainingConfig(Section):
    """What pretraining and finetuning share."""

    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.99, 0.99]
    weight_decay: NonNegative = 0.03
    decay: Literal["all", "weights"] = Field(default="all", description="weights: none on biases, norms, embeddings")
    ema_decay: Fraction = 0.999
    grad_clip: Positive | None = None
    flip: Annotated[Number, Field(ge=0, le=1)] = Field(default=0.0, description="probability of a left-right flip")
    log_every: Count = 100


class StageConfig(Section):
    """Optimisation of one training stage."""

    lr: Positive
    batch_size: Count
    micro_batch_size: Count | Literal["auto"] | None = Field(
        default=None, description="accumulate gradients over chunks of this size; auto: the largest that fits in memory"
    )
    warmup_steps: Natural = 0
    lr_decay: Literal["constant", "cosine"] = "constant"

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


Stage = TypeVar("Stage", bound=StageConfig)


class PretrainConfig(StageConfig):
    """Masked pretraining."""

    share: Fraction = Field(default=0.3, description="the part of the budget spent on pretraining")
    steps: Count | None = Field(default=None, description="so many pretraining steps instead of a share of the budget")
    dataset: str | None = Field(default=None, description="a key of `datasets`: pretrain on it instead of `dataset`")
    checkpoint: str | None = Field(
        default=None, description="start from the weights in a folder of `maskdm import-checkpoint` or `maskdm export`"
    )

    @model_validator(mode="after")
    def _share_or_steps(self) -> Self:
        if self.steps is not None and "share" in self.model_fields_set:
            raise ValueError(f"give share ({self.share}) or steps ({self.steps}), not both")
        return self


class FinetuneConfig(StageConfig):
    """Unmasked finetuning."""

    init_from: Literal["ema", "raw"] = "ema"


class ArmConfig(Section):
    """One cell of the ablation."""

    strategy: Strategy
    mask_rate: Fraction | None = None
    block_size: Count | None = None
    pretrain: dict[str, Any] = Field(default={}, description="what differs from `pretrain` for this arm")
    finetune: dict[str, Any] = Field(default={}, description="what differs from `finetune` for this arm")

    @model_validator(mode="after")
    def _mask_is_complete(self) -> Self:
        if self.strategy == "none" and (self.mask_rate is not None or self.pretrain):
            raise ValueError("strategy none has no pretraining: remove mask_rate and pretrain")
        if self.strategy != "none" and self.mask_rate is None:
            raise ValueError(f"strategy {self.strategy} needs mask_rate, in [0, 1)")
        if (self.strategy in WITH_BLOCKS) != (self.block_size is not None):
            name = self.strategy if self.strategy in WITH_BLOCKS else " or ".join(WITH_BLOCKS)
            raise ValueError(f"block_size (in patches) belongs to strategy {name}, and strategy {name} needs it")
        return self


class SamplingConfig(Section):
    """How images are drawn from the EMA weights."""

    sampler: Sampler = "ddim"
    num_steps: Count = Field(default=50, description="network evaluations per image")
    eta: NonNegative = Field(default=0.0, description="ddim only: 0 is deterministic, 1 is ddpm's variance")
    num_samples: Count = 1000
    batch_size: Count = 250
    clip_x_0: bool = True
    grid_images: Count = Field(default=64, description="images in the PNG grid")
    primer: bool = Field(default=False, description="draw from the pretrained weights too, before any finetuning")


class EvaluationConfig(Section):
    """How samples are scored."""

    features: Extractor = "classifier"
    weights: str | None = Field(default=None, description="a local weights file of a torch-fidelity extractor")
    reference: Literal["train", "held_out", "all"] = Field(
        default="train", description="the real images that samples are compared with"
    )
    batch_size: Count = 256
    kid_subsets: Count = 100
    kid_subset_size: Annotated[int, Field(ge=2)] = 500
    prc_neighborhood: Count = 3
    classifier_epochs: Count = 20

    def shortage(self, count: int, what: str) -> str | None:
        """Whether there are fewer samples, or fewer real images, than the metrics need.

        Args:
            count: how many there are.
            what: they are.

        Returns:
            one line for people; None if they suffice.
        """
        needed = max(self.kid_subset_size, self.prc_neighborhood + 1)
        if count >= needed:
            return None
        return (
            f"{count} {what} are fewer than the metrics need: {needed} (evaluation.kid_subset_size "
            f"{self.kid_subset_size}, and prc_neighborhood + 1)"
        )

    @model_validator(mode="after")
    def _weights_are_for_a_pretrained_extractor(self) -> Self:
        if not self.weights:
            return self
        if self.features == "classifier":
            raise ValueError("the classifier is trained on the dataset's labels and takes no weights")
        if self.features == "pixels":
            raise ValueError("features: pixels takes no weights: it compares pixel values")
        if self.features.startswith("dinov2"):
            raise ValueError(
                f"{self.features} takes no local weights: remove weights, and copy torch.hub's folder where there is "
                "no network"
            )
        return self


class ComputeConfig(Section):
    """The machine: results are byte-identical only for equal values here, on the same machine.

    `device` and `precision` are part of what a result is made from. All other values change rounding at most: changing
    them reruns nothing, and each run records the values that it had. On a GPU runs are equal to rounding only: the
    backward pass of its attention adds up in any order.
    """

    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]
    attention: Literal["auto", "plain", "fused"] = Field(
        default="auto", description="plain: matrix products and a softmax; fused: PyTorch's kernel"
    )
    compile: Literal["auto", "off", "default", "reduce-overhead"] = Field(
        default="auto",
        description="mode of torch.compile; auto: default on a GPU, off on a CPU; reduce-overhead: CUDA graphs",
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute the blocks' activations twice instead of keeping them"
    )
    devices: Count = Field(default=1, description="processes that share a batch, one per device")
    threads: Count = Field(default=1, description="CPU threads of a stage; Snakemake reserves as many cores")


class TuningConfig(Section):
    """Every arm tries the same trials, at the same compute each, before it runs with the values of the best."""

    seed: Natural = Field(description="of the trials; not one of `seeds`")
    budget_fraction: Annotated[Number, Field(gt=0, le=1)] = Field(description="of the budget that each trial spends")
    metric: Literal["kid", "fid"] = Field(default="kid", description="the trial with the lowest one is chosen")
    trials: dict[str, dict[str, Any]] = Field(
        description="by name, what each trial overrides by dotted path: pretrain.*, finetune.*, training.*; "
        "{}: nothing is tuned, and every arm runs with the values as given"
    )

    @property
    def enabled(self) -> bool:
        """Whether anything is tuned."""
        return bool(self.trials)

    @model_validator(mode="after")
    def _there_is_a_choice(self) -> Self:
        if len(self.trials) == 1:
            raise ValueError("trials: tuning needs two trials or more to choose from; add trials, or say trials: {}")
        return self


class DataConfig(Section):
    """How images get to the device; nothing here changes a result."""

    device_resident: Literal["auto"] | bool = Field(
        default="auto",
        description="keep the uint8 images on the GPU; auto: if at most a quarter of its memory",
    )


class TrackingConfig(Section):
    """MLflow; nothing here changes a result."""

    enabled: bool = True


class SavingConfig(Section):
    """Resumable training state; nothing here changes a result."""

    every_seconds: Positive = Field(default=60.0, description="how often the state of a training stage is saved")
    every_steps: Count | None = Field(default=None, description="and after so many steps, if that comes first")


class Params(Section):
    """The whole of params.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seeds: Annotated[list[Natural], Field(min_length=1)]
    dataset: DatasetConfig
    datasets: dict[str, DatasetConfig] = Field(description="by name, others to pretrain on; {}: none")
    model: ModelConfig
    diffusion: DiffusionConfig
    budget: BudgetConfig
    training: TrainingConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    compute: ComputeConfig
    tuning: TuningConfig
    data: DataConfig = DataConfig()
    tracking: TrackingConfig = TrackingConfig()
    saving: SavingConfig = SavingConfig()
    arms: Annotated[dict[str, ArmConfig], Field(min_length=1)]

    @property
    def grid(self) -> Grid:
        """The token grid."""
        return Grid(self.dataset.height // self.model.patch_size, self.dataset.width // self.model.patch_size)

    @property
    def patch_dim(self) -> int:
        """P, the pixels of a patch: p·p·C."""
        return self.model.patch_size**2 * self.dataset.channels

    def image_flops(self, num_visible: int) -> int:
        """FLOPs of training on one image with S visible patches, forward and backward (see `training_flops`)."""
        return training_flops(
            num_visible,
            self.patch_dim,
            self.model.dim,
            self.model.depth,
            int(self.model.dim * self.model.mlp_ratio),
            num_tokens=num_visible + 1 + self.model.class_conditional,
            mlp_time_embed=self.model.mlp_time_embed,
        )

    def arm(self, key: str) -> ArmConfig:
        """The arm of that key.

        Raises:
            ParamsError: there is none.
        """
        if key not in self.arms:
            raise ParamsError(f"there is no arm {key!r} in {PARAMS_FILE}{suggestion(key, list(self.arms))}")
        return self.arms[key]

    def pretrain_of(self, key: str) -> PretrainConfig:
        """The pretraining of an arm; a share of 0 for strategy `none`, which has none.

        Raises:
            ParamsError: there is no such arm, or a value of its own is not possible; also of `finetune_of`.
        """
        arm = self.arm(key)
        own = {"share": 0.0, "dataset": None, "checkpoint": None} if arm.strategy == "none" else arm.pretrain
        splits = not {"share", "steps"}.isdisjoint(own)  # it says itself how its budget is split
        shared = self.pretrain.model_dump(exclude_unset=True, exclude={"share", "steps"} if splits else None)
        return _merged(PretrainConfig, {**shared, **own}, f"arms.{key}.pretrain")

    def finetune_of(self, key: str) -> FinetuneConfig:
        """The finetuning of an arm."""
        own = self.arm(key).finetune
        return _merged(FinetuneConfig, {**self.finetune.model_dump(), **own}, f"arms.{key}.finetune")

    def for_pretraining(self, key: str) -> Params:
        """The params with the dataset that an arm is pretrained on in the place of `dataset`."""
        name = self.pretrain_of(key).dataset
        return self if name is None else self.model_copy(update={"dataset": self.datasets[name]})

    def mask_of(self, key: str) -> Mask:
        """How many patches an arm's pretraining sees."""
        arm = self.arm(key)
        return Mask(arm.strategy, self.for_pretraining(key).grid, arm.mask_rate or 0.0, arm.block_size)

    def architecture(self, num_classes: int) -> dict[str, Any]:
        """What two networks must share so that weights of the one can be put into the other.

        Args:
            num_classes: of the dataset; counts only for a class-conditional network.
        """
        return {
            **self.model.model_dump(),
            "image_size": self.dataset.image_size,
            "channels": self.dataset.channels,
            "num_classes": num_classes if self.model.class_conditional else 0,
            **self.diffusion.model_dump(),
        }

    def checkpoints(self) -> Iterator[tuple[str, str, str]]:
        """The folders of weights that training starts from, each with its dotted path and its arm."""
        for key, arm in self.arms.items():
            if arm.strategy == "none":
                continue
            if checkpoint := self.pretrain_of(key).checkpoint:
                yield f"arms.{key}.pretrain.checkpoint", key, checkpoint
            for trial, values in self.tuning.trials.items():
                if checkpoint := values.get("pretrain.checkpoint"):
                    yield f"tuning.trials.{trial}.pretrain.checkpoint", key, checkpoint

    def missing_files(self) -> list[str]:
        """What params name that is not there, each with where it was looked for; nothing here is read."""
        given = [("dataset.root", self.dataset.root), ("evaluation.weights", self.evaluation.weights)]
        given += [(f"datasets.{name}.root", dataset.root) for name, dataset in self.datasets.items()]
        given += [(key, checkpoint) for key, _, checkpoint in self.checkpoints()]
        return [
            f"{key}: there is no {Path(path).absolute()}"
            for key, path in dict.fromkeys(given)
            if path and not Path(path).exists()
        ]


def validated(content: Any) -> Params:
    """The params of plain values, each section for itself; what they demand of each other `reading` checks.

    Raises:
        ParamsError: one line per mistake.
    """
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise ParamsError("\n".join(_mistake(one, Params) for one in error.errors())) from None


def _merged(model: type[Stage], content: dict[str, Any], where: str) -> Stage:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ParamsError(f"{where}{'.' if first['loc'] else ': '}{_mistake(first, model)}") from None


def _mistake(error: Any, root: type[BaseModel]) -> str:
    """One validation error of pydantic's as one line: where, what, what would be right."""
    loc = [str(part) for part in error["loc"]]
    where = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{suggestion(loc[-1], _sibling_keys(loc, root))}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _sibling_keys(loc: list[str], root: type[BaseModel]) -> list[str]:
    """The keys that the schema knows where `loc` points, starting from `root`."""
    model, is_key = root, False
    for part in loc[:-1]:
        if is_key:  # of an arm or a dataset, whatever its name
            is_key = False
            continue
        annotation = model.model_fields[part].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model, is_key = next(kind for kind in kinds if issubclass(kind, BaseModel)), get_origin(annotation) is dict
    return list(model.model_fields)


def suggestion(word: str, known: list[str]) -> str:
    """The end of a message about a word that is not known: the nearest known one, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(sorted(set(known)))}"
