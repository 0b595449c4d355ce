"""The command line: one subcommand per stage, and what helps around them. Imports of weight are made when used."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType

from maskdm import __version__
from maskdm.config import Params, load_params
from maskdm.errors import ParamsError, UserError
from maskdm.stages.versions import STAGE_VERSIONS

DESCRIPTION = """\
Does masked pretraining of a diffusion model pay on your data, at equal compute?

Every command reads ./params.yaml and writes below ./results. You rarely type the stages yourself:
  dvc repro                 runs what is not up to date, one stage after the other
  snakemake --cores N       the same stages, arms in parallel
"""
EPILOG = """\
order of the stages:
  prepare → features
  prepare → pretrain → finetune → sample → evaluate   (for every arm and seed)
  all of them → report
exit codes: 0 done, 1 a stage failed, 2 wrong params.yaml or command line (nothing was started), 130 interrupted
"""

STAGES = {
    "prepare": "dataset → arrays of uint8 in results/data",
    "features": "the feature extractor, the real images' features, and the floor of the metrics",
    "pretrain": "masked denoising score matching on the visible patches",
    "finetune": "unmasked denoising score matching from the pretrained checkpoint",
    "sample": "images from the averaged weights at every milestone",
    "evaluate": "FID, KID, precision and recall of the samples",
    "report": "tables, figures and the page over all arms, in results/report",
}
ARM_STAGES = {"pretrain", "finetune", "sample", "evaluate"}  # take --arm and --seed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit code."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        options.run(options)
    except UserError as error:
        print(f"maskdm: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("maskdm: interrupted", file=sys.stderr)
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does: what it built half is removed, its MLflow run is marked killed."""
    raise KeyboardInterrupt


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
    _add(commands, "validate", "check params.yaml alone", _validate)
    _add(commands, "plan", "what every arm would do: visible patches, steps, FLOPs; runs nothing", _plan)
    _add(commands, "summary", "print the result table of a finished experiment", _summary)
    _add(commands, "sync", "send to MLflow what is still kept on disk", _sync)
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
    if name in ARM_STAGES:
        command.add_argument("--arm", required=True, help="a key of `arms` in params.yaml, e.g. patch-m50")
        command.add_argument("--seed", required=True, type=int, help="one of `seeds` in params.yaml")
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
    of_arm = (options.arm, options.seed) if stage in ARM_STAGES else ()
    if of_arm:
        _check_arm(params, *of_arm)
    _prepare_libraries(params.compute.threads)
    import_module(f"maskdm.stages.{stage}").run(params, *of_arm)


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


def _check_arm(params: Params, arm: str, seed: int) -> None:
    params.arm(arm)
    if seed not in params.seeds:
        raise ParamsError(f"seed {seed} is not in `seeds` of params.yaml: {params.seeds}")


def _validate(options: argparse.Namespace) -> None:
    params = load_params()
    print(
        f"params.yaml is valid: experiment {params.name!r}, {len(params.arms)} arms × {len(params.seeds)} seeds, "
        f"{params.grid.rows}×{params.grid.cols} patches"
    )


def _plan(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.plan import format_plan

    print(format_plan(params))


def _summary(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.report import print_summary

    print_summary(params)


def _sync(options: argparse.Namespace) -> None:
    from maskdm.tracking import sync

    sync()


def _ui(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.ui import open_ui

    open_ui(params, options.port)
