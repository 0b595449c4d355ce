"""params.yaml: the one schema, used by the commands, by Snakemake and by the tests.

Every knob is declared here, with its default and its meaning; an unknown key, a wrong type or an impossible
combination is a `ParamsError` that says where and what would be right. `reading` opens the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from maskdm.base.checksums import short_hash
from maskdm.base.errors import ParamsError
from maskdm.base.printable import printable
from maskdm.config.flops import Split, split_budget, training_flops
from maskdm.config.geometry import Grid, Strategy, VisibleShape, visible_shape

PARAMS_FILE = Path("params.yaml")
MAX_MISTAKES = 20  # shown at once
ARM_KEY = re.compile(r"[a-z0-9][a-z0-9-]*")

EMBEDDED = ("digits", "swissroll")
HUGGING_FACE = re.compile(r"huggingface:(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?(:[\w.-]+)?")  # owner/name:configuration
SOURCES = (*EMBEDDED, "mnist", "fashion_mnist", "celeba", "lsun", "image_folder")
SPLITS: dict[str, tuple[str, ...]] = dict.fromkeys(("mnist", "fashion_mnist"), ("train", "test", "all"))
SPLITS["celeba"] = ("train", "valid", "test", "all")
CELEBA_CROP = [57, 25, 128]  # top row, left column, side
LSUN_SCENES = (
    *("bedroom", "bridge", "church_outdoor", "classroom", "conference_room", "dining_room", "kitchen"),
    *("living_room", "restaurant", "tower"),
)
LSUN_OBJECTS = (
    *("airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining_table", "dog"),
    *("horse", "motorbike", "person", "potted_plant", "sheep", "sofa", "train", "tv-monitor"),
)
LSUN_CATEGORIES = (*LSUN_SCENES, *LSUN_OBJECTS, "test")  # the test images of all scenes are one database

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
    if source == "cifar10":
        raise ValueError(
            "there is no source cifar10 any more: write huggingface:uoft-cs/cifar10, split train or test, which needs "
            "pip install 'maskdm[datasets]'"
        )
    raise ValueError(
        f"unknown dataset {source!r}{_suggest(source, [*SOURCES])}, or huggingface:NAME for a dataset there"
    )


def _check_lsun_category(split: str | None) -> None:
    """Raises: ValueError, if it is no name of a category, of its database or of that one's folder."""
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
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of params.yaml: immutable, typed strictly, no key that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DatasetConfig(Section):
    """What `prepare` turns into arrays."""

    source: Annotated[str, AfterValidator(_known_source)] = Field(
        description="digits and swissroll are embedded; mnist, fashion_mnist, celeba: downloaded, or their original "
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
        default="center", description="largest centred square; none stretches; celeba: the usual box if not given"
    )
    crop_box: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)] | None = Field(
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
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of limit, fraction and held_out")
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

    @model_validator(mode="before")
    @classmethod
    def _celeba_has_a_usual_crop(cls, content: Any) -> Any:
        """128×128 around row 121, column 89 of the 218×178 images, as every paper on CelebA 64×64 takes it."""
        if isinstance(content, dict) and content.get("source") == "celeba" and "crop" not in content:
            return {**content, "crop": "box", "crop_box": content.get("crop_box", CELEBA_CROP)}
        return content

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

    def training_flops(self, num_visible: int, patch_dim: int) -> int:
        """FLOPs of forward and backward of one image (see `flops.training_flops`).

        Args:
            num_visible: S.
            patch_dim: P.
        """
        return training_flops(
            num_visible,
            patch_dim,
            self.dim,
            self.depth,
            int(self.dim * self.mlp_ratio),
            num_tokens=num_visible + 1 + self.class_conditional,
            mlp_time_embed=self.mlp_time_embed,
        )


class DiffusionConfig(Section):
    """The forward process and what the network predicts."""

    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["epsilon", "x_0", "v"] = "epsilon"

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
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_decay: Literal["constant", "cosine"] = "constant"

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


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
        if (self.strategy == "block") != (self.block_size is not None):
            raise ValueError("block_size (in patches) belongs to strategy block, and strategy block needs it")
        return self


class SamplingConfig(Section):
    """How images are drawn from the EMA weights."""

    sampler: Literal["ddim", "ddpm", "dpmsolver++", "unipc"] = "ddim"
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
        if self.features == "classifier" and self.weights:
            raise ValueError("the classifier is trained on the dataset's labels and takes no weights")
        if self.features == "pixels" and self.weights:
            raise ValueError("features: pixels takes no weights: it compares pixel values")
        if self.weights and self.features.startswith("dinov2"):
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

    seed: Annotated[int, Field(ge=0)] = Field(description="of the trials; not one of `seeds`")
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
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
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
        return self._grid_of(self.dataset)

    def _grid_of(self, dataset: DatasetConfig) -> Grid:
        return Grid(dataset.height // self.model.patch_size, dataset.width // self.model.patch_size)

    @property
    def patch_dim(self) -> int:
        """P, the pixels of a patch: p·p·C."""
        return self.model.patch_size**2 * self.dataset.channels

    def arm(self, key: str) -> ArmConfig:
        """The arm of that key.

        Raises:
            ParamsError: there is none.
        """
        if key not in self.arms:
            raise ParamsError(f"there is no arm {key!r} in {PARAMS_FILE}{_suggest(key, list(self.arms))}")
        return self.arms[key]

    def pretrain_of(self, key: str) -> PretrainConfig:
        """The pretraining of an arm; a share of 0 for strategy `none`, which has none."""
        arm = self.arm(key)
        own = {"share": 0.0, "dataset": None, "checkpoint": None} if arm.strategy == "none" else arm.pretrain
        shared = self.pretrain.model_dump(exclude_unset=True, exclude={"share", "steps"} if _splits(own) else None)
        return PretrainConfig.model_validate({**shared, **own})

    def finetune_of(self, key: str) -> FinetuneConfig:
        """The finetuning of an arm."""
        return FinetuneConfig.model_validate({**self.finetune.model_dump(), **self.arm(key).finetune})

    def visible_of(self, key: str) -> VisibleShape:
        """How many patches an arm's pretraining sees."""
        arm = self.arm(key)
        return visible_shape(arm.strategy, arm.mask_rate or 0.0, self.pretrain_grid_of(key), arm.block_size)

    def realised_mask_rate_of(self, key: str) -> float:
        """The mask rate that an arm's pretraining really has."""
        return self.visible_of(key).realised_mask_rate(self.pretrain_grid_of(key))

    def pretrain_grid_of(self, key: str) -> Grid:
        """The token grid of an arm's pretraining: that of its own dataset, if it names one."""
        return self._grid_of(self.pretrain_dataset_of(key))

    def pretrain_dataset_of(self, key: str) -> DatasetConfig:
        """What an arm is pretrained on."""
        name = self.pretrain_of(key).dataset
        return self.dataset if name is None else self.datasets[name]

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

    def checkpoints(self) -> Iterator[tuple[str, str, str]]:
        """The folders of weights that training starts from, each with its dotted path and its arm."""
        named = {trial: values for trial, values in self.tuning.trials.items() if "pretrain.checkpoint" in values}
        for arm in self.arms:
            if checkpoint := self.pretrain_of(arm).checkpoint:
                yield f"arms.{arm}.pretrain.checkpoint", arm, checkpoint
            for trial, values in named.items():
                if checkpoint := self.with_values(arm, values).pretrain_of(arm).checkpoint:
                    yield f"tuning.trials.{trial}.pretrain.checkpoint", arm, checkpoint

    def for_pretraining(self, key: str) -> Params:
        """The params with the dataset that an arm is pretrained on in the place of `dataset`."""
        return self.model_copy(update={"dataset": self.pretrain_dataset_of(key)})

    def image_flops(self, num_visible: int) -> int:
        """FLOPs of training on one image with S visible patches: forward and backward."""
        return self.model.training_flops(num_visible, self.patch_dim)

    def split_of(self, key: str) -> Split:
        """An arm's budget in steps.

        The budget is the cost of `budget.unmasked_steps` finetuning steps as `finetune` describes them, whatever the
        arm's own batch size is; `budget.match` says what cost means.

        Raises:
            ValueError: the budget is too small for it.
        """
        pretrain, finetune, num_patches = self.pretrain_of(key), self.finetune_of(key), self.grid.num_patches

        def cost(stage: StageConfig, num_visible: int) -> int:
            if self.budget.match == "steps":
                return 1
            return stage.batch_size * (self.image_flops(num_visible) if self.budget.match == "flops" else 1)

        return split_budget(
            self.budget.unmasked_steps * cost(self.finetune, num_patches),
            pretrain.share,
            pretrain.steps,
            cost(pretrain, self.visible_of(key).num_visible),
            cost(finetune, num_patches),
            self.budget.milestones,
        )

    @model_validator(mode="after")
    def _combinations_are_possible(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different numbers, got {self.seeds}")
        self._datasets_fit()
        if self.sampling.num_steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"sampling.num_steps {self.sampling.num_steps} is more than diffusion.num_timesteps "
                f"{self.diffusion.num_timesteps}"
            )
        self._samples_suffice()
        for key in self.arms:
            self._arm_is_possible(key)
        self._trials_are_possible()
        return self

    def _datasets_fit(self) -> None:
        for where, dataset in (("dataset", self.dataset), *((f"datasets.{k}", d) for k, d in self.datasets.items())):
            if dataset.height % self.model.patch_size or dataset.width % self.model.patch_size:
                raise ValueError(
                    f"model.patch_size {self.model.patch_size} does not divide {where}.image_size {dataset.image_size}"
                )
            if dataset.channels != self.dataset.channels:
                raise ValueError(
                    f"{where}.channels {dataset.channels} must be those of dataset, {self.dataset.channels}: "
                    "the same network sees both"
                )
            if where != "dataset" and not ARM_KEY.fullmatch(where.removeprefix("datasets.")):
                raise ValueError(f"{where}: a dataset's name may hold only a-z, 0-9 and '-'")
        if self.evaluation.reference == "held_out" and not self.dataset.held_out:
            raise ValueError("evaluation.reference: held_out needs dataset.held_out, the part of the images held out")

    def _samples_suffice(self) -> None:
        if shortage := self.evaluation.shortage(self.sampling.num_samples, "samples"):
            raise ValueError(f"sampling.num_samples: {shortage}; draw more, or lower kid_subset_size")

    def _arm_is_possible(self, key: str) -> None:
        if not ARM_KEY.fullmatch(key):
            raise ValueError(
                f"arms.{key}: an arm's key may hold only a-z, 0-9 and '-', and not start with '-' "
                "(it names files and stages)"
            )
        for section, model, merge in (
            ("pretrain", PretrainConfig, self.pretrain_of),
            ("finetune", FinetuneConfig, self.finetune_of),
        ):
            try:
                merge(key)
            except ValidationError as error:
                first = error.errors()[0]
                where = f"arms.{key}.{section}" + ("." if first["loc"] else ": ")
                raise ValueError(f"{where}{_message(first, model)}") from None
            self._batch_is_shared_evenly(f"arms.{key}: {section}", merge(key))
        self._pretrain_dataset_is_there(key)
        self._primer_is_comparable(key)
        try:
            self.visible_of(key)
            self.split_of(key)
        except ValueError as error:
            raise ValueError(f"arms.{key}: {error}") from None

    def _primer_is_comparable(self, key: str) -> None:
        there, here = self.pretrain_dataset_of(key).shape, self.dataset.shape
        if self.sampling.primer and there != here:
            raise ValueError(
                f"sampling.primer: arms.{key} is pretrained on images of {there}, which can't be compared with those "
                f"of dataset, {here}"
            )

    def _pretrain_dataset_is_there(self, key: str) -> None:
        named = self.pretrain_of(key).dataset
        if named is not None and named not in self.datasets:
            hint = _suggest(str(named), list(self.datasets)) if self.datasets else ", which is empty"
            raise ValueError(f"arms.{key}: pretrain.dataset {named!r} is no key of `datasets`{hint}")
        if named is not None and self.dataset.held_out and self.dataset.may_share_images_with(self.datasets[named]):
            raise ValueError(
                f"arms.{key}: pretrain.dataset {named!r} may hold images that dataset.held_out keeps from training: "
                "give it another source or root, or classes that `dataset` has not"
            )

    def _batch_is_shared_evenly(self, where: str, stage: StageConfig) -> None:
        """Every device gets as many images, in whole micro-batches."""
        devices, micro = self.compute.devices, stage.micro_batch_size
        if stage.batch_size % devices:
            raise ValueError(f"{where}.batch_size {stage.batch_size} can't be shared by compute.devices {devices}")
        if isinstance(micro, int) and stage.batch_size // devices % micro:
            raise ValueError(
                f"{where}.micro_batch_size {micro} does not divide the {stage.batch_size // devices} images of each "
                f"of compute.devices {devices}"
            )

    def _trials_are_possible(self) -> None:
        tuning = self.tuning
        if tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed {tuning.seed} is one of seeds {self.seeds}: tune on a seed of its own")
        for trial in tuning.trials:
            if not ARM_KEY.fullmatch(trial):
                raise ValueError(f"tuning.trials.{trial}: a trial's name may hold only a-z, 0-9 and '-'")
        possible = {(arm, trial): self._try(arm, trial, v) for trial, v in tuning.trials.items() for arm in self.arms}
        for arm in self.arms:
            tried: dict[str, str] = {}
            for trial in tuning.trials:
                given = possible[arm, trial]
                effective = short_hash(given.pretrain_of(arm), given.finetune_of(arm), given.training)
                if (twin := tried.setdefault(effective, trial)) != trial:
                    raise ValueError(
                        f"tuning.trials: {twin} and {trial} are the same for arm {arm}; every arm must get the same "
                        "number of different trials (an arm without pretraining ignores pretrain.*)"
                    )

    def _try(self, arm: str, trial: str, values: dict[str, Any]) -> Params:
        try:
            return self.for_trial(arm, values)
        except ParamsError as error:
            lines = [f"tuning.trials.{trial}: {line}" for line in str(error).splitlines()]
            if "budget.unmasked_steps" in lines[-1]:
                lines[-1] += f", or raise tuning.budget_fraction (now {self.tuning.budget_fraction:g})"
            raise ValueError("\n".join(lines)) from None

    def with_values(self, arm: str, values: dict[str, Any]) -> Params:
        """These params with a trial's values in the place of an arm's own, and nothing left to tune.

        Args:
            arm: its key.
            values: by dotted path; those of `pretrain` mean nothing to an arm without pretraining.

        Raises:
            ParamsError: a path or a value is not possible.
        """
        content = self.model_dump(mode="json", exclude_unset=True)
        content["tuning"]["trials"] = {}
        own = content["arms"][arm]
        for path, value in values.items():
            section, _, key = path.partition(".")
            if section == "training":
                content["training"][key] = value
            elif section not in ("pretrain", "finetune"):
                raise ParamsError(f"{path}: a trial may change pretrain.*, finetune.* and training.*")
            elif section == "finetune" or self.arm(arm).strategy != "none":
                own.setdefault(section, {})[key] = value
        return parse_params(content, source="")

    def for_trial(self, arm: str, values: dict[str, Any]) -> Params:
        """The params of a trial: its values, on the tuning seed, at its fraction of the budget.

        Raises:
            ParamsError: a path or a value is not possible, or the fraction is too small.
        """
        given, fraction = self.with_values(arm, values), self.tuning.budget_fraction
        content = given.model_dump(mode="json", exclude_unset=True)
        content["arms"] = {arm: content["arms"][arm]}  # the others' budgets are not this trial's
        content["seeds"], content["tuning"]["seed"] = [self.tuning.seed], self.tuning.seed + 1
        content["budget"] |= {
            "unmasked_steps": max(1, round(fraction * self.budget.unmasked_steps)),
            "milestones": [1.0],
        }
        if (steps := given.pretrain_of(arm).steps) is not None:
            content["arms"][arm].setdefault("pretrain", {})["steps"] = max(1, round(fraction * steps))
        return parse_params(content, source="")


def _splits(own: dict[str, Any]) -> bool:
    """Whether an arm says itself how its budget is split."""
    return not {"share", "steps"}.isdisjoint(own)


def parse_params(content: Any, source: str = "params.yaml") -> Params:
    """Validate the content of a params.yaml.

    Raises:
        ParamsError: one line per mistake.
    """
    if not isinstance(content, dict):
        raise ParamsError(f"{source}: expected a mapping of sections, got {type(content).__name__}")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        where = f"{source}: " if source else ""
        lines = [line for e in error.errors() for line in _message(e).splitlines()]
        shown = lines[:MAX_MISTAKES]
        if len(lines) > MAX_MISTAKES:
            shown.append(f"and {len(lines) - MAX_MISTAKES} more mistakes")
        raise ParamsError("\n".join(f"{where}{printable(line)}" for line in shown)) from None


def _message(error: Any, root: type[BaseModel] = Params) -> str:
    """One validation error of pydantic's as one line: where, what, what would be right."""
    loc = [str(part) for part in error["loc"]]
    where = ".".join(loc)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggest(loc[-1], _sibling_keys(loc, root))}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _sibling_keys(loc: list[str], root: type[BaseModel]) -> list[str]:
    """The keys that the schema knows where `loc` points, starting from `root`."""
    model = root
    for part in loc[:-1]:
        if part in model.model_fields:  # else the key of an arm
            annotation = model.model_fields[part].annotation
            model = next(m for m in (annotation, *get_args(annotation)) if _is_model(m))
    return list(model.model_fields)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(sorted(set(known)))}"
