"""`maskdm plan`: what every stage would do and cost, before anything runs.

Steps and FLOPs come from `config.runs`; memory and disk are closed forms. Times on this machine come from a few seconds
of real work on random data, times on GPUs from their datasheets. Importing this module does not import torch.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, wraps
from importlib import metadata
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from pydantic import NonNegativeFloat, TypeAdapter, ValidationError

from maskdm.base.checksums import short_hash
from maskdm.base.errors import UserError
from maskdm.base.machine import cpu_name
from maskdm.base.publishing import replace_file
from maskdm.base.units import duration, flops, size
from maskdm.config import Params, Run, Training, paths, resolve
from maskdm.config.image_counts import most_real

if TYPE_CHECKING:
    from pathlib import Path

    from maskdm.method.backbones.uvit import UViT
    from maskdm.training.devices import Compute

# Dense FLOP/s without sparsity: bfloat16 with float32 accumulation, and float32 matrix products (this code runs them as
# TF32 if the GPU can).
# Source: NVIDIA's datasheets of the V100 SXM2, A100 SXM, H100 SXM and H200 SXM.
GPUS = {
    "V100": {"fp32": 15.7e12},
    "A100": {"fp32": 156e12, "bf16": 312e12},
    "H100": {"fp32": 494.7e12, "bf16": 989e12},
    "H200": {"fp32": 494.7e12, "bf16": 989e12},
}
DEFAULT_UTILISATION = 0.4


class Gpus(NamedTuple):
    """The GPUs that times are given for.

    Attributes:
        names: keys of `GPUS`.
        precision: "bf16" or "fp32".
        utilisation: the assumed fraction of the datasheet's rate.
    """

    names: tuple[str, ...]
    precision: str
    utilisation: float = DEFAULT_UTILISATION

    def rate(self, name: str) -> float:
        """The datasheet's FLOP/s for products in this precision."""
        return GPUS[name].get(self.precision, GPUS[name]["fp32"])

    def seconds(self, name: str, num_flops: float) -> float:
        """How long this many FLOPs take."""
        return num_flops / (self.rate(name) * self.utilisation)


def run(
    params: Params,
    gpus: Sequence[str] = (),
    utilisation: float = DEFAULT_UTILISATION,
    calibrate: bool = True,
    recalibrate: bool = False,
) -> str:
    """Plan an experiment, and return the text to print.

    Args:
        params: the experiment.
        gpus: the names of GPUs to give times for; all known ones if empty.
        utilisation: the assumed fraction of their rate, in (0, 1].
        calibrate: whether to measure this machine.
        recalibrate: whether to repeat measurements that were kept.
    """
    compute, missing = resolve_compute(params)
    machine = Machine(params, compute, recalibrate) if calibrate and not missing else None
    precision = "fp32" if params.compute.precision == "fp32" else "bf16"
    known, plan = Gpus(tuple(gpus) or tuple(GPUS), precision, utilisation), Plan(params, compute, machine)
    texts = [format_table(plan, known), _wrapped(words(plan, known, missing)), _wrapped(warnings(plan, known), "! ")]
    if machine is not None:
        machine.save()
    return "\n\n".join(texts).rstrip()


def resolve_compute(params: Params) -> tuple[Compute, str | None]:
    """Where stages would compute on this machine, and why that is not possible (then it is the CPU)."""
    from maskdm.training import devices

    config = params.compute.model_copy(update={"threads": min(params.compute.threads, num_cores())})
    try:
        return devices.resolve(config), None
    except UserError as error:
        return devices.resolve(config.model_copy(update={"device": "cpu"})), str(error)


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- times on this machine: measured once, and kept -------------------------------------------------------------------

KEPT = paths.WORK / "calibration.json"
MIN_SECONDS = 0.5  # of the repetitions of one measurement
# Work of more FLOPs is measured on fewer images, then on fewer patches, and scaled by its FLOPs. This is about a second
# on two cores with bfloat16, and enough to fill a GPU.
MAX_FLOPS = {"cpu": 2e11, "cuda": 2e13}
MIN_UNCERTAINTY = 0.2
NUM_CLASSES = 10  # of networks before the data are known; their number does not change the time
MAX_SCORED = 1000  # rows of features on which the metrics are measured, unless KID's subsets are larger
MAX_FEATURES = 512  # per image; the metrics of more take too long to be measured


class Measurement(NamedTuple):
    """Seconds of a unit of work.

    Attributes:
        seconds: the median of the repetitions.
        spread: half their interquartile range, as a fraction of the median.
        day: when they were measured.
    """

    seconds: NonNegativeFloat
    spread: NonNegativeFloat
    day: str


Piece = tuple[Callable[[], object], float]  # the work to time, and how many units it does
FILE = TypeAdapter(dict[str, Measurement])  # the key is a hash of everything that the measurement depends on


def measured(piece: Callable[..., Piece]) -> Callable[..., float]:
    """Turn a method that prepares work into one that returns the seconds of a unit of it."""
    return wraps(piece)(lambda machine, *arguments: machine.seconds(piece, *arguments))


class Machine:
    """Seconds of real pieces of work on this machine; each is measured when it is first needed.

    Args:
        params: the experiment.
        compute: device, threads and precision, as stages resolve them.
        forget: whether to repeat measurements that were kept.
    """

    def __init__(self, params: Params, compute: Compute, forget: bool = False) -> None:
        self.params, self.compute = params, compute
        pretraining = [params.for_pretraining(arm) for arm in params.arms]
        self._largest = max([params, *pretraining], key=lambda p: p.grid.num_patches)
        self._max_flops = MAX_FLOPS.get(compute.device.type, MAX_FLOPS["cpu"])
        self._used: list[Measurement] = []
        self._is_announced = False
        try:
            self._kept = {} if forget else FILE.validate_json(KEPT.read_bytes())
        except (OSError, ValidationError):  # missing or damaged
            self._kept = {}

    @measured
    def step(self, num_images: int, num_visible: int) -> Piece:
        """One image of a training step of `num_images` with S visible patches; loading images is not included."""
        import torch

        from maskdm.method.diffusion import Diffusion, draw_step, masked_dsm_loss
        from maskdm.method.masks import Masking
        from maskdm.training.optimizer import Ema, clip_gradients, make_optimizer

        params, device, model = self._largest, self.compute.device, self._model
        training, config, (height, width, channels) = params.training, params.diffusion, params.dataset.shape
        part, visible = self._affordable(num_images, num_visible)
        rate = 1 - visible / params.grid.num_patches
        masking = Masking("patch" if rate else "none", params.grid, rate)  # the time to draw masks is negligible
        diffusion = Diffusion(config.num_timesteps, config.schedule, config.prediction, device)
        generator = torch.Generator(device).manual_seed(0)
        optimizer, ema = make_optimizer(model, training, 1e-9), Ema(model, training.ema_decay)
        x_0 = torch.rand(part, channels, height, width, device=device)
        labels = torch.zeros(part, dtype=torch.int64, device=device)

        def run() -> None:
            draws = draw_step(part, params.patch_dim, masking, config.num_timesteps, training.flip, generator)
            with self.compute.context():
                masked_dsm_loss(model, diffusion, x_0, draws, params.model.patch_size, labels).backward()
            clip_gradients(model.parameters(), training.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(0)

        return run, part * params.image_flops(visible) / params.image_flops(num_visible)

    @measured
    def draw(self, batch_size: int) -> Piece:
        """One image in one sampling step of a batch."""
        from maskdm.models.drawing import draw_images

        compute, few = replace(self.compute, compile_mode=None), min(2, self.params.sampling.num_steps)
        part = max(1, min(batch_size, int(self._max_flops / forward_flops(self.params))))
        config = self.params.sampling.model_copy(update={"num_steps": few, "batch_size": part})
        params = self.params.model_copy(update={"sampling": config})

        def run() -> None:
            with redirect_stderr(io.StringIO()):  # hides the progress display
                draw_images(params, self._model, NUM_CLASSES, 0, part, compute, "")

        return run, part * few

    @measured
    def classifier(self) -> Piece:
        """One image in one epoch of training the classifier."""
        import numpy as np

        from maskdm.scoring.classifier import train_classifier

        num_images, num_epochs = 80, 4  # a batch of 64; a fifth of the images is held out
        images = np.random.default_rng(0).integers(256, size=(num_images, *self.params.dataset.shape), dtype=np.uint8)
        labels = np.arange(num_images) % NUM_CLASSES

        def run() -> None:
            with redirect_stderr(io.StringIO()):
                train_classifier(images, labels, NUM_CLASSES, num_epochs)

        return run, num_images * num_epochs

    @measured
    def metrics(self, num_samples: int, num_real: int) -> Piece:
        """FID, KID, precision and recall, measured on fewer samples and scaled."""
        import numpy as np

        from maskdm.scoring.scores import Reference, compute_metrics

        config, features = self.params.evaluation, num_features(self.params)
        n, m = (max(config.kid_subset_size, min(number, MAX_SCORED)) for number in (num_samples, num_real))
        rows = np.random.default_rng(0).random((n + m, features or 1), np.float32)
        real = Reference.of(rows[n:], config.prc_neighborhood)
        return lambda: compute_metrics(rows[:n], real, config), n / num_samples

    @property
    def uncertainty(self) -> float:
        """The approximate relative error of the times."""
        return max([MIN_UNCERTAINTY, *(m.spread for m in self._used)])

    @property
    def title(self) -> str:
        """The machine, and the day of the oldest measurement in use."""
        import torch

        threads = f"{self.compute.threads} thread" + ("s" if self.compute.threads > 1 else "")
        name = f"{cpu_name()}, {threads} on {os.cpu_count()} cores"
        if self.compute.device.type == "cuda":
            name = torch.cuda.get_device_name(self.compute.device)
        return f"This machine ({name}): from a few seconds measured on {min(m.day for m in self._used)}"

    def save(self) -> None:
        """Keep the measurements; if they cannot be written, the next plan measures again."""
        try:
            with replace_file(KEPT) as building:
                building.write_bytes(FILE.dump_json(self._kept, indent=2))
        except UserError as error:
            print(f"the measurements are not kept: {error}", file=sys.stderr)

    def seconds(self, piece: Callable[..., Piece], *arguments: int) -> float:
        """Seconds of a unit of a piece of work, as it was kept, or measured now."""
        params = self.params
        key = short_hash(
            [cpu_name(), os.cpu_count(), metadata.version("torch"), self.compute.describe()],
            *(params.compute, params.model, params.diffusion, params.training, params.evaluation),
            [params.sampling.sampler, params.dataset.shape, self._largest.dataset.shape],
            [piece.__name__, *arguments],
        )
        if key not in self._kept:
            if not self._is_announced:
                print("measuring this machine, once: a few seconds of real work …", file=sys.stderr, flush=True)
            self._is_announced = True
            self._kept[key] = self._measure(*piece(self, *arguments))
        self._used.append(self._kept[key])
        return self._kept[key].seconds

    def _measure(self, run: Callable[[], object], num_units: float) -> Measurement:
        """Time repeated calls after an untimed one."""
        from torch.utils.benchmark import Timer

        timer = Timer("run()", globals={"run": run}, num_threads=self.compute.threads)  # waits for the GPU
        found = timer.blocked_autorange(min_run_time=MIN_SECONDS)
        day = datetime.now(UTC).date().isoformat()
        return Measurement(found.median / num_units, found.iqr / 2 / found.median, day)

    @cached_property
    def _model(self) -> UViT:
        from maskdm.method.backbones import build_model

        return build_model(self._largest, NUM_CLASSES).to(self.compute.device)

    def _affordable(self, num_images: int, num_visible: int) -> tuple[int, int]:
        """At most this many images and visible patches, reduced so that a step costs at most `MAX_FLOPS`."""
        while num_visible > 1 and self.params.image_flops(num_visible) > self._max_flops:
            num_visible //= 2
        return max(1, min(num_images, int(self._max_flops / self.params.image_flops(num_visible)))), num_visible


def num_features(params: Params) -> int | None:
    """The number of features per image; None if scoring with this extractor is not measured."""
    known = {"classifier": 64, "pixels": math.prod(params.dataset.shape)}.get(params.evaluation.features)
    return known if known is not None and known <= MAX_FEATURES else None


# --- what every stage costs -------------------------------------------------------------------------------------------

FLOAT32, BFLOAT16 = 4, 2  # bytes
SETS_KEPT = 2  # sets of weights in a checkpoint: raw and averaged
SETS_TO_RESUME = 4  # sets in a resumable state: these and AdamW's two moments
# The resident size of a stage with a tiny network: Python, PyTorch's libraries and buffers of their kernels, measured
# on Linux with the CPU build of torch 2.13. With a GPU this is memory of the host, which is not counted here.
PROCESS_BYTES = {"cpu": 0.40 * 2**30}
SAMPLER_ARRAYS = 5  # float32 arrays of the size of a batch: x_t, the prediction, x_0, the direction, a product


def forward_flops(params: Params) -> float:
    """FLOPs of one evaluation of the network on one unmasked image.

    Training costs three times as much, except in the first layers, whose inputs need no gradient.
    """
    model, num_patches = params.model, params.grid.num_patches
    first = num_patches * params.patch_dim * model.dim + (4 * model.dim**2 if model.mlp_time_embed else 0)
    return (params.image_flops(num_patches) + 2 * first) / 3


def activation_bytes(params: Params, compute: Compute, num_visible: int, trains: bool) -> float:
    """Bytes that the network holds per image at its peak.

    In training, every block keeps for its backward pass: the inputs of its norms in float32, and in the precision of
    products the inputs of its linear layers, queries, keys, values, the input of GELU, and the attention weights if
    plain products compute them. With activation checkpointing it is the inputs of all blocks, and two whole blocks.
    Without a backward pass it is the long skips, and one block at its widest.
    """
    from maskdm.method.backbones.uvit import uses_plain_attention

    model, width = params.model, BFLOAT16 if compute.autocast else FLOAT32
    tokens, hidden = num_visible + 1 + model.class_conditional, int(model.dim * model.mlp_ratio)
    is_plain = uses_plain_attention(params.compute.attention, compute.device.type, compute.dtype, tokens)
    weights = model.num_heads * tokens if is_plain else 0
    block = 2 * FLOAT32 * model.dim + width * (6 * model.dim + 2 * hidden + weights)
    skip, ends = 2 * width * model.dim, (FLOAT32 + width) * model.dim + 4 * FLOAT32 * params.patch_dim
    if not trains:
        widest = width * max(2 * hidden, 6 * model.dim + 2 * weights)
        return tokens * ((model.depth // 2 + 2) * FLOAT32 * model.dim + widest)
    if params.compute.activation_checkpointing:
        return tokens * (model.depth * FLOAT32 * model.dim + 2 * block + skip + ends)
    return tokens * (model.depth * block + model.depth // 2 * skip + ends)


class Row(NamedTuple):
    """A line of the table: a stage, or a sum.

    Attributes:
        name: the name of the line.
        cells: visible patches, mask rate, GFLOP per step, steps × batch: the columns that are not summed.
        flops: FLOPs of the network.
        memory: bytes on the device at the peak.
        disk: bytes of the outputs.
        seconds: the time on this machine; None if it is not known.
    """

    name: str
    cells: tuple[str, ...] = ("", "", "", "")
    flops: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    seconds: float | None = None


def total(name: str, rows: Sequence[Row], times: int = 1) -> Row:
    """Rows one after the other, repeated `times`: the largest memory, the sum of everything else that is known."""
    known = [row.seconds for row in rows if row.seconds is not None]
    num_flops, disk = (times * sum(numbers) for numbers in zip(*((row.flops, row.disk) for row in rows), strict=True))
    memory, seconds = max(row.memory for row in rows), times * sum(known) if known else None
    return Row(name, flops=num_flops, memory=memory, disk=disk, seconds=seconds)


class Plan:
    """What the stages of an experiment do and cost.

    Args:
        params: the experiment.
        compute: the device that memory is estimated for.
        machine: gives times on this machine; None leaves them out.

    Attributes:
        runs: the run of every arm with the first seed.
        arms: the rows of the stages of every arm.
        seeds: the sum over all arms and seeds.
        shared: the rows of the stages that all arms share.
    """

    def __init__(self, params: Params, compute: Compute, machine: Machine | None = None) -> None:
        self.params, self.compute, self.machine = params, compute, machine
        self._num_parameters: dict[tuple[int, ...], int] = {}
        self.runs = {arm: resolve(params, arm, params.seeds[0]) for arm in params.arms}
        self.arms = {arm: list(self._stages(run)) for arm, run in self.runs.items()}
        self.seeds = total("all arms, seeds", list(chain(*self.arms.values())), len(params.seeds))
        self.shared = [self._features(), self._scale(), *([self._tuning()] if params.tuning.enabled else [])]

    @property
    def resumable(self) -> float:
        """Bytes on disk of a running training stage: a state, the one that replaces it, and milestones."""
        sets = 2 * SETS_TO_RESUME + SETS_KEPT * len(self.params.budget.milestones)
        return sets * self._weights(self.params)

    def micro_batch_of(self, stage: Training) -> int:
        """Images per rank that enter the network at once; for `auto` on a GPU, as many as fit by this estimate."""
        own, given = stage.batch_size // self.params.compute.devices, stage.config.micro_batch_size
        if given != "auto":
            return min(given or own, own)
        sizes = [n for n in range(own, 0, -1) if own % n == 0] if self.compute.device.type == "cuda" else [own]
        return next((n for n in sizes if self._training_memory(stage, n) <= total_memory(self.compute)), sizes[-1])

    def image_seconds(self, stage: Training, machine: Machine) -> float:
        """Seconds of one image in a training step."""
        return machine.step(self.micro_batch_of(stage), stage.num_visible)

    @cached_property
    def num_images(self) -> tuple[int, int] | None:
        """The numbers of all images and of those that samples are compared with; None if params do not tell them."""
        held_out, num_real = self.params.dataset.held_out, most_real(self.params)
        share = {"train": 1 - held_out, "held_out": held_out, "all": 1.0}[self.params.evaluation.reference]
        return None if num_real is None else (round(num_real / share), num_real)

    def _stages(self, run: Run) -> Iterator[Row]:
        """The stages of an arm; without pretraining steps, `pretrain` only saves the initialisation and has no row."""
        num_milestones, has_pretraining = len(run.milestones), run.pretrain.num_steps > 0
        if has_pretraining:
            yield self._trained(run.pretrain, 1)
        yield self._trained(run.finetune, num_milestones + (not has_pretraining))
        drawn = num_milestones + run.has_primer * (1 + (run.pretrain.num_visible == 1))
        yield self._sampled(drawn)
        num_samples = self.params.sampling.num_samples
        yield Row("evaluate", self._batches(num_samples, drawn), seconds=self._scored(drawn * num_samples, drawn))

    def _trained(self, stage: Training, num_checkpoints: int) -> Row:
        micro = self.micro_batch_of(stage)
        batch = f"{stage.batch_size}" + (f" (by {micro})" if micro != stage.batch_size else "")
        masking, seconds = (str(stage.num_visible), f"{stage.realised_mask_rate:.3g}"), None
        if self.machine is not None:
            seconds = stage.num_steps * stage.batch_size * self.image_seconds(stage, self.machine)
        return Row(
            stage.stage,
            (*masking, _gflop(stage.flops_per_step), f"{stage.num_steps:,} × {batch}"),
            flops=stage.flops,
            memory=self._training_memory(stage, micro),
            disk=num_checkpoints * SETS_KEPT * self._weights(stage.params),
            seconds=seconds,
        )

    def _sampled(self, times: int) -> Row:
        params, config, num_patches = self.params, self.params.sampling, self.params.grid.num_patches
        batch, num_evaluated = min(config.batch_size, config.num_samples), times * config.num_steps * config.num_samples
        num_steps = times * config.num_steps * math.ceil(config.num_samples / batch)
        per_step = num_evaluated / num_steps * forward_flops(params)  # the last batch may be smaller
        return Row(
            "sample",
            (str(num_patches), "0", _gflop(per_step), f"{num_steps:,} × {batch}"),
            flops=num_steps * per_step,
            memory=self._sampling_memory(batch),
            disk=times * config.num_samples * math.prod(params.dataset.shape),
            seconds=num_evaluated * self.machine.draw(batch) if self.machine else None,
        )

    def _batches(self, num_images: int, times: int = 1) -> tuple[str, ...]:
        batch = self.params.evaluation.batch_size
        return "", "", "", f"{times * math.ceil(num_images / batch):,} × {min(batch, num_images)}"

    def _scored(self, num_extracted: int, times: int) -> float | None:
        """Seconds to extract the features of this many images, and to compute the metrics this many times."""
        if self.machine is None or num_features(self.params) is None:
            return None
        num_samples = self.params.sampling.num_samples
        _, num_real = self.num_images or (num_samples, num_samples)
        # a forward pass takes a third of a training step
        extract = self.machine.classifier() / 3 if self.params.evaluation.features == "classifier" else 0.0
        return num_extracted * extract + (times * self.machine.metrics(num_samples, num_real) if times else 0.0)

    def _features(self) -> Row:
        if self.num_images is None:
            return Row("features")
        (every, num_real), config = self.num_images, self.params.evaluation
        seconds = self._scored(num_real, 0)
        if self.machine is not None and seconds is not None and config.features == "classifier":
            seconds += config.classifier_epochs * every * self.machine.classifier()
        return Row("features", self._batches(num_real), seconds=seconds)

    def _scale(self) -> Row:
        """The samples of the untrained network; they and real images are scored."""
        drawn, scored = self._sampled(1), self._scored(self.params.sampling.num_samples, 2)
        return total("scale", [drawn, Row("", seconds=scored)])._replace(cells=drawn.cells, disk=0.0)

    def _tuning(self) -> Row:
        """All trials of all arms: each trains like an arm and is sampled once; its files are removed afterwards."""
        params, tuning = self.params, self.params.tuning
        runs = [resolve(params, arm, tuning.seed, trial) for arm in params.arms for trial in tuning.trials]
        rows = [row for run in runs for row in self._stages(run)]
        return total(f"tune: {len(runs)} trials", rows)._replace(disk=0.0)

    def _training_memory(self, stage: Training, micro: int) -> float:
        """Bytes of weights, gradients, moments, average and initial weights, of activations, and of a noised batch."""
        params = stage.params
        activations = micro * activation_bytes(params, self.compute, stage.num_visible, trains=True)
        image = FLOAT32 * (math.prod(params.dataset.shape) + stage.num_visible * params.patch_dim)
        images = stage.batch_size // params.compute.devices * image
        return self._held(params, 5 + (stage.stage == "finetune")) + activations + images

    def _sampling_memory(self, batch: int) -> float:
        """Bytes of a checkpoint and the network, of activations and the sampler's arrays, and of all drawn images."""
        params, image = self.params, math.prod(self.params.dataset.shape)
        activations = activation_bytes(params, self.compute, params.grid.num_patches, trains=False)
        arrays = batch * (activations + SAMPLER_ARRAYS * FLOAT32 * image)
        return self._held(params, 3) + arrays + params.sampling.num_samples * image

    def _held(self, params: Params, num_sets: int) -> float:
        """Bytes of the process and of sets as large as the weights; autocast adds a copy in bfloat16."""
        sets = num_sets + self.compute.autocast * BFLOAT16 / FLOAT32
        return PROCESS_BYTES.get(self.compute.device.type, 0) + sets * self._weights(params)

    def _weights(self, params: Params) -> int:
        """Bytes of one set of weights."""
        import torch

        from maskdm.method.backbones import build_model

        if (shape := params.dataset.shape) not in self._num_parameters:
            with torch.device("meta"):
                model = build_model(params, NUM_CLASSES)
            self._num_parameters[shape] = sum(p.numel() for p in model.parameters())
        return FLOAT32 * self._num_parameters[shape]


def _gflop(number: float) -> str:
    return f"{float(f'{number / 1e9:.3g}'):,g}"


# --- warnings ---------------------------------------------------------------------------------------------------------

# Compared per image, a masked step should cost the same fraction of an unmasked step in time as in FLOPs. If it costs
# this many times as much, most of its time is not arithmetic.
FIXED_COSTS_DOMINATE = 1.5
TOO_NOISY = 0.5  # measurements with a larger spread do not support a warning
LAUNCH_BOUND_SECONDS = 5e-3  # a GPU step with less arithmetic takes as long as launching its kernels


def warnings(plan: Plan, gpus: Gpus) -> list[str]:
    """What speaks against running the experiment like this, one sentence each."""
    params, cores = plan.params, num_cores()
    found = [*(f"{missing} yet" for missing in params.missing_files())]
    found += [*measured_warnings(plan), *launch_warnings(plan, gpus)]
    if params.compute.threads > cores:
        found.append(
            f"compute.threads is {params.compute.threads}, but this machine has {cores} cores: more threads than cores "
            f"make stages slower. Times are measured with {cores}"
        )
    if (memory := plan.seeds.memory) > (there := total_memory(plan.compute)):
        found.append(
            f"memory: a stage needs about {size(memory)}, but there are only {size(there)} in all; "
            "a micro_batch_size in pretrain and finetune, or a smaller sampling.batch_size, lowers it"
        )
    if (disk := plan.seeds.disk + plan.resumable) > (free := free_bytes()):
        found.append(f"disk: the experiment writes {size(disk)}, but only {size(free)} are free here")
    return found


def measured_warnings(plan: Plan) -> list[str]:
    """Arms whose masked steps take much more time than their FLOPs suggest; arms with equal numbers share a line."""
    machine = plan.machine
    if machine is None:
        return []
    if machine.uncertainty > TOO_NOISY:
        return [
            f"the measurements scatter by ±{machine.uncertainty:.0%}, too much to say whether masking helps here: "
            "use --recalibrate when no other work runs on this machine"
        ]
    found: dict[str, list[str]] = {}
    for arm, run in plan.runs.items():
        masked, unmasked = run.pretrain, run.finetune
        seconds = plan.image_seconds(masked, machine) / plan.image_seconds(unmasked, machine)
        of_flops = masked.flops_per_step / masked.batch_size / (unmasked.flops_per_step / unmasked.batch_size)
        if masked.num_steps and seconds > FIXED_COSTS_DOMINATE * of_flops:
            message = (
                f"pretraining at S = {masked.num_visible}, batch {masked.batch_size} costs {seconds / of_flops:.1f}× "
                f"its FLOPs here ({seconds:.2f} of an unmasked image's time for {of_flops:.2f} of its FLOPs): fixed "
                "costs dominate; a larger pretrain.batch_size amortises them"
            )
            found.setdefault(message, []).append(arm)
    return [f"{_names(plan, arms)}: {message}" for message, arms in found.items()]


def launch_warnings(plan: Plan, gpus: Gpus) -> list[str]:
    """Arms whose steps on a GPU are so short that launching kernels dominates: masking saves FLOPs, but no time."""
    stages = {arm: [s for s in (run.pretrain, run.finetune) if s.num_steps] for arm, run in plan.runs.items()}
    steps = {arm: min(stage.flops_per_step for stage in trained) for arm, trained in stages.items()}
    names: dict[tuple[str, ...], list[str]] = {}
    for name in gpus.names:
        if bound := tuple(arm for arm, step in steps.items() if gpus.seconds(name, step) < LAUNCH_BOUND_SECONDS):
            names.setdefault(bound, []).append(name)
    return [
        f"{', '.join(fast)}: the smallest step of {_names(plan, bound)} is less than {LAUNCH_BOUND_SECONDS * 1e3:.0f} "
        "ms of arithmetic there, and launching its kernels takes about as long: expect more time than the table says; "
        "a larger batch amortises it"
        for bound, fast in names.items()
    ]


def _names(plan: Plan, arms: Sequence[str]) -> str:
    return "all arms" if len(arms) == len(plan.arms) > 1 else ", ".join(arms)


def total_memory(compute: Compute) -> int:
    """Bytes of memory of the device."""
    import psutil
    import torch

    if compute.device.type == "cuda":
        return torch.cuda.get_device_properties(compute.device).total_memory
    return int(psutil.virtual_memory().total)


def free_bytes() -> int:
    """Free bytes on the disk of the results."""
    place: Path = paths.RESULTS if paths.RESULTS.exists() else paths.RESULTS.parent
    return shutil.disk_usage(place).free


# --- the text ---------------------------------------------------------------------------------------------------------


def format_table(plan: Plan, gpus: Gpus) -> str:
    """The table: every arm's sum above the rows of its stages, then the shared stages and the sums of everything."""
    columns: dict[float, list[str]] = {}  # GPUs with the same rate share a column
    for name in gpus.names:
        columns.setdefault(gpus.rate(name), []).append(name)
    header = ["arm, stage", f"visible\nof {plan.params.grid.num_patches}", "rate", "GFLOP\nper step", "steps × batch"]
    header += ["total", "memory", "disk", *["this\nmachine"][: plan.machine is not None]]
    header += map("/".join, columns.values())

    def line(row: Row, indent: str = "") -> list[str]:
        here = ["?" if row.seconds is None else duration(row.seconds)] if plan.machine else []
        there = [duration(gpus.seconds(names[0], row.flops)) if row.flops else "" for names in columns.values()]
        sizes = [size(number) if number else "" for number in (row.memory, row.disk)]
        return [indent + row.name, *row.cells, flops(row.flops) if row.flops else "", *sizes, *here, *there]

    arms = [[line(total(arm, rows)), *(line(row, "  ") for row in rows)] for arm, rows in plan.arms.items()]
    common = [line(row) for row in (*plan.shared, plan.seeds, total("in all", [*plan.shared, plan.seeds]))]
    names = [[name.rpartition("\n")[part] for name in header] for part in (0, 2)]
    widths = [max(map(len, column)) for column in zip(*names, *chain(*arms), *common, strict=True)]
    ruler = ["─" * width for width in widths]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in (*names, ruler, *chain(*arms), ruler, *common)
    )


def words(plan: Plan, gpus: Gpus, missing: str | None) -> list[str]:
    """How to read the table, one paragraph each."""
    params, tuning, num_devices = plan.params, plan.params.tuning, plan.params.compute.devices
    shapes = {arm: run.pretrain.mask.visible.window for arm, run in plan.runs.items()}
    windows = ", ".join(f"{arm} {window[0]}×{window[1]}" for arm, window in shapes.items() if window is not None)
    on_cpu = plan.compute.device.type == "cpu"
    texts = [
        f"The row of an arm is one seed, the sum of the stages below it; the seeds are "
        f"{', '.join(map(str, params.seeds))}. Arms are matched by {params.budget.match}. Steps of sample and scale "
        "are evaluations of the network on a batch, steps of features and evaluate are batches of images, both for all "
        "milestones. (by N) means that a batch enters the network in parts of N images."
        + (f" Windows of crop in patches: {windows}." if windows else ""),
        _words_on_time(plan, missing),
        _words_on_gpus(gpus),
        f"Memory: the peak {'of the process, PyTorch included' if on_cpu else 'on the device'}, in closed form for "
        f"{plan.compute.describe()['precision']}{' with the attention of this CPU' if on_cpu else ''}: weights, "
        "gradients, moments, average, and the activations of a (micro-)batch. An estimate, good to about a fifth.",
        f"Disk: the outputs take {size(plan.seeds.disk)}, {size(free_bytes())} are free; each running training stage "
        f"needs up to {size(plan.resumable)} more. DVC's cache may hold the outputs a second time.",
    ]
    if num_devices > 1:
        texts.append(
            f"compute.devices is {num_devices}: memory is for each device with its share of a batch; times are for one "
            "device alone, and several divide them if they do not share cores."
        )
    if tuning.enabled:
        texts.append(
            f"Tuning: every arm tries {len(tuning.trials)} trials at {tuning.budget_fraction:.0%} of the budget on "
            f"seed {tuning.seed}. The rows above use the values as given; a chosen batch size changes them."
        )
    return texts


def _words_on_time(plan: Plan, missing: str | None) -> str:
    machine = plan.machine
    if machine is None:
        return f"This machine was not measured{f': {missing}' if missing else ' (--no-calibration)'}."
    left_out = {
        "prepare, choose and report": True,
        "starting processes, loading images, saving and logging": True,
        "features, as params.yaml does not tell the number of images": plan.num_images is None,
        f"scoring with the features {plan.params.evaluation.features}": num_features(plan.params) is None,
        "compilation": plan.compute.compile_mode is not None,
    }
    return (
        f"{machine.title}; about ±{machine.uncertainty:.0%}, and more if other work runs meanwhile. Stages run one "
        f"after the other; not estimated: {'; '.join(text for text, is_so in left_out.items() if is_so)}. "
        "--recalibrate measures again."
    )


def _words_on_gpus(gpus: Gpus) -> str:
    rates = ", ".join(f"{name} {gpus.rate(name) / 1e12:g}" for name in gpus.names)
    kind = "bf16" if gpus.precision == "bf16" else "TF32, which float32 products run in,"
    without = ", ".join(name for name in gpus.names if "bf16" not in GPUS[name])
    note = f" ({without}: float32, as it has no {'bf16' if gpus.precision == 'bf16' else 'TF32'})" if without else ""
    return (
        f"GPUs: FLOPs / (datasheet rate × {gpus.utilisation:g}); dense {kind} rates in TFLOP/s: {rates}{note}. The "
        "utilisation is an assumption (--utilisation); small networks reach less. Extractors are not counted."
    )


def _wrapped(texts: Sequence[str], bullet: str = "") -> str:
    indent = " " * len(bullet)
    return "\n".join(textwrap.fill(text, 118, initial_indent=bullet, subsequent_indent=indent) for text in texts)
