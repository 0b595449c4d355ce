"""`maskdm plan`: what every stage would do and cost, before anything runs.

Steps and FLOPs are those of `config.runs`; memory and disk are closed forms. Times on this machine come from a few
seconds of real work on random data, times on GPUs from datasheets. Importing this imports no torch.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, wraps
from importlib import metadata
from itertools import chain, count
from pathlib import Path
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
    from maskdm.data.arrays import ImageArrays
    from maskdm.method.backbones.uvit import UViT
    from maskdm.training.devices import Compute

# Dense rates in FLOP/s, without sparsity: bfloat16 with float32 accumulation, and float32 matrix products as this code
# asks for them, which is TF32 where the hardware has it.
# Source: NVIDIA's datasheets of the V100 SXM2, A100 SXM, H100 SXM and H200 SXM.
GPUS = {
    "V100": {"fp32": 15.7e12},
    "A100": {"fp32": 156e12, "bf16": 312e12},
    "H100": {"fp32": 494.7e12, "bf16": 989e12},
    "H200": {"fp32": 494.7e12, "bf16": 989e12},
}
DEFAULT_UTILISATION = 0.4


class Gpus(NamedTuple):
    """GPUs that times are given for: keys of `GPUS`, "bf16" or "fp32", and the share of the rate that they reach."""

    names: tuple[str, ...]
    precision: str
    utilisation: float = DEFAULT_UTILISATION

    def rate(self, name: str) -> float:
        """FLOP/s of a datasheet, in this precision as this code would run it."""
        return GPUS[name].get(self.precision, GPUS[name]["fp32"])

    def seconds(self, name: str, num_flops: float) -> float:
        """How long so many FLOPs take."""
        return num_flops / (self.rate(name) * self.utilisation)


def run(
    params: Params,
    gpus: Sequence[str] = (),
    utilisation: float = DEFAULT_UTILISATION,
    calibrate: bool = True,
    recalibrate: bool = False,
) -> str:
    """Plan an experiment; the text to print.

    Args:
        params: the experiment.
        gpus: names of GPUs to give times for; none means all that are known.
        utilisation: the share of their rate that they are said to reach.
        calibrate: whether to measure this machine.
        recalibrate: measure even what was measured before.
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
    """Where stages would compute here, on no more threads than there are cores, and what is missing for that."""
    from maskdm.training import devices

    config = params.compute.model_copy(update={"threads": min(params.compute.threads, num_cores())})
    try:
        return devices.resolve(config), None
    except UserError as error:
        return devices.resolve(config.model_copy(update={"device": "cpu"})), str(error)


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- times on this machine: measured once, and kept -------------------------------------------------------------------

KEPT = paths.WORK / "calibration.json"
LONGEST_SECONDS = 0.5  # of one measurement, unless a single call takes longer
WARM_SECONDS = 2.0  # a first call that is longer counts; a shorter one is mostly caches, first allocations and imports
MAX_REPETITIONS = 50
# Work of more FLOPs is measured on fewer images, then on fewer patches, and scaled by its FLOPs: about a second on two
# cores with bfloat16, and on a GPU enough to fill it.
MAX_FLOPS = {"cpu": 2e11, "cuda": 2e13}
LEAST_UNCERTAINTY = 0.2
NUM_CLASSES = 10  # of networks before the data are known: the number costs no time
MAX_SCORED = 1000  # rows of features on which the metrics are measured, if KID's subsets are not larger
MAX_FEATURES = 512  # of an image; the metrics of more take too long to be measured


class Measurement(NamedTuple):
    """Seconds of a unit of work: the median of repetitions, half the width of their middle half as a share, the day."""

    seconds: NonNegativeFloat
    spread: NonNegativeFloat
    day: str


Piece = tuple[Callable[[], object], float]  # what is timed, and how many units of work it does
FILE = TypeAdapter(dict[str, Measurement])  # by a fingerprint of all that they depend on


def measured(piece: Callable[..., Piece]) -> Callable[..., float]:
    """Turn a method that prepares work into one that gives the seconds of a unit of it."""
    return wraps(piece)(lambda machine, *arguments: machine.seconds(piece, *arguments))


class Machine:
    """Seconds of real pieces of work on this machine; each is measured when it is first asked for.

    Args:
        params: the experiment.
        compute: device, threads and precision, as stages resolve them.
        forget: measure even what was measured before.
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
        except (OSError, ValidationError):  # lost or damaged
            self._kept = {}

    @measured
    def step(self, num_images: int, num_visible: int) -> Piece:
        """One image of a training step of so many at once; getting them is not included."""
        import torch

        from maskdm.method.diffusion import Diffusion, draw_step, masked_dsm_loss
        from maskdm.method.masks import Masking
        from maskdm.training.optimizer import Ema, clip_gradients, make_optimizer

        params, device, model = self._largest, self.compute.device, self._model
        training, config, (height, width, channels) = params.training, params.diffusion, params.dataset.shape
        part, visible = self._affordable(num_images, num_visible)
        rate = 1 - visible / params.grid.num_patches
        masking = Masking("patch" if rate else "none", params.grid, rate)  # drawing it costs next to nothing
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
        """One image in one step of sampling so many at once."""
        from maskdm.models.drawing import draw_images

        compute, few = replace(self.compute, compile_mode=None), min(2, self.params.sampling.num_steps)
        part = max(1, min(batch_size, int(self._max_flops / forward_flops(self.params))))
        config = self.params.sampling.model_copy(update={"num_steps": few, "batch_size": part})
        params = self.params.model_copy(update={"sampling": config})

        def run() -> None:
            with redirect_stderr(io.StringIO()):  # its progress
                draw_images(params, self._model, NUM_CLASSES, 0, part, compute, "")

        return run, part * few

    @measured
    def gather(self, batch_size: int, _: str) -> Piece:
        """A batch of images from the dataset of this sha256 to the device."""
        from maskdm.data.batches import Batches

        assert self.images is not None, "it is measured on prepared images"
        batches = Batches(self.images, batch_size, 0, "plan", self.compute.device)
        firsts = count(0, batches.steps_at_once)
        return lambda: batches(next(firsts)), batches.steps_at_once

    @measured
    def classifier(self) -> Piece:
        """One image in one epoch of training the classifier."""
        import numpy as np

        from maskdm.scoring.classifier import train_classifier

        num_images, num_epochs = 80, 4  # a batch of 64, and a fifth that is held out
        images = np.random.default_rng(0).integers(256, size=(num_images, *self.params.dataset.shape), dtype=np.uint8)
        labels = np.arange(num_images) % NUM_CLASSES

        def run() -> None:
            with redirect_stderr(io.StringIO()):
                train_classifier(images, labels, NUM_CLASSES, num_epochs)

        return run, num_images * num_epochs

    @measured
    def extract(self) -> Piece:
        """One image through a pretrained extractor."""
        import torch

        from maskdm.scoring.extractors import open_pretrained

        config, device = self.params.evaluation, self.compute.device
        num_images = min(config.batch_size, 8 if device.type == "cpu" else 256)
        images = torch.randint(256, (num_images, *self.params.dataset.shape), dtype=torch.uint8, device=device)
        embed = open_pretrained(config, device).embed
        return torch.inference_mode()(lambda: embed(images)), num_images

    @measured
    def metrics(self, num_samples: int, num_real: int) -> Piece:
        """FID, KID, precision and recall, in proportion to fewer samples."""
        import numpy as np

        from maskdm.scoring.scores import Reference, compute_metrics

        config, features = self.params.evaluation, num_features(self.params)
        n, m = (max(config.kid_subset_size, min(number, MAX_SCORED)) for number in (num_samples, num_real))
        rows = np.random.default_rng(0).random((n + m, features or 1), np.float32)
        real = Reference.of(rows[n:], config.prc_neighborhood)
        return lambda: compute_metrics(rows[:n], real, config), n / num_samples

    def has_extractor(self) -> bool:
        """Whether the extractor's weights are on this machine: a plan downloads nothing."""
        import torch

        from maskdm.scoring.extractors import PUBLISHED

        features, weights = self.params.evaluation.features, self.params.evaluation.weights
        downloaded = Path(torch.hub.get_dir(), "checkpoints", PUBLISHED.get(features, "unknown"))
        return features in ("classifier", "pixels") or Path(weights or downloaded).is_file()

    @property
    def uncertainty(self) -> float:
        """About how far the times are off, as a share."""
        return max([LEAST_UNCERTAINTY, *(m.spread for m in self._used)])

    @property
    def title(self) -> str:
        """The machine, and the day of the oldest measurement in use."""
        import torch

        threads = f"{self.compute.threads} thread" + ("s" if self.compute.threads > 1 else "")
        name = f"{cpu_name()}, {threads} on {os.cpu_count()} cores"
        if self.compute.device.type == "cuda":
            name = torch.cuda.get_device_name(self.compute.device)
        return f"This machine ({name}): from a few seconds measured on {min(m.day for m in self._used)}"

    @cached_property
    def images(self) -> ImageArrays | None:
        """The prepared dataset, if it is there and of the params' shape."""
        from maskdm.data.inputs import open_data

        try:
            return open_data(self.params)
        except UserError:
            return None

    def save(self) -> None:
        """Keep what was measured; a folder that can't be written costs the next plan its seconds, and nothing else."""
        try:
            with replace_file(KEPT) as building:
                building.write_bytes(FILE.dump_json(self._kept, indent=2))
        except UserError as error:
            print(f"what was measured is not kept: {error}", file=sys.stderr)

    def seconds(self, piece: Callable[..., Piece], *arguments: int | str) -> float:
        """A unit of a piece of work: as it was kept, or measured now."""
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
        if piece.__name__ != "gather":  # it is short, and often the noisiest
            self._used.append(self._kept[key])
        return self._kept[key].seconds

    def _measure(self, run: Callable[[], object], num_units: float) -> Measurement:
        """Once untimed, then again and again until the time is up; a long call once, timed."""
        import numpy as np
        import torch

        def once() -> float:
            started = time.perf_counter()
            run()
            if self.compute.device.type == "cuda":
                torch.cuda.synchronize(self.compute.device)
            return time.perf_counter() - started

        seconds = [once()]
        if seconds[0] < WARM_SECONDS:
            seconds = [once()]
        while sum(seconds) < LONGEST_SECONDS and len(seconds) < MAX_REPETITIONS:
            seconds.append(once())
        low, median, high = map(float, np.percentile(seconds, [25, 50, 75]))
        return Measurement(median / num_units, (high - low) / 2 / median, datetime.now(UTC).date().isoformat())

    @cached_property
    def _model(self) -> UViT:
        from maskdm.method.backbones import build_model

        return build_model(self._largest, NUM_CLASSES).to(self.compute.device)

    def _affordable(self, num_images: int, num_visible: int) -> tuple[int, int]:
        """At most so many images and visible patches, of which a step costs no more FLOPs than it may."""
        while num_visible > 1 and self.params.image_flops(num_visible) > self._max_flops:
            num_visible //= 2
        return max(1, min(num_images, int(self._max_flops / self.params.image_flops(num_visible)))), num_visible


def num_features(params: Params) -> int | None:
    """Of an image; None where they are so many that the metrics of them are not measured."""
    known = {"classifier": 64, "pixels": math.prod(params.dataset.shape)}.get(params.evaluation.features)
    return known if known is not None and known <= MAX_FEATURES else None


# --- what every stage costs -------------------------------------------------------------------------------------------

FLOAT32, BFLOAT16 = 4, 2  # bytes
SETS_KEPT = 2  # of weights in a checkpoint: raw and averaged
SETS_TO_RESUME = 4  # in a resumable state: these and AdamW's two moments
# Python, PyTorch's libraries and what their kernels keep: the resident size of a stage with a tiny network, measured
# on Linux with the CPU build of torch 2.13. On a GPU it is the host's memory, which is not counted here.
PROCESS_BYTES = {"cpu": 0.40 * 2**30}
SAMPLER_ARRAYS = 5  # float32, as large as a batch of images: x_t, the prediction, x_0, the direction, a product


def forward_flops(params: Params) -> float:
    """FLOPs of one evaluation of the network on one whole image.

    Training costs three times that, but for the first layers, whose inputs need no gradient.
    """
    model, num_patches = params.model, params.grid.num_patches
    first = num_patches * params.patch_dim * model.dim + (4 * model.dim**2 if model.mlp_time_embed else 0)
    return (params.image_flops(num_patches) + 2 * first) / 3


def activation_bytes(params: Params, compute: Compute, num_visible: int, trains: bool) -> float:
    """What the network holds of an image at its peak.

    For backward, of a block: the inputs of its norms in float32; in the precision of products those of its linear
    layers, queries, keys, values, what GELU gets, and attention's weights where plain products compute them. If
    activations are recomputed: the inputs of all blocks, and two whole ones. Without backward: the skips, and a block
    at its widest.
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
        name: of the line.
        cells: visible patches, mask rate, GFLOP per step, steps × batch: what has no sum.
        flops: of the network.
        memory: bytes at the peak, of the device.
        disk: bytes of the outputs.
        seconds: on this machine; None where they are not known.
    """

    name: str
    cells: tuple[str, ...] = ("", "", "", "")
    flops: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    seconds: float | None = None


def total(name: str, rows: Sequence[Row], times: int = 1) -> Row:
    """Rows one after the other, so many times: the largest memory, the sum of all else that is known."""
    known = [row.seconds for row in rows if row.seconds is not None]
    num_flops, disk = (times * sum(numbers) for numbers in zip(*((row.flops, row.disk) for row in rows), strict=True))
    memory, seconds = max(row.memory for row in rows), times * sum(known) if known else None
    return Row(name, flops=num_flops, memory=memory, disk=disk, seconds=seconds)


class Plan:
    """What the stages of an experiment do and cost.

    Args:
        params: the experiment.
        compute: the device that memory is estimated for.
        machine: gives times; None: there are none.

    Attributes:
        runs: of every arm, with the first seed.
        arms: the rows of its stages.
        seeds: the sum of all arms and seeds.
        shared: the rows of what is done once for all arms.
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
        """Bytes on disk of a training stage that runs: a state, the one that replaces it, and milestones."""
        sets = 2 * SETS_TO_RESUME + SETS_KEPT * len(self.params.budget.milestones)
        return sets * self._weights(self.params)

    def micro_batch_of(self, stage: Training) -> int:
        """Images of a rank that enter the network at once; for `auto` on a GPU the most that fit by this estimate."""
        own, given = stage.batch_size // self.params.compute.devices, stage.config.micro_batch_size
        if given != "auto":
            return min(given or own, own)
        sizes = [n for n in range(own, 0, -1) if own % n == 0] if self.compute.device.type == "cuda" else [own]
        return next((n for n in sizes if self._training_memory(stage, n) <= total_memory(self.compute)), sizes[-1])

    def image_seconds(self, stage: Training, machine: Machine) -> float:
        """An image of a training step, without getting it."""
        return machine.step(self.micro_batch_of(stage), stage.num_visible)

    def gather_seconds(self, stage: Training, machine: Machine) -> float:
        """Getting a batch; 0 where nothing is prepared."""
        return 0.0 if machine.images is None else machine.gather(stage.batch_size, machine.images.sha256)

    def step_seconds(self, stage: Training, machine: Machine) -> float:
        """A whole training step."""
        return stage.batch_size * self.image_seconds(stage, machine) + self.gather_seconds(stage, machine)

    @cached_property
    def num_images(self) -> tuple[int, int] | None:
        """Of all images and of those that samples are compared with: as prepared, else as far as params tell."""
        held_out, known = self.params.dataset.held_out, most_real(self.params)
        share = {"train": 1 - held_out, "held_out": held_out, "all": 1.0}[self.params.evaluation.reference]
        if self.machine is not None and self.machine.images is not None:
            known = round(len(self.machine.images) / (1 - held_out) * share)
        return None if known is None else (round(known / share), known)

    def _stages(self, run: Run) -> Iterator[Row]:
        """Those of an arm that do something: without steps, `pretrain` publishes the initialisation and no more."""
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
        masking = str(stage.num_visible), f"{stage.realised_mask_rate:.3g}"
        return Row(
            stage.stage,
            (*masking, _gflop(stage.flops_per_step), f"{stage.num_steps:,} × {batch}"),
            flops=stage.flops,
            memory=self._training_memory(stage, micro),
            disk=num_checkpoints * SETS_KEPT * self._weights(stage.params),
            seconds=stage.num_steps * self.step_seconds(stage, self.machine) if self.machine else None,
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
        """Seconds of the features of so many images, and of the metrics so many times."""
        if self.machine is None or not self.machine.has_extractor():
            return None
        num_samples, features = self.params.sampling.num_samples, self.params.evaluation.features
        _, num_real = self.num_images or (num_samples, num_samples)
        if features == "classifier":
            extract = self.machine.classifier() / 3  # what goes forward alone takes a third of training
        else:
            extract = 0.0 if features == "pixels" else self.machine.extract()
        metrics = self.machine.metrics(num_samples, num_real) if num_features(self.params) and times else 0.0
        return num_extracted * extract + times * metrics

    def _features(self) -> Row:
        if self.num_images is None:
            return Row("features")
        (every, num_real), config = self.num_images, self.params.evaluation
        seconds = self._scored(num_real, 0)
        if self.machine is not None and seconds is not None and config.features == "classifier":
            seconds += config.classifier_epochs * every * self.machine.classifier()
        return Row("features", self._batches(num_real), seconds=seconds)

    def _scale(self) -> Row:
        """The untrained network's samples; they and real images are scored."""
        drawn, scored = self._sampled(1), self._scored(self.params.sampling.num_samples, 2)
        return total("scale", [drawn, Row("", seconds=scored)])._replace(cells=drawn.cells, disk=0.0)

    def _tuning(self) -> Row:
        """All trials of all arms: each is an arm of its own, sampled once, its files removed afterwards."""
        params, tuning = self.params, self.params.tuning
        runs = [resolve(params, arm, tuning.seed, trial) for arm in params.arms for trial in tuning.trials]
        rows = [row for run in runs for row in self._stages(run)]
        return total(f"tune: {len(runs)} trials", rows)._replace(disk=0.0)

    def _training_memory(self, stage: Training, micro: int) -> float:
        """Bytes: weights, gradients, two moments, average, what it starts from; activations; a batch and its noise."""
        params = stage.params
        activations = micro * activation_bytes(params, self.compute, stage.num_visible, trains=True)
        image = FLOAT32 * (math.prod(params.dataset.shape) + stage.num_visible * params.patch_dim)
        images = stage.batch_size // params.compute.devices * image
        return self._held(params, 5 + (stage.stage == "finetune")) + activations + images

    def _sampling_memory(self, batch: int) -> float:
        """Bytes: a checkpoint of two sets and the network, activations, the sampler's arrays, all images drawn."""
        params, image = self.params, math.prod(self.params.dataset.shape)
        activations = activation_bytes(params, self.compute, params.grid.num_patches, trains=False)
        arrays = batch * (activations + SAMPLER_ARRAYS * FLOAT32 * image)
        return self._held(params, 3) + arrays + params.sampling.num_samples * image

    def _held(self, params: Params, num_sets: int) -> float:
        """Bytes of the process and of sets as large as the weights; autocast adds a copy in bfloat16."""
        sets = num_sets + self.compute.autocast * BFLOAT16 / FLOAT32
        return PROCESS_BYTES.get(self.compute.device.type, 0) + sets * self._weights(params)

    def _weights(self, params: Params) -> int:
        """Bytes of one set."""
        import torch

        from maskdm.method.backbones import build_model

        if (shape := params.dataset.shape) not in self._num_parameters:
            with torch.device("meta"):
                model = build_model(params, NUM_CLASSES)
            self._num_parameters[shape] = sum(p.numel() for p in model.parameters())
        return FLOAT32 * self._num_parameters[shape]


def _gflop(number: float) -> str:
    return f"{float(f'{number / 1e9:.3g}'):,g}"


# --- what stands against it -------------------------------------------------------------------------------------------

# A masked step per image should cost, of an unmasked one, what its FLOPs do; where it costs this many times as much,
# most of it is not arithmetic.
FIXED_COSTS_DOMINATE = 1.5
# Measurements that scatter by more say nothing about either.
TOO_NOISY = 0.5
# The share of a step that goes into waiting for its batch, from which on a faster network would not help much.
DATA_BOUND = 0.3
# A GPU step of less arithmetic than this lasts as long as launching its kernels does: some milliseconds.
LAUNCH_BOUND_SECONDS = 5e-3


def warnings(plan: Plan, gpus: Gpus) -> list[str]:
    """What stands against the plan."""
    params, cores = plan.params, num_cores()
    found = [*(f"{missing} yet" for missing in params.missing_files())]
    found += [*measured_warnings(plan), *launch_warnings(plan, gpus)]
    if params.compute.threads > cores:
        found.append(
            f"compute.threads is {params.compute.threads}, and this machine has {cores} cores: stages would run slower "
            f"for it. Times are measured with {cores}"
        )
    if (memory := plan.seeds.memory) > (there := total_memory(plan.compute)):
        found.append(
            f"memory: a stage needs about {size(memory)}, and there are {size(there)} in all; "
            "a micro_batch_size in pretrain and finetune, or a smaller sampling.batch_size, lowers it"
        )
    if (disk := plan.seeds.disk + plan.resumable) > (free := free_bytes()):
        found.append(f"disk: the experiment writes {size(disk)}, and {size(free)} are free here")
    return found


def measured_warnings(plan: Plan) -> list[str]:
    """What the measurements say against the plan, one sentence each; equal findings of several arms are one."""
    machine = plan.machine
    if machine is None:
        return []
    if machine.uncertainty > TOO_NOISY:
        return [
            f"the measurements scatter by ±{machine.uncertainty:.0%}, too much to say whether masking helps here: "
            "--recalibrate when the machine has nothing else to do"
        ]
    fixed: dict[str, list[str]] = {}
    slow_data: dict[str, list[str]] = {}
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
            fixed.setdefault(message, []).append(arm)
        for stage in (stage for stage in (masked, unmasked) if stage.num_steps):
            share = plan.gather_seconds(stage, machine) / plan.step_seconds(stage, machine)
            if share > DATA_BOUND:
                message = (
                    f"{share:.0%} of a {stage.stage} step at S = {stage.num_visible}, batch {stage.batch_size} is "
                    "waiting for its images: masking can't shorten that"
                )
                slow_data.setdefault(message, []).append(arm)
    return [f"{_names(plan, arms)}: {message}" for message, arms in (fixed | slow_data).items()]


def launch_warnings(plan: Plan, gpus: Gpus) -> list[str]:
    """Where a GPU would spend its time on launching kernels: there masking saves FLOPs and no time."""
    stages = {
        arm: [stage for stage in (run.pretrain, run.finetune) if stage.num_steps] for arm, run in plan.runs.items()
    }
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
    """The arms' names, unless they are all."""
    return "all arms" if len(arms) == len(plan.arms) > 1 else ", ".join(arms)


def total_memory(compute: Compute) -> int:
    """Bytes of the device."""
    import psutil
    import torch

    if compute.device.type == "cuda":
        return torch.cuda.get_device_properties(compute.device).total_memory
    return int(psutil.virtual_memory().total)


def free_bytes() -> int:
    """Where results go."""
    return shutil.disk_usage(paths.RESULTS if paths.RESULTS.exists() else Path()).free


# --- the text ---------------------------------------------------------------------------------------------------------


def format_table(plan: Plan, gpus: Gpus) -> str:
    """A row per arm with its sum, a row per stage below it, and what all have in common."""
    columns: dict[float, list[str]] = {}  # GPUs of equal rates share one
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
    """How to read the table."""
    params, tuning, num_devices = plan.params, plan.params.tuning, plan.params.compute.devices
    shapes = {arm: run.pretrain.mask.visible.window for arm, run in plan.runs.items()}
    windows = ", ".join(f"{arm} {window[0]}×{window[1]}" for arm, window in shapes.items() if window is not None)
    on_cpu = plan.compute.device.type == "cpu"
    texts = [
        f"An arm's row is one seed, its stages below; the seeds are {', '.join(map(str, params.seeds))}. Arms are "
        f"matched by {params.budget.match}. Steps of sample and scale are evaluations of the network on a batch, those "
        "of features and evaluate batches of images, for all milestones. A batch that enters the network in parts says "
        "how large they are (by N)." + (f" Windows of crop in patches: {windows}." if windows else ""),
        _words_on_time(plan, missing),
        _words_on_gpus(gpus),
        f"Memory: the peak {'of the process, PyTorch included' if on_cpu else 'on the device'}, in closed form for "
        f"{plan.compute.describe()['precision']}{' with the attention of this CPU' if on_cpu else ''}: weights, "
        "gradients, moments, average, what backward needs of a (micro-)batch. An estimate, good to about a fifth.",
        f"Disk: outputs of {size(plan.seeds.disk)}, {size(free_bytes())} free; each training stage that is running "
        f"needs up to {size(plan.resumable)} more. DVC's cache may hold the outputs a second time.",
    ]
    if num_devices > 1:
        texts.append(
            f"compute.devices is {num_devices}: memory is that of each, with its share of a batch; times are those of "
            "one alone, which several divide between them where they do not share cores."
        )
    if tuning.enabled:
        texts.append(
            f"Tuning: every arm tries {len(tuning.trials)} trials at {tuning.budget_fraction:.0%} of the budget on "
            f"seed {tuning.seed}. The rows above are with the values as given; a chosen batch size changes them."
        )
    return texts


def _words_on_time(plan: Plan, missing: str | None) -> str:
    machine, features = plan.machine, plan.params.evaluation.features
    if machine is None:
        return f"This machine was not measured{f': {missing}' if missing else ' (--no-calibration)'}."
    left_out = {
        "prepare, choose and report": True,
        "starting processes, saving and logging": True,
        "waiting for images, as nothing is prepared yet": machine.images is None,
        "features, as the number of images is not known before prepare": plan.num_images is None,
        f"the extractor {features}, as its weights are not here yet": not machine.has_extractor(),
        "what FID, KID, precision and recall take": num_features(plan.params) is None,
        "compilation": plan.compute.compile_mode is not None,
    }
    return (
        f"{machine.title}; about ±{machine.uncertainty:.0%}, and more while other work runs. Stages one after the "
        f"other; not estimated: {'; '.join(text for text, is_so in left_out.items() if is_so)}. --recalibrate measures "
        "again."
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
