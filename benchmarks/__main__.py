"""The benchmarks as a command: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.record import (
    FORMAT,
    create_record,
    header,
    path_for,
    read_record,
    replace_record,
    section,
    summary,
)
from benchmarks.shapes import SHAPES, Settings
from maskdm.base.errors import UserError

# name → (module, function that takes `Settings` and returns an `Outcome`, what it measures)
BENCHMARKS = {
    "train_step": ("train_step", "run", "real training steps at every mask rate, against the machine, FLOPs and timm"),
    "sampling": ("sampling", "run", "images/s, and FID against evaluations (trains the default's scratch arm)"),
    "attention": ("attention", "run", "plain attention against PyTorch's kernel: the basis of the rules in uvit.py"),
    "workflow": ("workflow", "run", "start-up of commands, and `dvc repro` with nothing to do"),
    "gpu": ("gpu", "run", "on a CUDA device: MFU, memory, compiled or eager, images on the device or streamed"),
    "workflow-default": ("workflow", "run_default", "the default experiment in both engines, 10 minutes a round"),
}
ALWAYS = [name for name in BENCHMARKS if name != "workflow-default"]
ROUNDS, QUICK_ROUNDS = 7, 2
DESCRIPTION = """Measure how fast this checkout is on this machine, and which targets hold.

Tasks alternate (A, B, C, C, B, A, …). Cells are medians over the rounds with quartiles in brackets; ratios are taken
within a round, so that a noisy machine disturbs them least. Run nothing else on the machine meanwhile."""
EPILOG = """examples:
  python -m benchmarks                                 everything but workflow-default: a quarter of an hour on 2 cores
  python -m benchmarks --only train_step --shapes small
  python -m benchmarks --quick --out /tmp/record.json  two rounds without the long parts: to see that it runs
  python -m benchmarks --table benchmarks/records/X.json    a record's tables, as Markdown

A full run (without --only, --shapes and --quick, seven rounds or more) writes its record to benchmarks/records.
exit code: 0 also if a target does not hold, which the last table says; 2 for a mistake in the command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the requested benchmarks; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.table:
            _print_table(options.table, options.only)
        else:
            _benchmark(options)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_table(path: Path, names: Sequence[str] | None) -> None:
    """Print a record's tables as Markdown: those of the named benchmarks, or all and the list of targets."""
    record = read_record(path)
    shown = _known(names, record["benchmarks"]) or list(record["benchmarks"])
    parts = [header(record), *(f"## {name}\n\n{section(record, name, 'github')}" for name in shown)]
    print("\n\n".join(parts if names else [*parts, f"## targets\n\n{summary(record, 'github')}"]))


def _benchmark(options: argparse.Namespace) -> None:
    """Measure, and write the record; an empty one is written before the first measurement."""
    names, shapes = _known(options.only, BENCHMARKS), _known(options.shapes, SHAPES)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    is_full = not (names or shapes or options.quick) and rounds >= ROUNDS
    record = {
        "format": FORMAT,
        "machine": machine.describe(options.threads),
        "rounds": rounds,
        "is_quick": options.quick,
        "is_complete": False,
        "benchmarks": {},
    }
    path = options.out or path_for(record["machine"], is_full)
    create_record(record, path)
    print(header({**record, "is_complete": True}), flush=True)
    with tempfile.TemporaryDirectory(prefix="maskdm-bench-") as folder:
        measured = tuple(SHAPES[name] for name in shapes or SHAPES)
        settings = Settings(Path(folder), rounds, options.quick, measured, options.threads)
        _measure(names or ALWAYS, settings, record, path)
    print(f"\n== all targets\n\n{header(record)}\n\n{summary(record)}\n\nrecord: {path}")


def _measure(names: Sequence[str], settings: Settings, record: dict[str, Any], path: Path) -> None:
    """Run benchmarks; print each one's tables and add them to the record."""
    started = time.monotonic()
    for number, name in enumerate(names, 1):
        module, function, what = BENCHMARKS[name]
        print(f"\n== {name} ({number} of {len(names)}): {what}\n", flush=True)
        begun, run = time.monotonic(), getattr(import_module(f"benchmarks.{module}"), function)
        record["benchmarks"][name] = {**run(settings).as_dict(), "seconds": round(time.monotonic() - begun, 3)}
        record["is_complete"] = number == len(names)
        record["seconds"] = round(time.monotonic() - started, 1)
        replace_record(record, path)
        print(section(record, name, "simple"), flush=True)


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<17} {what}" for name, (_, _, what) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=f"{DESCRIPTION}\n\nbenchmarks:\n{names}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, cores = parser.add_argument, machine.num_cores()
    add("--only", type=_names, metavar="A,B", help="run only these")
    add("--shapes", type=_names, metavar="A,B", help=f"measure only these of {', '.join(SHAPES)}")
    add("--out", type=Path, metavar="FILE", help="where to write the record; existing files are never overwritten")
    add("--rounds", type=_positive, metavar="N", help=f"measurements of everything ({ROUNDS}; --quick {QUICK_ROUNDS})")
    add("--threads", type=_positive, default=cores, metavar="N", help=f"CPU threads of a step ({cores})")
    add("--quick", action="store_true", help="few rounds without the long parts; proves nothing")
    add("--table", type=Path, metavar="RECORD", help="print the tables of a record, all or those of --only")
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    return text.split(",")


def _known(names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """The names, checked.

    Raises:
        UserError: one is unknown.
    """
    if unknown := [name for name in names or () if name not in known]:
        raise UserError(f"unknown: {', '.join(unknown)}; expected some of {', '.join(known)}")
    return list(names or ())


if __name__ == "__main__":
    sys.exit(main())
