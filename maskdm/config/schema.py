"""Every knob of params.yaml, with its default and its meaning.

An unknown key or a wrong type raises a `ParamsError` that says where it is and what was expected. `reading` opens the
file and checks whether the sections fit each other.
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
SPLITS = {  # and their numbers of images
    "mnist": {"train": 60_000, "test": 10_000, "all": 70_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000, "all": 70_000},
    "svhn": {"train": 73_257, "test": 26_032, "extra": 531_131},
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
LSUN_CATEGORIES = (*LSUN_SCENES, *LSUN_OBJECTS, "test")  # one database has the test images of all scenes

# To add a name, add it here and where it is computed (`maskdm.method`); the strategies of masks are in `geometry`.
Schedule = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "x_0", "v"]
Sampler = Literal["ddim", "ddpm", "dpmsolver++", "unipc"]
# `classifier` is trained on the labels of the dataset, `pixels` are the plain pixel values, the others are networks of
# torch-fidelity.
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
    """Read `2e-4` as a number, as YAML 1.2 and DVC do; PyYAML reads it as a string."""
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
        raise ValueError(f"source {source} was removed: write {FORMER_SOURCES[source]}")
    raise ValueError(
        f"unknown dataset {source!r}{suggestion(source, [*SOURCES])}, or huggingface:NAME for a dataset of its hub"
    )


def _check_lsun_category(split: str | None) -> None:
    """Raise a ValueError unless the split names a category, or the database or folder of one."""
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
    """A section of params.yaml: immutable, strictly typed, without undeclared keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class DatasetConfig(Section):
    """The images, and how `prepare` turns them into arrays."""

    source: Annotated[str, AfterValidator(_known_source)]
    """Where the images come from.

    `digits` and `swissroll` are embedded. `mnist`, `fashion_mnist` and `svhn` are downloaded, unless their original
    files are in `root`. `lsun` reads the databases in `root`, `image_folder` your own images in `root`.
    `huggingface:NAME[:CONFIGURATION]` is a dataset of the Hugging Face hub.
    """
    root: str | None = None
    """The folder of the files, relative to params.yaml; for `image_folder` a folder tree, a .zip or a .tar."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """The part of a named dataset: train (the default), test, …; for `lsun` its category, e.g. church_outdoor."""
    image_size: Annotated[int | list[int], BeforeValidator(_side_or_sides)]
    """The side of the square images in pixels, or [height, width]."""
    channels: Literal[1, 3]
    """1 for grey images, 3 for RGB."""
    crop: Literal["none", "center", "box"] = "center"
    """What is cut out before resizing: `center` the largest centred square, `box` the `crop_box`, `none` nothing (the
    image is stretched)."""
    crop_box: Annotated[list[Natural], Field(min_length=3, max_length=3)] | None = None
    """For crop `box`: top row, left column and side of the square, in pixels."""
    resize_filter: Literal["lanczos", "bicubic"] = "lanczos"
    """The filter for resizing; both are antialiased."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What happens to an image that cannot be decoded: an error, or it is skipped and recorded."""
    max_pixels: Count = 64_000_000
    """An image with more pixels is a bad image: this guards against decompression bombs."""
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    """Use only the images of these classes, by name."""
    limit: Count | None = None
    """Use this many images, drawn at random with `seed`."""
    fraction: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Use this fraction of the images, drawn at random with `seed`."""
    held_out: Fraction = 0.0
    """The fraction of the used images that is never trained on, drawn at random with `seed`."""
    seed: Natural = 0
    """The seed of `limit`, `fraction` and `held_out`."""
    shard_images: Count = 8192
    """Images per array file."""

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
        """Whether both may contain the same images: they have the same source and no disjoint classes."""
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
            raise ValueError(
                f"source {self.source} has no split: select images with fraction, limit, classes or held_out"
            )
        if self.split is not None and self.split not in SPLITS.get(self.source, (self.split,)):
            known = ", ".join(SPLITS[self.source])
            raise ValueError(f"source {self.source} has no split {self.split!r}; expected one of {known}")
        if self.source == "lsun":
            _check_lsun_category(self.split)
        return self

    @model_validator(mode="after")
    def _images_can_be_made(self) -> Self:
        if (self.crop == "box") != (self.crop_box is not None):
            raise ValueError("crop: box and crop_box (top row, left column, side) need each other: give both or none")
        if self.crop == "box" and self.height != self.width:
            raise ValueError(f"crop: box cuts a square, but image_size is {self.image_size}: use center or none")
        if self.crop_box is not None and self.crop_box[2] < 1:
            raise ValueError(f"crop_box {self.crop_box}: its side is {self.crop_box[2]}; expected 1 or more")
        if self.limit is not None and self.fraction is not None:
            raise ValueError(f"give limit ({self.limit}) or fraction ({self.fraction:g}), not both")
        if self.source == "swissroll" and self.shape != (1, 2, 1):
            raise ValueError("the points (x, y) of swissroll are images of image_size: [1, 2] with channels: 1")
        return self


class ModelConfig(Section):
    """The architecture of the U-ViT."""

    patch_size: Count
    """The side p of a patch in pixels."""
    dim: Count
    """The width D of the tokens."""
    depth: Count
    """The number of transformer blocks, odd: (depth−1)/2 before the middle one, as many after it."""
    num_heads: Count
    """The number of attention heads; it divides `dim`."""
    mlp_ratio: Positive = 4.0
    """The hidden width of a block's MLP, as a multiple of `dim`."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    mlp_time_embed: bool = False
    """Whether an MLP processes the sinusoidal time embedding."""
    class_conditional: bool = False
    """Whether a class token is added beside the time token."""

    @model_validator(mode="after")
    def _dims_fit(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide dim {self.dim}")
        if self.dim % 2:
            raise ValueError(f"dim {self.dim} is odd; the time embedding needs pairs of sine and cosine")
        if self.depth % 2 == 0:
            raise ValueError(f"depth {self.depth} is even; U-ViT's long skips pair the blocks around a middle one")
        return self


class DiffusionConfig(Section):
    """The forward process, and what the network predicts."""

    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    """The number T of discrete time steps."""
    schedule: Schedule = "linear"
    """The noise schedule."""
    prediction: Prediction = "epsilon"
    """What the network predicts: the noise (`epsilon`), the clean image (`x_0`) or the velocity (`v`)."""

    @model_validator(mode="after")
    def _schedule_keeps_signal(self) -> Self:
        if self.schedule == "linear" and self.num_timesteps <= 20:
            raise ValueError(
                f"num_timesteps {self.num_timesteps} is too few for schedule linear: its last variance would be 1; "
                "use at least 21, or cosine"
            )
        return self


class BudgetConfig(Section):
    """What every arm may spend on pretraining and finetuning together."""

    match: Literal["flops", "images", "steps"] = "flops"
    """What all arms spend equally much of."""
    unmasked_steps: Count
    """The budget: the cost of this many unmasked finetuning steps."""
    milestones: Annotated[list[Number], Field(min_length=1), AfterValidator(_increasing_to_one)] = [0.5, 1.0]
    """The fractions of the budget at which weights are kept, sampled and scored."""


class TrainingConfig(Section):
    """What pretraining and finetuning have in common."""

    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.99, 0.99]
    """The two betas of AdamW."""
    weight_decay: NonNegative = 0.03
    """The weight decay of AdamW."""
    decay: Literal["all", "weights"] = "all"
    """Which parameters decay: `all`, or only `weights` (no biases, norms and embeddings)."""
    ema_decay: Fraction = 0.999
    """The decay of the exponential moving average of the weights."""
    grad_clip: Positive | None = None
    """The largest norm of the gradient; None does not clip."""
    flip: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """The probability of a left-right flip of a training image."""
    log_every: Count = 100
    """Steps between two rows of the training curve."""


class StageConfig(Section):
    """How one training stage is optimised."""

    lr: Positive
    """The learning rate after the warm-up."""
    batch_size: Count
    """Images per step, over all devices."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Accumulate gradients over chunks of this many images; `auto`: the largest that fits in memory."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises linearly."""
    lr_decay: Literal["constant", "cosine"] = "constant"
    """How the learning rate changes after the warm-up."""

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self


Stage = TypeVar("Stage", bound=StageConfig)


class PretrainConfig(StageConfig):
    """Masked pretraining."""

    share: Fraction = 0.3
    """The fraction of the budget that is spent on pretraining."""
    steps: Count | None = None
    """This many pretraining steps, instead of a share of the budget."""
    dataset: str | None = None
    """A key of `datasets`: pretrain on it instead of `dataset`."""
    checkpoint: str | None = None
    """Start from the weights in a folder of `maskdm import-checkpoint` or `maskdm export`."""

    @model_validator(mode="after")
    def _share_or_steps(self) -> Self:
        if self.steps is not None and "share" in self.model_fields_set:
            raise ValueError(f"give share ({self.share}) or steps ({self.steps}), not both")
        return self


class FinetuneConfig(StageConfig):
    """Unmasked finetuning."""

    init_from: Literal["ema", "raw"] = "ema"
    """The pretrained weights to start from: averaged (`ema`) or `raw`."""


class ArmConfig(Section):
    """One cell of the ablation."""

    strategy: Strategy
    """How masks are drawn: uniformly (`patch`), in blocks (`block`), one window stays visible (`crop`); `none` does not
    pretrain."""
    mask_rate: Fraction | None = None
    """The fraction of patches that is masked, the paper's m."""
    block_size: Count | None = None
    """The side of a block in patches, for strategy `block`."""
    pretrain: dict[str, Any] = {}
    """Values that differ from the section `pretrain` for this arm."""
    finetune: dict[str, Any] = {}
    """Values that differ from the section `finetune` for this arm."""

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
    """How images are drawn from the averaged weights."""

    sampler: Sampler = "ddim"
    """The sampler."""
    num_steps: Count = 50
    """Network evaluations per image."""
    eta: NonNegative = 0.0
    """For `ddim`: 0 is deterministic, 1 has the variance of ddpm."""
    num_samples: Count = 1000
    """Images that are drawn and scored at each milestone."""
    batch_size: Count = 250
    """Images that are drawn at once."""
    clip_x_0: bool = True
    """Whether every estimate of the clean image is clipped to [−1, 1]."""
    grid_images: Count = 64
    """Images in the PNG grid."""
    primer: bool = False
    """Whether images are also drawn from the pretrained weights, before any finetuning."""


class EvaluationConfig(Section):
    """How samples are scored."""

    features: Extractor = "classifier"
    """The feature extractor: `classifier` is trained on the labels of the dataset, `pixels` takes the pixel values, the
    others are pretrained networks of torch-fidelity."""
    weights: str | None = None
    """A local file with the weights of a pretrained extractor; None downloads them."""
    reference: Literal["train", "held_out", "all"] = "train"
    """The real images that samples are compared with."""
    batch_size: Count = 256
    """Images per batch of the extractor."""
    kid_subsets: Count = 100
    """The number of random subsets that KID is averaged over."""
    kid_subset_size: Annotated[int, Field(ge=2)] = 500
    """Images per subset of KID."""
    prc_neighborhood: Count = 3
    """The k of the k-nearest-neighbour balls of precision and recall."""
    classifier_epochs: Count = 20
    """Epochs that the classifier is trained for."""

    def shortage(self, count: int, what: str) -> str | None:
        """What to tell people if there are fewer images than the metrics need.

        Args:
            count: how many there are.
            what: what they are: samples, or real images.

        Returns:
            one line; None if there are enough.
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
                f"{self.features} takes no local weights: remove weights, and copy the folder of torch.hub if this "
                "machine has no network"
            )
        return self


class ComputeConfig(Section):
    """The machine: results are byte-identical only for equal values here, on the same machine.

    Results depend on `device` and `precision`. All other values change rounding at most: changing them reruns nothing,
    and each record says which values its run had. On a GPU, runs are equal up to rounding only, because the backward
    pass of attention adds up in an arbitrary order.
    """

    device: Literal["auto", "cpu", "cuda"]
    """Where stages compute; `auto`: on a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"]
    """The precision of matrix products; `auto`: bf16 if the device computes it fast."""
    attention: Literal["auto", "plain", "fused"] = "auto"
    """How attention is computed: `plain` by matrix products and a softmax, `fused` by PyTorch's kernel."""
    compile: Literal["auto", "off", "default", "reduce-overhead"] = "auto"
    """The mode of torch.compile; `auto`: default on a GPU, off on a CPU; `reduce-overhead` uses CUDA graphs."""
    activation_checkpointing: bool = False
    """Whether the blocks' activations are recomputed in the backward pass instead of kept in memory."""
    devices: Count = 1
    """The number of processes that share a batch, one per device."""
    threads: Count = 1
    """CPU threads of a stage; Snakemake reserves as many cores."""


class TuningConfig(Section):
    """Every arm tries the same trials at the same compute, then runs with the values of its best trial."""

    seed: Natural
    """The seed of the trials; it is not one of `seeds`."""
    budget_fraction: Annotated[Number, Field(gt=0, le=1)]
    """The fraction of the budget that each trial spends."""
    metric: Literal["kid", "fid"] = "kid"
    """The trial with the lowest value of this metric is chosen."""
    trials: dict[str, dict[str, Any]]
    """By name, the values that each trial overrides, by dotted path: pretrain.*, finetune.*, training.*.

    With {} nothing is tuned, and every arm runs with the values as given.
    """

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

    device_resident: Literal["auto"] | bool = "auto"
    """Whether the uint8 images stay on the GPU; `auto`: if they take at most a quarter of its memory."""


class TrackingConfig(Section):
    """MLflow; nothing here changes a result."""

    enabled: bool = True
    """Whether runs are tracked."""


class SavingConfig(Section):
    """Resumable training state; nothing here changes a result."""

    every_seconds: Positive = 60.0
    """Seconds between two saves of the state of a training stage."""
    every_steps: Count | None = None
    """Also save after this many steps, if that comes first."""


class Params(Section):
    """The whole of params.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """The name of the experiment."""
    seeds: Annotated[list[Natural], Field(min_length=1)]
    """Every arm runs once with each of these seeds."""
    dataset: DatasetConfig
    """The images that arms are finetuned on and compared with; also pretrained on, unless `pretrain.dataset` is set."""
    datasets: dict[str, DatasetConfig]
    """Other datasets to pretrain on, by name; {} if there are none."""
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
    """The arms that are compared, by key."""

    @property
    def grid(self) -> Grid:
        """The token grid."""
        return Grid(self.dataset.height // self.model.patch_size, self.dataset.width // self.model.patch_size)

    @property
    def patch_dim(self) -> int:
        """P = p·p·C, the number of values in a patch."""
        return self.model.patch_size**2 * self.dataset.channels

    def image_flops(self, num_visible: int) -> int:
        """FLOPs of forward and backward for one image with S visible patches (see `training_flops`)."""
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
        """The arm with this key.

        Raises:
            ParamsError: there is no such arm.
        """
        if key not in self.arms:
            raise ParamsError(f"there is no arm {key!r} in {PARAMS_FILE}{suggestion(key, list(self.arms))}")
        return self.arms[key]

    def pretrain_of(self, key: str) -> PretrainConfig:
        """The pretraining of an arm; strategy `none` does not pretrain and has a share of 0.

        Raises:
            ParamsError: there is no such arm, or one of its own values is not valid. `finetune_of` raises the same.
        """
        arm = self.arm(key)
        own = {"share": 0.0, "dataset": None, "checkpoint": None} if arm.strategy == "none" else arm.pretrain
        splits = not {"share", "steps"}.isdisjoint(own)  # the arm itself says how its budget is split
        shared = self.pretrain.model_dump(exclude_unset=True, exclude={"share", "steps"} if splits else None)
        return _merged(PretrainConfig, {**shared, **own}, f"arms.{key}.pretrain")

    def finetune_of(self, key: str) -> FinetuneConfig:
        """The finetuning of an arm."""
        own = self.arm(key).finetune
        return _merged(FinetuneConfig, {**self.finetune.model_dump(), **own}, f"arms.{key}.finetune")

    def for_pretraining(self, key: str) -> Params:
        """The params whose `dataset` is the one that an arm is pretrained on."""
        name = self.pretrain_of(key).dataset
        return self if name is None else self.model_copy(update={"dataset": self.datasets[name]})

    def mask_of(self, key: str) -> Mask:
        """The mask of an arm's pretraining."""
        arm = self.arm(key)
        return Mask(arm.strategy, self.for_pretraining(key).grid, arm.mask_rate or 0.0, arm.block_size)

    def architecture(self, num_classes: int) -> dict[str, Any]:
        """The values that two networks must share to be able to exchange weights.

        Args:
            num_classes: number of classes of the dataset; ignored unless the network is class-conditional.
        """
        return {
            **self.model.model_dump(),
            "image_size": self.dataset.image_size,
            "channels": self.dataset.channels,
            "num_classes": num_classes if self.model.class_conditional else 0,
            **self.diffusion.model_dump(),
        }

    def checkpoints(self) -> Iterator[tuple[str, str, str]]:
        """The folders of weights that training starts from, as (dotted path of the key, arm, folder)."""
        for key, arm in self.arms.items():
            if arm.strategy == "none":
                continue
            if checkpoint := self.pretrain_of(key).checkpoint:
                yield f"arms.{key}.pretrain.checkpoint", key, checkpoint
            for trial, values in self.tuning.trials.items():
                if checkpoint := values.get("pretrain.checkpoint"):
                    yield f"tuning.trials.{trial}.pretrain.checkpoint", key, checkpoint

    def missing_files(self) -> list[str]:
        """A line for every file or folder that the params name and that does not exist; nothing is read."""
        given = [("dataset.root", self.dataset.root), ("evaluation.weights", self.evaluation.weights)]
        given += [(f"datasets.{name}.root", dataset.root) for name, dataset in self.datasets.items()]
        given += [(key, checkpoint) for key, _, checkpoint in self.checkpoints()]
        return [
            f"{key}: there is no {Path(path).absolute()}"
            for key, path in dict.fromkeys(given)
            if path and not Path(path).exists()
        ]


def validated(content: Any) -> Params:
    """Validate every section on its own; `reading` checks whether they fit each other.

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
    """A validation error of pydantic as one line: where it is, what is wrong, what was expected and got."""
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
    """The keys that the schema has beside the one at `loc`, starting from `root`."""
    model, is_key = root, False
    for part in loc[:-1]:
        if is_key:  # the free name of an arm or a dataset
            is_key = False
            continue
        annotation = model.model_fields[part].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model, is_key = next(kind for kind in kinds if issubclass(kind, BaseModel)), get_origin(annotation) is dict
    return list(model.model_fields)


def suggestion(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: the most similar known word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of: {', '.join(sorted(set(known)))}"
