"""How long training steps and sampling take on this machine: from a few seconds of measurement, kept for next time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata

import torch

from maskdm.base.checksums import short_hash
from maskdm.base.machine import cpu_name
from maskdm.base.progress import Progress
from maskdm.config import Params, Training
from maskdm.plan.bench import Bench, open_images
from maskdm.plan.store import Measurement, MeasurementStore
from maskdm.training.devices import Compute

TOTAL_SECONDS = 6.0  # of all measurements together; what is missing then is scaled from what was measured
LONGEST_SECONDS = 0.5  # of one measurement
# A step of more FLOPs is measured on a micro-batch, and scaled: about a third of a second on two cores with bfloat16,
# and on a GPU enough to fill it.
MAX_FLOPS = {"cpu": 8e10, "cuda": 2e13}
# Steps whose numbers of visible patches differ by less share a measurement, scaled by their FLOPs.
SAME_SHAPE = 0.05
LEAST_UNCERTAINTY = 0.2

Job = tuple[str, tuple[int, ...]]  # a method of `Bench` and its arguments


@dataclass(frozen=True)
class Work:
    """What the planned stages need to know: plain facts, gathered before anything is measured.

    Attributes:
        steps: (images per forward pass, S) of every training stage.
        batches: training batch sizes.
        sampling_batch: images per batch of sampling.
        num_patches: N, what sampling and finetuning see.
        flops_of: FLOPs of forward and backward of one image with S visible patches.
    """

    steps: frozenset[tuple[int, int]]
    batches: frozenset[int]
    sampling_batch: int
    num_patches: int
    flops_of: Callable[[int], float]


@dataclass(frozen=True)
class Calibration:
    """Seconds on this machine.

    Attributes:
        steps: (images, S) → seconds of draws, forward and backward of so many images at once.
        update: seconds of clipping, AdamW and EMA.
        gathers: batch size → seconds of getting a batch.
        evaluation: seconds of one evaluation of the network on a sampling batch.
        uncertainty: about how far these are off, as a share; other work on the machine comes on top.
        is_real_data: whether batches were gathered from results/data, or from made-up images.
        num_missing: shapes that there was no time to measure, scaled from others by their FLOPs.
        day: the day of the oldest measurement in use.
        machine: what it ran on, in words.
    """

    steps: dict[tuple[int, int], float]
    update: float
    gathers: dict[int, float]
    evaluation: float
    uncertainty: float = LEAST_UNCERTAINTY
    is_real_data: bool = False
    num_missing: int = 0
    day: str = ""
    machine: str = field(default="this machine")

    def compute_seconds(self, plan: Training, micro_batch_size: int | None) -> float:
        """One training step without its data: forward and backward of all micro-batches, and the update."""
        micro = micro_batch_size or plan.batch_size
        return plan.batch_size / micro * self._pass_seconds(micro, plan.num_visible) + self.update

    def gather_seconds(self, batch_size: int) -> float:
        """Getting a batch; of a size that was not measured, in proportion to the nearest that was."""
        nearest = min(self.gathers, key=lambda size: abs(size - batch_size))
        return self.gathers[nearest] * batch_size / nearest

    def step_seconds(self, plan: Training, micro_batch_size: int | None) -> float:
        """One whole training step."""
        return self.compute_seconds(plan, micro_batch_size) + self.gather_seconds(plan.batch_size)

    def _pass_seconds(self, images: int, num_visible: int) -> float:
        """Of a batch size that was not measured (a tuning trial's), in proportion to the nearest that was."""
        if (images, num_visible) in self.steps:
            return self.steps[images, num_visible]
        known = [size for size, visible in self.steps if visible == num_visible]
        nearest = min(known, key=lambda size: abs(size - images))
        return self.steps[nearest, num_visible] * images / nearest


def calibrate(params: Params, compute: Compute, work: Work, store: MeasurementStore) -> Calibration:
    """Measure what the store does not know, say so meanwhile, and put it together.

    Args:
        params: the experiment.
        compute: device, threads and precision.
        work: what will be done.
        store: what was measured before; gets what is measured now.
    """
    measure = _Measure(params, compute, store)
    flops_cap = MAX_FLOPS.get(compute.device.type, MAX_FLOPS["cpu"])
    shapes = measured_shapes(work, flops_cap)
    sampled = min(work.sampling_batch, max(1, int(flops_cap / (work.flops_of(work.num_patches) / 3))))
    is_scaled = any(images < of for (of, _), (images, _) in shapes.items())
    steps = sorted(set(shapes.values()), key=lambda shape: shape[1])
    measure.all(
        needed=[
            ("update", ()),
            *(("gather", (size,)) for size in sorted(work.batches)),
            ("evaluation", (sampled,)),
            ("step", steps[0]),
            *([("step", (1, steps[0][1]))] if is_scaled else []),
        ],
        wanted=[("step", shape) for shape in _widest_apart(steps[1:])],
    )
    fixed = _fixed_seconds(measure, *steps[0]) if is_scaled else 0.0
    known = [shape for shape in steps if measure.has("step", *shape)]
    shapes = {of: min(known, key=lambda k: (k != shape, abs(k[1] - shape[1]))) for of, shape in shapes.items()}
    return Calibration(
        steps={of: _scaled(measure, of, shape, fixed, work) for of, shape in shapes.items()},
        update=measure.value("update"),
        gathers={size: measure.value("gather", size) for size in work.batches},
        evaluation=measure.value("evaluation", sampled) * work.sampling_batch / sampled,
        uncertainty=measure.uncertainty,
        is_real_data=measure.is_real_data,
        num_missing=len(steps) - len(known),
        day=measure.day,
        machine=describe(compute),
    )


def measured_shapes(work: Work, flops_cap: float) -> dict[tuple[int, int], tuple[int, int]]:
    """For every (images, S) of the work, the (images, S) that is measured in its place: itself where it is cheap."""
    shapes: dict[tuple[int, int], tuple[int, int]] = {}
    representative = sys.maxsize
    for visible in sorted({visible for _, visible in work.steps}, reverse=True):
        dearest = max(images for images, v in work.steps if v == visible) * work.flops_of(visible)
        is_like_the_last = visible > (1 - SAME_SHAPE) * representative
        if dearest <= flops_cap or not is_like_the_last:
            representative = visible
        affordable = max(1, int(flops_cap / work.flops_of(representative)))
        shapes |= {(images, v): (min(images, affordable), representative) for images, v in work.steps if v == visible}
    return shapes


def describe(compute: Compute) -> str:
    """The machine in words."""
    if compute.device.type == "cuda":
        return torch.cuda.get_device_name(compute.device)
    threads = f"{compute.threads} thread" + ("s" if compute.threads > 1 else "")
    return f"{cpu_name()}, {threads} on {os.cpu_count()} cores"


def _widest_apart(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Most visible patches first, then the middle ones: if time runs out, what is missing lies between."""
    return steps[::-1][:1] + sorted(steps[:-1], key=lambda shape: abs(shape[1] - steps[-1][1] / 2))


def _fixed_seconds(measure: _Measure, images: int, num_visible: int) -> float:
    """What a step costs whatever its batch size, such as casting the weights: it must not be scaled.

    From the shape with the fewest visible patches, where it shows best: one image against several.
    """
    if images == 1:
        return 0.0
    one = measure.value("step", 1, num_visible)
    per_image = (measure.value("step", images, num_visible) - one) / (images - 1)
    return min(max(0.0, one - per_image), one)


def _scaled(measure: _Measure, of: tuple[int, int], shape: tuple[int, int], fixed: float, work: Work) -> float:
    """Seconds of a step from those of the shape measured in its place."""
    (images, visible), (measured_images, measured_visible) = of, shape
    seconds = measure.value("step", *shape)
    if of == shape:
        return seconds
    fixed = min(fixed, seconds / 2)  # else the measurement says nothing about its images
    times = images / measured_images * work.flops_of(visible) / work.flops_of(measured_visible)
    return fixed + (seconds - fixed) * times


class _Measure:
    """Takes measurements from the store, or makes them and puts them there."""

    def __init__(self, params: Params, compute: Compute, store: MeasurementStore) -> None:
        self._params, self._compute, self._store = params, compute, store
        self._data = images.sha256 if (images := open_images(params)) else "made up"
        self.is_real_data = self._data != "made up"
        self._used: list[Measurement] = []

    def all(self, needed: list[Job], wanted: list[Job]) -> None:
        """Make the measurements that are missing: those needed in any case, those wanted while there is time."""
        missing = [job for job in (*needed, *wanted) if not self.has(job[0], *job[1])]
        if not missing:
            return
        print(f"measuring this machine, once: {len(missing)} short measurements …", file=sys.stderr, flush=True)
        bench = Bench(self._params, self._compute, min(LONGEST_SECONDS, TOTAL_SECONDS / 2 / len(missing)))
        bar, started = Progress(len(missing), "measuring this machine", "measurements"), time.monotonic()
        for name, arguments in missing:
            if (name, arguments) in needed or time.monotonic() - started < TOTAL_SECONDS:
                self._store.put(self._key(name, arguments), getattr(bench, name)(*arguments))
            bar.update(note=" ".join([name, *map(str, arguments)]))
        bar.close()
        self._store.save()

    def has(self, name: str, *arguments: int) -> bool:
        """Whether it was made."""
        return self._store.get(self._key(name, arguments)) is not None

    def value(self, name: str, *arguments: int) -> float:
        """Seconds of one that was made."""
        measurement = self._store.get(self._key(name, arguments))
        assert measurement is not None, "`all` has made it"
        self._used.append(measurement)
        return measurement.value

    @property
    def uncertainty(self) -> float:
        """The spread of the measurements in use, gathering left out: it is short, and often the noisiest."""
        return max([LEAST_UNCERTAINTY, *(m.spread for m in self._used if m.value > 1e-3)])

    @property
    def day(self) -> str:
        """Of the oldest measurement in use."""
        return min(m.day for m in self._used)

    def _key(self, name: str, arguments: tuple[int, ...]) -> str:
        """A fingerprint of all that the measurement depends on."""
        p = self._params
        own = {
            "step": (p.diffusion.prediction, p.training.flip > 0),
            "update": (p.training.grad_clip is not None, p.training.decay),
            "gather": (self._data,),
            "evaluation": (),
        }[name]
        image = (p.dataset.image_size, p.dataset.channels)
        precision = self._compute.describe()
        return short_hash(
            machine(),
            precision,
            p.compute.attention,
            p.compute.activation_checkpointing,
            p.model,
            image,
            name,
            arguments,
            own,
        )


@cache
def machine() -> tuple[str | int | None, ...]:
    """What makes two machines different to a measurement; the GPU's name is in the precision's description."""
    return cpu_name(), os.cpu_count(), metadata.version("torch")
