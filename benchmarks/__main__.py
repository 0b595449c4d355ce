"""The benchmarks as a command: `python -m benchmarks`, or `make bench`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.outcome import render
from benchmarks.record import FORMAT, default_path, read_record, summary, write_record
from benchmarks.settings import Settings
from benchmarks.shapes import SHAPES
from maskdm.errors import UserError

# name → what it measures; each is a module of this package with `run(settings)`
BENCHMARKS = {
    "train_step": "real training steps at every mask rate, against the machine, the FLOPs and timm's blocks",
    "data": "the loader against PIL behind a DataLoader; how long a step waits for data",
    "sampling": "images/s; quality against evaluations for every sampler (trains the default's scratch arm once)",
    "ema_optimizer": "the share of a step that clipping, AdamW and averaged weights take",
    "scaling": "time against images, tokens, width and batch, with fitted exponents",
    "workflow": "what a stage costs beside its work; start-up; a `dvc repro` with nothing to do",
    "attention": "plain attention against PyTorch's kernel: what the rule of maskdm.backbone rests on",
    "gpu": "on a CUDA device: MFU, memory, compiled or not, images on the device or not",
    "workflow-default": "the default experiment through both engines: 10 minutes a round; only where it is asked for",
}
ONLY_WHEN_ASKED = ("workflow-default",)
DESCRIPTION = """Measure how fast this checkout is on this machine, and which targets hold.

Tasks take turns (A, B, C, A, B, C, …); cells are medians over the rounds with quartiles in brackets, and ratios are
taken round by round, so that a noisy machine disturbs them least. Leave the machine alone meanwhile."""
EPILOG = """examples:
  python -m benchmarks                                 all: minutes on 2 cores; the record goes to benchmarks/records
  python -m benchmarks --only train_step --shapes small
  python -m benchmarks --quick --out /tmp/record.json   two rounds, the long parts left out: to see that it runs
  python -m benchmarks --table benchmarks/records/X.json    a record's tables, as Markdown

exit code: 0 also where a target does not hold: the last table says which
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that were asked for; the exit code."""
    # DataLoader's workers and forked stages end without a word to it, and it complains when all is over
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    options = _parser().parse_args(arguments)
    if options.table:
        return _print_table(options.table, options.only)
    with tempfile.TemporaryDirectory(prefix="maskdm-bench-") as folder:
        rounds = options.rounds or (2 if options.quick else 7)
        shapes = tuple(SHAPES[name] for name in options.shapes)
        settings = Settings(Path(folder), rounds, options.quick, shapes, options.threads)
        record = _measure(options.only, settings)
    path = options.out or default_path(record)
    write_record(record, path)
    print(f"\n{summary(record)}\n\nrecord: {path}")
    return 0


def _print_table(path: Path, names: Sequence[str]) -> int:
    """Print a record's tables as Markdown; the exit code."""
    try:
        outcomes = read_record(path)["benchmarks"]
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    shown = [f"## {name}\n\n{render(outcomes[name], 'github')}" for name in names if name in outcomes]
    print("\n\n".join(shown))
    return 0


def _measure(names: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Run benchmarks, printing what each has given."""
    outcomes, started = {}, time.monotonic()
    for number, name in enumerate(names, 1):
        print(f"\n== {name} ({number} of {len(names)}): {BENCHMARKS[name]}\n", flush=True)
        outcomes[name] = import_module(f"benchmarks.{name.replace('-', '_')}").run(settings).as_dict()
        print(render(outcomes[name], "simple"), flush=True)
    return {
        "format": FORMAT,
        "machine": machine.describe(),
        "rounds": settings.rounds,
        "is_quick": settings.is_quick,
        "seconds": round(time.monotonic() - started, 1),
        "benchmarks": outcomes,
    }


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<17} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=f"{DESCRIPTION}\n\nbenchmarks:\n{names}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    all_of_them = [name for name in BENCHMARKS if name not in ONLY_WHEN_ASKED]
    parser.add_argument("--only", type=_some_of(BENCHMARKS), default=all_of_them, metavar="A,B", help="these alone")
    parser.add_argument(
        "--shapes", type=_some_of(SHAPES), default=list(SHAPES), metavar="A,B", help=f"of {', '.join(SHAPES)}; all"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where the record goes (benchmarks/records/DATE-MACHINE)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of everything (7; with --quick 2)")
    cores = machine.num_cores()
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help=f"CPU threads of a step ({cores})")
    parser.add_argument("--quick", action="store_true", help="few rounds, the long parts left out; proves nothing")
    parser.add_argument("--table", type=Path, metavar="RECORD", help="print the tables of a record (of --only)")
    return parser


def _some_of(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected some of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
