"""When masking can't help, or the machine will not do: said in words, by stated thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from maskdm.base.units import size
from maskdm.config import Params, Run, Training, resolve
from maskdm.plan.calibration import Calibration
from maskdm.plan.estimates import micro_batch_of
from maskdm.plan.gpus import Gpu
from maskdm.training.devices import Compute

# A masked step per image should cost, of an unmasked one, what its FLOPs do; where it costs this many times as much,
# most of it is not arithmetic.
FIXED_COSTS_DOMINATE = 1.5
# Measurements that scatter by more say nothing about either.
TOO_NOISY = 0.5
# The share of a step that goes into waiting for its batch, from which on a faster network would not help much.
DATA_BOUND = 0.3
# A GPU step of less arithmetic than this lasts as long as launching its kernels does: some milliseconds.
LAUNCH_BOUND_SECONDS = 5e-3


def warnings_of(params: Params, compute: Compute, calibration: Calibration | None) -> list[str]:
    """What the measurements say against the plan, one sentence each; equal findings of several arms are one."""
    if calibration is None:
        return []
    if calibration.uncertainty > TOO_NOISY:
        return [
            f"the measurements scatter by ±{calibration.uncertainty:.0%}, too much to say whether masking helps here: "
            "--recalibrate when the machine has nothing else to do"
        ]
    fixed: dict[str, list[str]] = {}
    slow_data: dict[str, list[str]] = {}
    for arm in params.arms:
        run = resolve(params, arm, params.seeds[0])
        for message in _fixed_costs(compute, run, calibration):
            fixed.setdefault(message, []).append(arm)
        for message in _data_bound(compute, run, calibration):
            slow_data.setdefault(message, []).append(arm)
    return [f"{_arms(params, arms)}: {message}" for found in (fixed, slow_data) for message, arms in found.items()]


def disk_warning(needed: float, free: float) -> str | None:
    """Whether what the experiment writes fits."""
    if needed <= free:
        return None
    return f"disk: the experiment writes {size(needed)}, and {size(free)} are free here"


def threads_warning(threads: int, cores: int) -> str | None:
    """Whether a stage is given more threads than the machine has cores."""
    if threads <= cores:
        return None
    return (
        f"compute.threads is {threads}, and this machine has {cores} cores: stages would run slower for it. "
        f"Times are measured with {cores}"
    )


def memory_warning(needed: float, there: float) -> str | None:
    """Whether the stage that needs most fits into the memory of the machine or its GPU."""
    if needed <= there:
        return None
    return (
        f"memory: a stage needs about {size(needed)}, and there are {size(there)} in all; "
        "a micro_batch_size in pretrain and finetune, or a smaller sampling.batch_size, lowers it"
    )


def launch_warnings(params: Params, gpus: Iterable[Gpu], precision: str, utilisation: float) -> list[str]:
    """Where a GPU would spend its time on launching kernels: there masking saves FLOPs and no time.

    Args:
        params: the experiment.
        gpus: that times were given for.
        precision: of training.
        utilisation: that they were given with.
    """
    steps = {arm: _smallest_step(resolve(params, arm, params.seeds[0])) for arm in params.arms}
    names: dict[tuple[str, ...], list[str]] = {}
    for gpu in gpus:
        bound = tuple(a for a, f in steps.items() if gpu.seconds(f, precision, utilisation) < LAUNCH_BOUND_SECONDS)
        if bound:
            names.setdefault(bound, []).append(gpu.name)
    return [
        f"{', '.join(fast)}: the smallest step of {_arms(params, bound)} is less than {LAUNCH_BOUND_SECONDS * 1e3:.0f} "
        "ms of arithmetic there, and launching its kernels takes about as long: expect more time than the table says; "
        "a larger batch amortises it"
        for bound, fast in names.items()
    ]


def time_ratio(compute: Compute, run: Run, calibration: Calibration) -> tuple[float, float]:
    """A masked training step of an arm against its unmasked one, per image: in measured time, and in FLOPs."""
    masked, unmasked = (
        calibration.compute_seconds(stage, micro_batch_of(stage, compute)) / stage.batch_size
        for stage in (run.pretrain, run.finetune)
    )
    return masked / unmasked, _image_flops(run.pretrain) / _image_flops(run.finetune)


def _fixed_costs(compute: Compute, run: Run, calibration: Calibration) -> Iterable[str]:
    if not run.pretrain.num_steps:
        return
    seconds, flops = time_ratio(compute, run, calibration)
    if seconds > FIXED_COSTS_DOMINATE * flops:
        yield (
            f"pretraining at S = {run.pretrain.num_visible}, batch {run.pretrain.batch_size} costs "
            f"{seconds / flops:.1f}× its FLOPs here ({seconds:.2f} of an unmasked image's time for {flops:.2f} of its "
            "FLOPs): fixed costs dominate; a larger pretrain.batch_size amortises them"
        )


def _data_bound(compute: Compute, run: Run, calibration: Calibration) -> Iterable[str]:
    for stage in (run.pretrain, run.finetune):
        if not stage.num_steps:
            continue
        gather = calibration.gather_seconds(stage.batch_size)
        share = gather / calibration.step_seconds(stage, micro_batch_of(stage, compute))
        if share > DATA_BOUND:
            yield (
                f"{share:.0%} of a {stage.stage} step at S = {stage.num_visible}, batch {stage.batch_size} is waiting "
                "for its images: masking can't shorten that"
            )


def _image_flops(stage: Training) -> float:
    return stage.flops_per_step / stage.batch_size


def _smallest_step(run: Run) -> int:
    return min(stage.flops_per_step for stage in (run.pretrain, run.finetune) if stage.num_steps)


def _arms(params: Params, arms: Sequence[str]) -> str:
    """Their names, unless they are all."""
    return "all arms" if len(arms) == len(params.arms) > 1 else ", ".join(arms)
