"""From the results of every arm and seed to one folder of tables, figures and a page."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from maskdm.base.checksums import checked
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description
from maskdm.config import Params, paths
from maskdm.report.comparison import Comparison, compare_arms
from maskdm.report.figures import draw_figures
from maskdm.report.page import Content, Picture, render_markdown, render_page
from maskdm.report.points import distance_note, distance_table
from maskdm.report.prose import cautions, facts, missing_lines, notes, table_note
from maskdm.report.results import Results, read_results
from maskdm.report.sensitivity import trials_table, tuning_note
from maskdm.report.tables import TERMINAL_WIDTH, display_table, format_table, summary_frame, verdict_frame, write_csv
from maskdm.report.verdicts import Verdict, answer, judge_arms
from maskdm.scoring.protocol import Protocol, flips_text

SUMMARY, VERDICTS, PAGE = "summary.csv", "verdicts.csv", "report.html"
PROTOCOL, TRAINING = "protocol.json", "training.json"
FLIP = "flip"  # in training.json
Described = TypeVar("Described")


@dataclass(frozen=True)
class Report:
    """What a report says in numbers.

    Attributes:
        summary: a row per arm, seed and milestone, as in summary.csv.
        verdicts: a row per arm, as in verdicts.csv.
        missing: what it does without, a line each.
        protocol: what scores are of, as in protocol.json.
        flips: by arm, the probability of a left-right flip in training, as in training.json.
    """

    summary: pd.DataFrame
    verdicts: pd.DataFrame
    missing: list[str]
    protocol: Protocol
    flips: dict[str, float]


def write_report(params: Params, folder: Path) -> Report:
    """Write tables, figures, summary.md and report.html from what there is of the results.

    Args:
        params: what was run.
        folder: an existing one.

    Raises:
        UserError: nothing can be shown.
    """
    results = read_results(params)
    summary = summary_frame(params, results)
    compared = compare_arms(params, results, summary)
    judged = judge_arms(params, compared, results.missing)
    verdicts = verdict_frame(params, compared, judged)
    write_csv(summary, folder / SUMMARY)
    write_csv(verdicts, folder / VERDICTS)
    publish_description(folder / PROTOCOL, results.protocol.as_dict())
    publish_description(folder / TRAINING, {FLIP: results.flips})
    pictures = draw_figures(params, results, summary, compared, folder)
    content = _content(params, results, compared, judged, display_table(verdicts, summary), pictures)
    _write(folder / "summary.md", render_markdown(content))
    _write(folder / PAGE, render_page(content, folder))
    return Report(summary, verdicts, content.missing, results.protocol, results.flips)


def print_report(report: Report) -> None:
    """Print the verdicts and the table, and to stderr what is missing."""
    for line in report.missing:
        print(f"missing: {line}", file=sys.stderr)
    for _, row in report.verdicts.iterrows():
        print(_wrapped(f"{row['arm']}: {row['verdict']}"))
    print(f"\n{format_table(report.verdicts, report.summary)}")
    lines = [*report.protocol.text.splitlines(), flips_text(report.flips)]
    print("\n" + "\n".join(map(_wrapped, lines)))
    print(f"\nreport: {(paths.REPORT / PAGE).resolve()}")


def print_summary(params: Params) -> None:
    """Print the verdicts and the table of a report that was written before.

    Raises:
        UserError: there is none.
    """
    for name in (VERDICTS, SUMMARY, PROTOCOL, TRAINING):
        if not (paths.REPORT / name).is_file():
            raise UserError(f"{paths.REPORT / name} is missing; run first: dvc repro")
    print(f"experiment {params.name}\n")
    summary, verdicts = (pd.read_csv(paths.REPORT / name) for name in (SUMMARY, VERDICTS))
    protocol, flips = _read(PROTOCOL, Protocol.from_dict), _read(TRAINING, _flips_of)
    in_order = {arm: flips[arm] for arm in verdicts["arm"] if arm in flips}  # as the report printed them
    print_report(Report(summary, verdicts, [], protocol, in_order))


def _read(name: str, meaning: Callable[[dict[str, Any]], Described]) -> Described:
    """What a description of a report that was written before means."""
    file = paths.REPORT / name
    try:
        return meaning(checked(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} can't be read ({error}); run first: maskdm report") from None


def _flips_of(content: dict[str, Any]) -> dict[str, float]:
    try:
        return {arm: float(flip) for arm, flip in content[FLIP].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no flips by arm: {error}") from None


def _wrapped(text: str) -> str:
    """A verdict in lines for a terminal, `n = 3` and `95 %` never broken."""
    glued = re.sub(r"(?<= =) (?=\d)|(?<=[np]) (?== )|(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.fill(glued, TERMINAL_WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def _content(
    params: Params,
    results: Results,
    compared: list[Comparison],
    judged: list[Verdict],
    table: pd.DataFrame,
    pictures: list[Picture],
) -> Content:
    """Everything the report says, as plain text: the answer, its numbers, its limits and its origin."""
    return Content(
        title=f"Does masked pretraining pay? {params.name}",
        answer=answer(params, compared),
        cautions=cautions(params, results, compared),
        missing=missing_lines(results.missing),
        verdicts=judged,
        table=table,
        table_note=table_note(results, compared),
        notes=notes(params, results, compared),
        pictures=pictures,
        points=distance_table(params, results),
        points_note=distance_note(params, results),
        tuning=trials_table(params, results),
        tuning_note=tuning_note(params, results),
        facts=facts(params, results),
    )


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
