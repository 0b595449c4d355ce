"""The benchmarks as a command: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import argparse
import os
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
from benchmarks.settings import Settings
from benchmarks.shapes import SHAPES
from maskdm.base.errors import UserError

# name → what it measures; each is a module of this package with `run(settings)`
BENCHMARKS = {
    "train_step": "real training steps at every mask rate, against the machine, the FLOPs and timm's blocks",
    "data": "the loader against PIL behind a DataLoader; how long a step waits for data",
    "sampling": "images/s; quality against evaluations for every sampler (trains the default's scratch arm once)",
    "ema_optimizer": "the share of a step that clipping, AdamW and averaged weights take",
    "scaling": "time against images, tokens, width and batch, with fitted exponents",
    "workflow": "what a stage costs beside its work; start-up; a `dvc repro` with nothing to do",
    "attention": "plain attention against PyTorch's kernel, and its softmax: what the rules of uvit.py rest on",
    "gpu": "on a CUDA device: MFU, memory, compiled or not, images on the device or not",
    "workflow-default": "the default experiment through both engines: 10 minutes a round; only where it is asked for",
}
ONLY_WHEN_ASKED = ("workflow-default",)
ALWAYS = [name for name in BENCHMARKS if name not in ONLY_WHEN_ASKED]
ROUNDS, QUICK_ROUNDS = 7, 2
DESCRIPTION = """Measure how fast this checkout is on this machine, and which targets hold.

Tasks take turns (A, B, C, C, B, A, …); cells are medians over the rounds with quartiles in brackets, and ratios are
taken round by round, so that a noisy machine disturbs them least. Leave the machine alone meanwhile."""
EPILOG = """examples:
  python -m benchmarks                                 all: minutes on 2 cores; the record goes to benchmarks/records
  python -m benchmarks --only train_step --shapes small
  python -m benchmarks --quick --out /tmp/record.json   two rounds, the long parts left out: to see that it runs
  python -m benchmarks --table benchmarks/records/X.json    a record's tables, as Markdown

Only a full run, without --only, --shapes, --quick and with no fewer rounds, is kept in benchmarks/records.
exit code: 0 also where a target does not hold: the last table says which; 2 for a mistake in the command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that were asked for; the exit code."""
    # DataLoader's workers and forked stages end without a word to it, and it complains when all is over
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    options = _parser().parse_args(arguments)
    try:
        _print_table(options.table, options.only) if options.table else _benchmark(options)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_table(path: Path, names: Sequence[str] | None) -> None:
    """Print a record's tables as Markdown: all of them, and all targets, unless some are named."""
    record = read_record(path)
    shown = [name for name in record["benchmarks"] if names is None or name in names]
    parts = [header(record), *(f"## {name}\n\n{section(record, name, 'github')}" for name in shown)]
    print("\n\n".join(parts if names else [*parts, f"## targets\n\n{summary(record, 'github')}"]))


def _benchmark(options: argparse.Namespace) -> None:
    """Measure what was asked for, and write the record, first without a number."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    is_full = not (options.only or options.shapes or options.quick) and rounds >= ROUNDS
    shapes = tuple(SHAPES[name] for name in options.shapes or SHAPES)
    record = {
        "format": FORMAT,
        "machine": machine.describe(options.threads),
        "rounds": rounds,
        "is_quick": options.quick,
        "is_complete": False,
        "benchmarks": {},
        "not_measured": [],
    }
    path = options.out or path_for(record["machine"], is_full)
    create_record(record, path)
    print(header(record | {"is_complete": True}), flush=True)
    with tempfile.TemporaryDirectory(prefix="maskdm-bench-") as folder:
        settings = Settings(Path(folder), rounds, options.quick, shapes, options.threads)
        _measure(options.only or ALWAYS, settings, record, path)
    print(f"\n== all targets\n\n{header(record)}\n\n{summary(record)}\n\nrecord: {path}")


def _measure(names: Sequence[str], settings: Settings, record: dict[str, Any], path: Path) -> None:
    """Run benchmarks, printing and writing what each has given."""
    started = time.monotonic()
    for number, name in enumerate(names, 1):
        print(f"\n== {name} ({number} of {len(names)}): {BENCHMARKS[name]}\n", flush=True)
        begun, outcome = time.monotonic(), _module(name).run(settings).as_dict()
        record["benchmarks"][name] = {**outcome, "seconds": round(time.monotonic() - begun, 3)}
        record["not_measured"] = _not_measured(record["benchmarks"])
        record["is_complete"] = number == len(names)
        record["seconds"] = round(time.monotonic() - started, 1)
        replace_record(record, path)
        print(section(record, name, "simple"), flush=True)


def _not_measured(outcomes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets of all benchmarks that outcomes have no number for."""
    measured = {target["what"] for outcome in outcomes.values() for target in outcome["targets"]}
    targets = [target for name in BENCHMARKS for target in getattr(_module(name), "TARGETS", {}).values()]
    return [target.as_dict() for target in targets if target.what not in measured]


def _module(name: str) -> Any:
    return import_module(f"benchmarks.{name.replace('-', '_')}")


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<17} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=f"{DESCRIPTION}\n\nbenchmarks:\n{names}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=_some_of(BENCHMARKS), metavar="A,B", help="these alone")
    parser.add_argument("--shapes", type=_some_of(SHAPES), metavar="A,B", help=f"of {', '.join(SHAPES)}; all")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the record goes, never over another (a full run: benchmarks/records/DATE-MACHINE-COMMIT.json; "
        "else a temporary file)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        metavar="N",
        help=f"measurements of everything ({ROUNDS}; with --quick {QUICK_ROUNDS})",
    )
    cores = machine.num_cores()
    parser.add_argument(
        "--threads", type=_positive, default=cores, metavar="N", help=f"CPU threads of a step ({cores})"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, the long parts left out; proves nothing")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print the tables of a record, or of --only")
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _some_of(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected some of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
