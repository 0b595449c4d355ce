"""The command line: one subcommand per stage, and what helps around them. Imports of weight are made when used."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

from maskdm import __version__, formats, interchange, interrupts, preflight
from maskdm.config import Params, load_params
from maskdm.errors import ParamsError, UserError
from maskdm.fid.options import add_export_images, add_fid
from maskdm.plan.gpus import DEFAULT_UTILISATION, GPUS
from maskdm.stages.versions import STAGE_VERSIONS

DESCRIPTION = """\
Does masked pretraining of a diffusion model pay on your data, at equal compute?

Every command reads ./params.yaml and writes below ./results. You rarely type the stages yourself:
  dvc repro                 runs what is not up to date, one stage after the other
  snakemake --cores N       the same stages, arms in parallel
"""
EPILOG = """\
order of the stages:
  prepare → features → scale
  tune (every arm and trial) → choose
  pretrain → finetune → sample → evaluate   (every arm and seed)
  all of them → report
exit codes: 0 done, 1 a stage failed, 2 wrong params.yaml or command line (nothing was started),
  130 stopped by Ctrl-C, 143 by SIGTERM: training saves its state first; the same command goes on from there
"""

PLAN_DESCRIPTION = """\
What every arm would do and cost, before anything runs: visible patches, steps, FLOPs, memory, disk, and time.

Times on this machine come from a few seconds of real steps on random data, measured once and kept in
.work/calibration.json. Times on GPUs are FLOPs / (datasheet rate × utilisation): an assumption, not a measurement.
Below the table it says what stands against the plan: fixed costs that eat what masking saves, steps that wait for
their data, a disk that is too small.
"""
PLAN_EPILOG = """\
examples:
  maskdm plan                                    every number, on this machine and on all GPUs that are known
  maskdm plan --gpu A100 --utilisation 0.3       one GPU, at 30 % of its datasheet's rate
  maskdm plan --no-calibration                   the arithmetic alone
"""

NEW_DESCRIPTION = """\
A new experiment from another one: a folder with a changed copy of its params.yaml (comments kept), and the link that
lets DVC run it. Snakemake needs no link, and the experiments that come with maskdm have none, as every linked one slows
`dvc repro` down: to run one with DVC, make yours from it. Paths go on leading to the same files.
"""
NEW_EPILOG = """\
examples:
  maskdm new experiments/mine --from experiments/celeba64 --set dataset.root=/data/faces.zip
  maskdm new experiments/quick --from . --set budget.unmasked_steps=100 --set sampling.num_samples=400
  maskdm new /tmp/smoke --from experiments/cifar10 --arms scratch,block2-m50 --set model.dim=64 --set model.depth=3
"""

GOES_ON = "what was finished is kept; the same command goes on from there"

DOCTOR_DESCRIPTION = """\
What a crash has left in the folder of params.yaml, what it means, and what helps. Changes nothing without --fix.

After a crash you need not ask: the same command again goes on. Ask when it fails, or waits, or the disk is full.
Looked at: DVC's locks; stages at work, also those whose engine is gone; saved, damaged and set-aside work;
half-built outputs; the clock; room and permissions; what MLflow has not got; params.yaml; installed versions.
"""
DOCTOR_EPILOG = """\
examples:
  maskdm doctor                                  look and explain
  maskdm doctor --fix                            mend what can be mended: drop DVC's stale locks, stop orphaned stages
                                                 (they save first), remove damaged and half-built files, send to MLflow
  (cd experiments/tiny && maskdm doctor)         another experiment
each finding is marked: ok, info (good to know), problem (with → what to do) or fixed
exit codes: 0 no problem, or none any more; 1 a problem is left
"""

STAGES = {
    "prepare": "dataset → arrays of uint8 in results/data",
    "features": "the feature extractor and the real images' features",
    "scale": "the two ends of the metrics: real images against real ones, and the untrained network",
    "tune": "one trial of one arm: other values, a fraction of the budget",
    "choose": "for every arm the values of its best trial",
    "pretrain": "masked denoising score matching on the visible patches",
    "finetune": "unmasked denoising score matching from the pretrained checkpoint",
    "sample": "images from the averaged weights at every milestone",
    "evaluate": "FID, KID, precision and recall of the samples",
    "report": "tables, figures and the page over all arms, in results/report",
}
ARM_STAGES = set(formats.ARM_STAGES)  # take --arm and --seed
TRIAL_STAGES = {"tune"}  # take --arm and --trial


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit code."""
    options = build_parser().parse_args(arguments)
    interrupts.install()
    try:
        options.run(options)
    except UserError as error:
        print(f"maskdm: error: {error}", file=sys.stderr)
        return error.exit_code
    except interrupts.Stopped as stopped:
        with suppress(OSError):  # the terminal may be gone
            print(f"maskdm: stopped by {stopped.number.name}: {stopped.message or GOES_ON}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("maskdm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output, e.g. `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        "maskdm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maskdm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, what in STAGES.items():
        _add_stage(commands, name, what)
    _add(commands, "validate", "check params.yaml and the weights it names; nothing is computed", _validate)
    _add_plan(commands)
    _add_new(commands)
    interchange.add_import_arguments(
        _add(
            commands,
            "import-checkpoint",
            "MaskDM's or U-ViT's checkpoint → a folder to draw from",
            interchange.run_import,
        )
    )
    interchange.add_export_arguments(
        _add(commands, "export", "a checkpoint → safetensors, config.json and a model card", interchange.run_export)
    )
    add_fid(_add(commands, "fid", "FID, KID, precision and recall between two sets of images", _fid))
    add_export_images(_add(commands, "export-images", "a set of images as PNG files", _export_images))
    _add(commands, "summary", "print the result table of a finished experiment", _summary)
    _add(commands, "sync", "send to MLflow what is still kept on disk", _sync)
    _add_doctor(commands)
    ui = _add(commands, "ui", "open MLflow's UI on the arms of this experiment", _ui)
    ui.add_argument("--port", type=int, default=5000, help="where to listen (default: 5000)")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    what: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    command.set_defaults(run=run)
    return command


def _add_stage(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str) -> None:
    command = _add(commands, name, what, _run_stage)
    command.set_defaults(stage=name)
    if name in ARM_STAGES | TRIAL_STAGES:
        command.add_argument("--arm", required=True, help="a key of `arms` in params.yaml, e.g. patch-m50")
    if name in ARM_STAGES:
        command.add_argument("--seed", required=True, type=int, help="one of `seeds` in params.yaml")
    if name in TRIAL_STAGES:
        command.add_argument("--trial", required=True, help="a key of `tuning.trials` in params.yaml, e.g. lr-low")
    if name == "prepare":
        command.add_argument(
            "--part", type=int, help="make this part of data.prepare_jobs ahead, from 0 (default: all, and the result)"
        )
    command.add_argument(
        "--stage-version",
        type=int,
        help="what the workflow engines expect of this stage's code; it makes them rerun the stage when its code "
        "computes something else (default: do not check)",
    )


def _run_stage(options: argparse.Namespace) -> None:
    stage = options.stage
    _check_version(stage, options.stage_version)
    params = load_params()
    which = _which(params, stage, options)
    _prepare_libraries(params.compute.threads)
    _import_for_good(f"maskdm.stages.{stage}").run(params, *which)


def _import_for_good(name: str) -> ModuleType:
    """Import a module with all that it needs, and never look for garbage among it, not even when the process ends.

    There is none, and looking is a quarter of the CPU time of starting and ending a process with PyTorch.
    """
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _prepare_libraries(threads: int) -> None:
    """Keep BLAS to the stage's cores, and CUDA's to reproducible results; both read this when they are imported."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA


def _check_version(stage: str, expected: int | None) -> None:
    if expected is not None and expected != STAGE_VERSIONS[stage]:
        raise ParamsError(
            f"the workflow expects version {expected} of stage {stage}, this maskdm has {STAGE_VERSIONS[stage]}: "
            "dvc.yaml or workflow/rules and the installed package come from different commits"
        )


def _which(params: Params, stage: str, options: argparse.Namespace) -> tuple[str | int, ...]:
    """The arm and the seed or trial that a stage is to work on, if it works on one.

    Raises:
        ParamsError: params.yaml has no such.
    """
    if stage == "prepare" and options.part is not None:
        return (options.part,)
    if stage not in ARM_STAGES | TRIAL_STAGES:
        return ()
    params.arm(options.arm)
    if stage in TRIAL_STAGES:
        if options.trial not in params.tuning.trials:
            raise ParamsError(f"no trial {options.trial!r} in tuning.trials: {', '.join(params.tuning.trials)}")
        return options.arm, options.trial
    if options.seed not in params.seeds:
        raise ParamsError(f"seed {options.seed} is not in `seeds` of params.yaml: {params.seeds}")
    return options.arm, options.seed


def _validate(options: argparse.Namespace) -> None:
    params = load_params()
    preflight.check(params)
    print(
        f"params.yaml is valid: experiment {params.name!r}, {len(params.arms)} arms × {len(params.seeds)} seeds, "
        f"{params.grid.rows}×{params.grid.cols} patches"
    )
    for missing in params.missing_files():
        print(f"! {missing} yet")


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(commands, "plan", "what every arm would do and cost, here and on GPUs; runs nothing", _plan)
    command.description = PLAN_DESCRIPTION
    command.epilog = PLAN_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument(
        "--gpu",
        action="append",
        default=[],
        type=str.upper,
        choices=list(GPUS),
        help="give times for this GPU; may be repeated (default: all that are known)",
    )
    command.add_argument(
        "--utilisation",
        type=_utilisation,
        default=DEFAULT_UTILISATION,
        metavar="U",
        help="the share of its datasheet's rate that a GPU is said to reach, in (0, 1] (default: %(default)s)",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--recalibrate", action="store_true", help="measure this machine again")
    which.add_argument("--no-calibration", action="store_true", help="measure nothing: no times for this machine")


def _add_new(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(commands, "new", "a new experiment from another one, some values changed", _new)
    command.description, command.epilog = NEW_DESCRIPTION, NEW_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("folder", type=Path, help="to be made, e.g. experiments/mine")
    command.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=Path(),
        metavar="EXPERIMENT",
        help="the folder of another experiment (default: this one)",
    )
    command.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value, e.g. budget.unmasked_steps=1000; may be repeated",
    )
    command.add_argument("--arms", type=lambda text: text.split(","), default=[], help="keep these only: a,b,…")


def _new(options: argparse.Namespace) -> None:
    from maskdm.new_experiment import new_experiment, next_steps

    new_experiment(options.folder, options.source, options.changes, options.arms)
    print(next_steps(options.folder))


def _fid(options: argparse.Namespace) -> None:
    _prepare_libraries(options.threads)
    from maskdm.fid.command import run

    run(options)


def _export_images(options: argparse.Namespace) -> None:
    _prepare_libraries(options.threads)
    from maskdm.fid.export import run

    run(options)


def _utilisation(text: str) -> float:
    """An option's value in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], such as 0.4, got {text}")
    return value


def _plan(options: argparse.Namespace) -> None:
    params = load_params()
    preflight.check(params)
    _prepare_libraries(params.compute.threads)
    # beside other work, threads that spin while they wait make a step thirty times as long, and here that is measured
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from maskdm.plan.command import PlanOptions, run

    print(
        run(
            params,
            PlanOptions(tuple(options.gpu), options.utilisation, not options.no_calibration, options.recalibrate),
        )
    )


def _summary(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.report import print_summary

    print_summary(params)


def _sync(options: argparse.Namespace) -> None:
    from maskdm.tracking import sync

    sync()


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(commands, "doctor", "find what a crash has left, explain it, and mend it with --fix", _doctor)
    command.description, command.epilog = DOCTOR_DESCRIPTION, DOCTOR_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("--fix", action="store_true", help="mend what can be mended; unfinished work is never deleted")


def _doctor(options: argparse.Namespace) -> None:
    from maskdm.doctor.command import run

    if run(options.fix):
        raise SystemExit(1)


def _ui(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.ui import open_ui

    open_ui(params, options.port)
