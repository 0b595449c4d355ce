"""The command line: one subcommand for each stage, and tools around them. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskdm import __version__
from maskdm.base import interrupts
from maskdm.base.errors import ParamsError, UserError
from maskdm.config import Params, load_params, preflight
from maskdm.config.jobs import ARM_STAGES, STAGE_VERSIONS, Job, Jobs
from maskdm.models import commands as interchange
from maskdm.plan import DEFAULT_UTILISATION, GPUS
from maskdm.stages.score.options import add_export_images, add_score

DESCRIPTION = """\
Does masked pretraining of a diffusion model pay on your data, at equal compute?

The stages read ./params.yaml and write to ./results. You rarely run them yourself:
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
  130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP: training saves its state first; run the same command to resume
"""

PLAN_DESCRIPTION = """\
What every stage will do and cost, before anything runs: visible patches, steps, FLOPs, memory, disk, and time.

Times on this machine come from a few seconds of real steps, sampling and scoring on random data, measured once and kept
in .work/calibration.json; what is not estimated is named below the table. Times on GPUs are FLOPs / (datasheet rate ×
utilisation): an assumption, not a measurement.
Below the table are warnings: fixed costs that use up what masking saves, too little memory, a disk that is too small.
"""
PLAN_EPILOG = """\
examples:
  maskdm plan                                    every number, on this machine and on all GPUs that are known
  maskdm plan --gpu A100 --utilisation 0.3       one GPU, at 30 % of its datasheet's rate
  maskdm plan --no-calibration                   the arithmetic alone
"""

NEW_DESCRIPTION = """\
Make a new experiment from another one: a folder with a changed copy of its params.yaml (comments are kept), and a
dvc.yaml, a link that DVC needs. Snakemake needs no link. Most experiments that come with maskdm have none, because
every linked experiment makes `dvc repro` slower; to run one with DVC, make your own from it. Relative paths in
params.yaml are changed so that they lead to the same files.
"""
NEW_EPILOG = """\
examples:
  maskdm new experiments/mine --from experiments/celebahq256 --set dataset.root=/data/faces.zip
  maskdm new experiments/quick --from . --set budget.unmasked_steps=100 --set sampling.num_samples=400
  maskdm new /tmp/smoke --from experiments/cifar10 --arms scratch,block2-m50 --set model.dim=64 --set model.depth=3
"""

RESUMES = "what was finished is kept; run the same command to resume"

TRACK_DESCRIPTION = """\
Publish results/ to MLflow: every arm, stage and trial that is up to date or has failed, and the final models.
The stage `report` and every stage of more than a minute do this by themselves at their end; run it after a clone, or
when MLflow could not be reached. A second time it changes nothing.
"""

STATUS_DESCRIPTION = """\
The state of every stage of every arm, and what prevents progress. Nothing is changed or computed.

  done          its output is what params.yaml asks for
  running       a process works on it: which, since when, at which step, how long it will take
  failed        with the reason and the log
  resumable     it was interrupted: the step from which it resumes
  out of date   its output was made from other values or inputs: which
  after tuning  the arm's values are not chosen yet
  missing       nothing is there yet
Below the table: a lock file that keeps DVC from working, damaged files, a full disk, each with the command that helps.
If a run is interrupted, run the same command: it resumes.
"""
STATUS_EPILOG = """\
examples:
  maskdm status                                  where the experiment of ./params.yaml stands
  maskdm status --watch                          the same, again every 5 seconds, until Ctrl-C
  maskdm status --json | jq '.jobs[] | select(.state == "failed")'
  (cd experiments/tiny && maskdm status)         another experiment
exit codes: 0; 1 something has failed or prevents progress; 2 wrong params.yaml; with --watch 0 after Ctrl-C
"""

VERIFY_DESCRIPTION = """\
Read every file of every output again, and compare its sha256 with that of the file that was written. Use it after a
crash of the machine, after copying results, or when you doubt the disk: to decide whether an output is up to date,
stages compare file sizes only. Each damaged output is printed with the command that makes it again. A complete output
that is out of date is not damaged.
"""
VERIFY_EPILOG = """\
examples:
  maskdm verify                                  the outputs of the experiment of ./params.yaml
  (cd experiments/tiny && maskdm verify)         another experiment
exit codes: 0 all files are what was written; 1 some are not; 2 wrong params.yaml
"""

STAGES = {
    "prepare": "dataset → arrays of uint8 in results/data",
    "features": "the feature extractor and the real images' features",
    "scale": "reference scores: real images against real images, and the untrained network",
    "tune": "one trial of one arm: other hyperparameters, a fraction of the budget",
    "choose": "for every arm, the values of its best trial",
    "pretrain": "masked denoising score matching on the visible patches",
    "finetune": "unmasked denoising score matching from the pretrained checkpoint",
    "sample": "images from the averaged weights at every milestone",
    "evaluate": "FID, KID, precision and recall of the samples",
    "report": "tables, figures and the page over all arms, in results/report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit code."""
    _print_any_character()
    options = build_parser().parse_args(arguments)
    interrupts.install()
    try:
        if options.run is None:
            job = _job(options)
            from maskdm.stages.runner import run_stage

            run_stage(job, options.force)
        else:
            options.run(options)
    except UserError as error:
        print(f"maskdm: error: {error}", file=sys.stderr)
        return error.exit_code
    except interrupts.Stopped as stopped:
        with suppress(OSError):  # the terminal may be gone
            print(f"maskdm: stopped by {stopped.number.name}: {stopped.message or RESUMES}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("maskdm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, e.g. `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _print_any_character() -> None:
    """Print ? for what the terminal's encoding lacks: an × in a table must not end hours of work. stderr escapes it."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caller in this process may have put another stream there
        sys.stdout.reconfigure(errors="replace")


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
    add_score(_add(commands, "score", "FID, KID, precision and recall between two sets of images", _score))
    add_export_images(_add(commands, "export-images", "a set of images as PNG files", _export_images))
    _add(commands, "summary", "print the result table of a finished experiment", _summary)
    _add(commands, "track", "publish results/ to MLflow", _track).description = TRACK_DESCRIPTION
    _add_status(commands)
    _add_verify(commands)
    ui = _add(commands, "ui", "open MLflow's UI on the arms of this experiment", _ui)
    ui.add_argument("--port", type=int, default=5000, help="where to listen (default: 5000)")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    what: str,
    run: Callable[[argparse.Namespace], None] | None,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    command.set_defaults(run=run)
    return command


def _add_stage(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str) -> None:
    command = _add(commands, name, what, None)
    command.set_defaults(stage=name)
    if name in (*ARM_STAGES, "tune"):
        command.add_argument("--arm", required=True, help="a key of `arms` in params.yaml, e.g. patch-m50")
    if name in ARM_STAGES:
        command.add_argument("--seed", required=True, type=int, help="one of `seeds` in params.yaml")
    if name == "tune":
        command.add_argument("--trial", required=True, help="a key of `tuning.trials` in params.yaml, e.g. lr-low")
    command.add_argument("--force", action="store_true", help="run it even if the output is up to date")
    command.add_argument(
        "--stage-version",
        type=int,
        help="used by DVC and Snakemake, not by hand: the version of this stage's code that they expect",
    )


def _job(options: argparse.Namespace) -> Job:
    """The job to run, after the libraries are configured for it."""
    stage = options.stage
    _check_version(stage, options.stage_version)
    params = load_params()
    which = _which(params, stage, options)
    _prepare_libraries(params.compute.threads)
    return Jobs(params).find(stage, **which)


def _prepare_libraries(threads: int) -> None:
    """Limit BLAS to the stage's threads, and make CUDA's BLAS reproducible; both read this when they are imported."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA


def _check_version(stage: str, expected: int | None) -> None:
    if expected is not None and expected != STAGE_VERSIONS[stage]:
        raise ParamsError(
            f"the workflow expects version {expected} of stage {stage}, this maskdm has {STAGE_VERSIONS[stage]}: "
            "dvc.yaml or the Snakefile and the installed package come from different commits"
        )


def _which(params: Params, stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """The arm and the seed or trial of a stage, from the options; empty for a stage of the whole experiment.

    Raises:
        ParamsError: params.yaml does not have them.
    """
    if stage not in (*ARM_STAGES, "tune"):
        return {}
    params.arm(options.arm)
    if stage == "tune":
        if options.trial not in params.tuning.trials:
            known = ", ".join(params.tuning.trials) or "none, nothing is tuned"
            raise ParamsError(f"no trial {options.trial!r} in tuning.trials: {known}")
        return {"arm": options.arm, "trial": options.trial}
    if options.seed not in params.seeds:
        raise ParamsError(f"seed {options.seed} is not in `seeds` of params.yaml: {params.seeds}")
    return {"arm": options.arm, "seed": options.seed}


def _validate(options: argparse.Namespace) -> None:
    params = load_params()
    preflight.check(params)
    arms, seeds = len(params.arms), len(params.seeds)
    print(
        f"params.yaml is valid: experiment {params.name!r}, {arms} arm{'s' * (arms > 1)} × {seeds} seed"
        f"{'s' * (seeds > 1)}, {params.grid.rows}×{params.grid.cols} patches"
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
        help="the share of its datasheet's rate that a GPU is assumed to reach, in (0, 1] (default: %(default)s)",
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
    from maskdm.config.new_experiment import new_experiment, next_steps

    new_experiment(options.folder, options.source, options.changes, options.arms)
    print(next_steps(options.folder))


def _score(options: argparse.Namespace) -> None:
    _prepare_libraries(options.threads)
    from maskdm.stages.score.command import score

    score(options)


def _export_images(options: argparse.Namespace) -> None:
    _prepare_libraries(options.threads)
    from maskdm.stages.score.command import export_images

    export_images(options)


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
    from maskdm.plan import run

    print(run(params, options.gpu, options.utilisation, not options.no_calibration, options.recalibrate))


def _summary(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.report import print_summary

    print_summary(params)


def _track(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.tracking.publishing import track
    from maskdm.tracking.store import shown, store_uri

    done = track(Jobs(params))
    where = f"MLflow at {shown(store_uri())}"
    print(f"{where} has {done.runs} runs of experiment {params.name!r}; {done.written} of them were written now")


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(
        commands, "status", "what is done, running, failed or out of date, and what prevents progress", _status
    )
    command.description, command.epilog = STATUS_DESCRIPTION, STATUS_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=5.0,
        metavar="SECONDS",
        help="show it again every so many seconds, until Ctrl-C (default: 5)",
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object: jobs with state and details, problems"
    )


def _status(options: argparse.Namespace) -> None:
    from maskdm.status import run_status

    if run_status(options.json, options.watch):
        raise SystemExit(1)


def _seconds(text: str) -> float:
    """An option's value above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, such as 5, got {text}")
    return value


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(commands, "verify", "hash every output: is it what was written?", _verify)
    command.description, command.epilog = VERIFY_DESCRIPTION, VERIFY_EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter


def _verify(options: argparse.Namespace) -> None:
    from maskdm.status import run_verify

    if run_verify():
        raise SystemExit(1)


def _ui(options: argparse.Namespace) -> None:
    params = load_params()
    from maskdm.tracking.ui import open_ui

    open_ui(params, options.port)
