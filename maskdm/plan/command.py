"""`maskdm plan` from params to text."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from maskdm.base.errors import UserError
from maskdm.base.units import size
from maskdm.config import ComputeConfig, Params, paths
from maskdm.plan.calibration import Calibration, calibrate
from maskdm.plan.estimates import Estimates, estimate, work_of
from maskdm.plan.findings import disk_warning, launch_warnings, memory_warning, threads_warning, warnings_of
from maskdm.plan.gpus import GPUS
from maskdm.plan.store import MeasurementStore
from maskdm.plan.table import Outlook, crop_windows, format_table, paragraph
from maskdm.training import devices
from maskdm.training.devices import Compute


@dataclass(frozen=True)
class PlanOptions:
    """The command's options.

    Attributes:
        gpus: names of GPUs to give times for; none means all that are known.
        utilisation: the share of their rate that they are said to reach.
        calibrate: whether to measure this machine.
        recalibrate: measure even what was measured before.
    """

    gpus: tuple[str, ...]
    utilisation: float
    calibrate: bool = True
    recalibrate: bool = False


def run(params: Params, options: PlanOptions) -> str:
    """Plan, measuring this machine where that is wanted and possible; the text to print."""
    store = MeasurementStore(forget=options.recalibrate)
    compute, missing = _resolve(params.compute)
    wanted = options.calibrate and not missing
    calibration = calibrate(params, compute, work_of(params, compute), store) if wanted else None
    estimates = estimate(params, compute, calibration, store)
    precision = "fp32" if params.compute.precision == "fp32" else "bf16"
    gpus = tuple(GPUS[name] for name in dict.fromkeys(options.gpus or GPUS))
    outlook = Outlook(gpus, options.utilisation, precision, calibration)
    return "\n\n".join(
        [
            format_table(estimates, outlook),
            "\n".join(paragraph(text) for text in words(params, compute, estimates, outlook, missing)),
            "\n".join(paragraph(text, "! ") for text in warnings(params, compute, estimates, outlook)),
        ]
    ).rstrip()


def words(
    params: Params, compute: Compute, estimates: Estimates, outlook: Outlook, missing: str | None = None
) -> list[str]:
    """How to read the table."""
    windows = crop_windows(params)
    return [
        f"An arm's row is one seed, its stages below; the seeds are {', '.join(map(str, params.seeds))}. Arms are "
        f"matched by {params.budget.match}. Steps of sample are evaluations of the network on a batch, for all "
        "milestones. A batch that enters the network in parts says how large they are (by N)."
        + (f" Windows of crop in patches: {windows}." if windows else ""),
        _words_on_time(outlook.calibration, missing),
        _words_on_gpus(outlook),
        *([_words_on_devices(params.compute.devices)] if params.compute.devices > 1 else []),
        _words_on_memory(compute),
        _words_on_disk(estimates),
        *([_words_on_tuning(params)] if estimates.tuning else []),
    ]


def warnings(params: Params, compute: Compute, estimates: Estimates, outlook: Outlook) -> list[str]:
    """What stands against the plan."""
    total = estimates.seeds
    found = [
        *(f"{missing} yet" for missing in params.missing_files()),
        *warnings_of(params, compute, outlook.calibration),
        *launch_warnings(params, outlook.gpus, outlook.precision, outlook.utilisation),
        threads_warning(params.compute.threads, num_cores()),
        memory_warning(total.memory, total_memory(compute)),
        disk_warning(total.disk + estimates.resumable, free_bytes()),
    ]
    return [text for text in found if text is not None]


def total_memory(compute: Compute) -> int:
    """Of the device."""
    if compute.device.type == "cuda":
        return torch.cuda.get_device_properties(compute.device).total_memory
    return int(psutil.virtual_memory().total)


def free_bytes() -> int:
    """Where results go."""
    return shutil.disk_usage(paths.RESULTS if paths.RESULTS.exists() else Path()).free


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolve(config: ComputeConfig) -> tuple[Compute, str | None]:
    """Where stages would compute here, on no more threads than there are cores, and what is missing for that."""
    config = config.model_copy(update={"threads": min(config.threads, num_cores())})
    try:
        return devices.resolve(config), None
    except UserError as error:
        return devices.resolve(config.model_copy(update={"device": "cpu"})), str(error)


def _words_on_time(calibration: Calibration | None, missing: str | None) -> str:
    if missing:
        return f"This machine was not measured: {missing}."
    if calibration is None:
        return "This machine was not measured (--no-calibration)."
    data = "results/data" if calibration.is_real_data else "made-up images, as nothing is prepared yet"
    return (
        f"This machine ({calibration.machine}): from a few steps measured on {calibration.day}, with batches from "
        f"{data}; about ±{calibration.uncertainty:.0%}, and more while other work runs. Stages one after the other; "
        "saving, logging and scoring are left out. " + _words_on_missing(calibration.num_missing)
    )


def _words_on_missing(num_missing: int) -> str:
    if not num_missing:
        return "--recalibrate measures again."
    return f"It was too busy to measure {num_missing} of the masks, which are scaled; the next `maskdm plan` goes on."


def _words_on_gpus(outlook: Outlook) -> str:
    rates = ", ".join(f"{gpu.name} {gpu.rate(outlook.precision) / 1e12:g}" for gpu in outlook.gpus)
    kind = "bf16" if outlook.precision == "bf16" else "TF32, which float32 products run in,"
    without = [g.name for g in outlook.gpus if g.bf16 is None]
    reason = "it has no bf16" if outlook.precision == "bf16" else "it has no TF32"
    note = f" ({', '.join(without)}: float32, as {reason})" if without else ""
    return (
        f"GPUs: FLOPs / (datasheet rate × {outlook.utilisation:g}); dense {kind} rates in TFLOP/s: {rates}{note}. "
        "The utilisation is an assumption (--utilisation); small networks reach less."
    )


def _words_on_devices(num_devices: int) -> str:
    return (
        f"compute.devices is {num_devices}: memory is that of each, with its share of a batch; times are those of one "
        "alone, which several divide between them where they do not share cores."
    )


def _words_on_memory(compute: Compute) -> str:
    where = "of the process, PyTorch included" if compute.device.type == "cpu" else "on the device"
    kernel = (
        " with this CPU's attention, which keeps its weights where tokens are few; a GPU's keeps less"
        if compute.device.type == "cpu"
        else ""
    )
    return (
        f"Memory: the peak {where}, counted on the network in {compute.describe()['precision']}{kernel}: "
        "weights, gradients, moments, average, what backward needs of a (micro-)batch."
    )


def _words_on_disk(estimates: Estimates) -> str:
    return (
        f"Disk: outputs of {size(estimates.seeds.disk)}, {size(free_bytes())} free; each training stage that is "
        f"running needs up to {size(estimates.resumable)} more. DVC's cache may hold the outputs a second time."
    )


def _words_on_tuning(params: Params) -> str:
    tuning = params.tuning
    return (
        f"Tuning: every arm tries {len(tuning.trials)} trials at {tuning.budget_fraction:.0%} of the budget on seed "
        f"{tuning.seed}. The rows above are with the values as given; a chosen batch size changes them."
    )
