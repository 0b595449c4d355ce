"""From the results of every arm and seed to one folder of tables, figures and a page."""

from __future__ import annotations

import base64
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from maskdm.base.checksums import checked
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description
from maskdm.config import Params, paths
from maskdm.config.jobs import Jobs
from maskdm.report.cautions import cautions
from maskdm.report.comparison import compare_arms
from maskdm.report.figures import draw_figures
from maskdm.report.points import distance_table
from maskdm.report.results import read_results
from maskdm.report.tables import (
    LEFT_COLUMNS,
    TERMINAL_WIDTH,
    display_table,
    format_table,
    plain_table,
    summary_frame,
    trials_table,
    verdict_frame,
    write_csv,
)
from maskdm.report.texts import texts
from maskdm.report.verdicts import answer, judge_arms
from maskdm.scoring.protocol import Protocol, flips_text

SUMMARY, VERDICTS, PAGE, MARKDOWN = "summary.csv", "verdicts.csv", "report.html", "summary.md"
PROTOCOL, TRAINING = "protocol.json", "training.json"
FLIP = "flip"  # in training.json
DENSITY = 2.0  # of a figure: its pixels per pixel of the page
CODE = re.compile(r"`([^`]+)`")
Described = TypeVar("Described")


@dataclass(frozen=True)
class Report:
    """What a report says in numbers.

    Attributes:
        summary: a row per arm, seed and milestone, as in summary.csv.
        verdicts: a row per arm, as in verdicts.csv.
        missing: the missing results, a line each.
        protocol: what scores are of, as in protocol.json.
        flips: by arm, the probability of a left-right flip in training, as in training.json.
    """

    summary: pd.DataFrame
    verdicts: pd.DataFrame
    missing: list[str]
    protocol: Protocol
    flips: dict[str, float]


def write_report(params: Params, folder: Path) -> Report:
    """Write tables, figures, summary.md and report.html from the results that exist.

    Args:
        params: what was run.
        folder: an existing one.

    Raises:
        UserError: no arm can be shown.
    """
    results = read_results(params)
    summary = summary_frame(params, results)
    found = compare_arms(params, results, summary)
    judged = judge_arms(found)
    verdicts = verdict_frame(found, judged)
    write_csv(summary, folder / SUMMARY)
    write_csv(verdicts, folder / VERDICTS)
    publish_description(folder / PROTOCOL, results.protocol.as_dict())
    publish_description(folder / TRAINING, {FLIP: results.flips})
    missing, said = [one.text for one in results.missing], texts(found)
    content = {
        "title": f"Does masked pretraining pay? {params.name}",
        "answer": answer(found),
        "cautions": cautions(found),
        "missing": missing,
        "verdicts": judged,
        "points": distance_table(params, results),
        "points_notes": said["distances"],
        "table": display_table(verdicts, summary),
        "table_notes": said["table"],
        "pictures": draw_figures(found, folder, said),
        "tuning": trials_table(results),
        "tuning_notes": said["tuning"],
        "notes": said["notes"],
        "facts": [(name, value.strip()) for name, _, value in (fact.partition(":") for fact in said["facts"])],
    }
    for name, template in ((MARKDOWN, "report.md.j2"), (PAGE, "page.html.j2")):
        (folder / name).write_text(render(template, content, folder), encoding="utf-8", newline="\n")
    return Report(summary, verdicts, missing, results.protocol, results.flips)


def render(template: str, content: dict[str, Any], folder: Path) -> str:
    """A report as Markdown that links its figures (report.md.j2), or as a page that contains them (page.html.j2).

    Args:
        template: a file beside this one.
        content: plain text, tables of text, and figures, as in `write_report`; the templates escape all of it.
        folder: where the figures are.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        md=_markdown,
        md_table=lambda table: "" if table.empty else plain_table(table.map(_markdown)),
        md_facts=lambda rows: plain_table(pd.DataFrame(rows, columns=["what", "value"]).map(_markdown)),
        prose=_prose,
        embedded=lambda file: _embedded(folder / file),
    )
    return environment.get_template(template).render(content, left_columns=LEFT_COLUMNS)


def _markdown(text: str) -> str:
    """Text with Markdown's own characters escaped, except in `code`."""
    parts = CODE.split(" ".join(text.split()))
    escaped = [re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", part) for part in parts]
    return "".join(f"`{parts[i]}`" if i % 2 else escaped[i] for i in range(len(parts)))


def _prose(text: str) -> Markup:
    """A sentence in HTML: `code` is set as code, and no line break separates a number from its unit."""
    marked = CODE.sub(r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"(?<=\d) (?=%|s\b)|(?<=\bn) (?== \d)|(?<=\bn =) (?=\d)", "\u00a0", marked))


def _embedded(file: Path) -> dict[str, Any]:
    """A figure as base64, and its width and height in pixels of the page."""
    with Image.open(file) as image:
        width, height = (round(side / DENSITY) for side in image.size)
    return {"base64": base64.b64encode(file.read_bytes()).decode("ascii"), "width": width, "height": height}


def print_report(report: Report) -> None:
    """Print the verdicts and the table, and on stderr what is missing."""
    for line in report.missing:
        print(f"missing: {line}", file=sys.stderr)
    for _, row in report.verdicts.iterrows():
        print(_wrapped(f"{row['arm']}: {row['verdict']}"))
    print(f"\n{format_table(report.verdicts, report.summary)}\n")
    for line in (*report.protocol.text.splitlines(), flips_text(report.flips)):
        print(_wrapped(line))
    print(f"\nreport: {(paths.REPORT / PAGE).resolve()}")


def _wrapped(text: str) -> str:
    """A sentence in lines for a terminal; `n = 3` and `95 %` stay on one line."""
    glued = re.sub(r"(?<= =) (?=\d)|(?<=[np]) (?== )|(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.fill(glued, TERMINAL_WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def print_summary(params: Params) -> None:
    """Print the verdicts and the table of an existing report.

    Raises:
        UserError: there is none.
    """
    for name in (VERDICTS, SUMMARY, PROTOCOL, TRAINING):
        if not (paths.REPORT / name).is_file():
            raise UserError(f"{paths.REPORT / name} is missing; run first: dvc repro, or snakemake --cores N")
    if why := Jobs(params).find("report").why_outdated():
        print(f"note: params.yaml or results have changed since this report was made: {why}", file=sys.stderr)
    print(f"experiment {params.name}\n")
    summary, verdicts = (pd.read_csv(paths.REPORT / name) for name in (SUMMARY, VERDICTS))
    protocol = _read(PROTOCOL, Protocol.from_dict)
    flips = _read(TRAINING, lambda content: {arm: float(flip) for arm, flip in content[FLIP].items()})
    in_order = {arm: flips[arm] for arm in verdicts["arm"] if arm in flips}  # as the report printed them
    print_report(Report(summary, verdicts, [], protocol, in_order))


def _read(name: str, meaning: Callable[[dict[str, Any]], Described]) -> Described:
    """A JSON file of an existing report, as `meaning` understands it."""
    file = paths.REPORT / name
    try:
        return meaning(checked(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({error}); run first: maskdm report") from None
