"""One content, two forms: Markdown beside its figures, and a page that carries them within itself."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd

from maskdm.report.page_style import PAGE, STYLE
from maskdm.report.tables import LEFT_COLUMNS, table_markdown
from maskdm.report.verdicts import Verdict

LONG = 12  # rows or lines; what is longer and beside the point is folded
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Picture:
    """A figure of the report's folder.

    Attributes:
        file: its name in the report's folder.
        title: a short one.
        caption: what it shows, and what it doesn't.
        alt: what it says, for those who can't see it.
        density: its pixels per pixel of the page.
    """

    file: str
    title: str
    caption: str
    alt: str = ""
    density: float = 2.0


@dataclass(frozen=True)
class Content:
    """What the report says, as plain text: each form escapes it.

    Attributes:
        title: of the page.
        answer: the question of the project answered in a sentence or two.
        cautions: what keeps the numbers from meaning more than they do.
        missing: what has not run or failed, a sentence each, with what to do.
        verdicts: a line per arm.
        table: the result, a row per arm, then the scales; text.
        table_note: what its columns are.
        notes: how to read the numbers.
        pictures: the figures.
        facts: the protocol, as names and values.
        tuning: how the hyperparameters came about: a row per arm and trial; text; empty if nothing was tuned.
        tuning_note: the same in words.
        points: distances between points, where images have two values: rows like those of `table`; text; else empty.
        points_note: what its columns are.
    """

    title: str
    answer: str
    cautions: list[str]
    verdicts: list[Verdict]
    table: pd.DataFrame
    table_note: str
    notes: list[str]
    pictures: list[Picture]
    facts: list[tuple[str, str]]
    missing: list[str] = field(default_factory=list)
    tuning: pd.DataFrame = field(default_factory=pd.DataFrame)
    tuning_note: str = ""
    points: pd.DataFrame = field(default_factory=pd.DataFrame)
    points_note: str = ""


def render_markdown(content: Content) -> str:
    """The report as GitHub Markdown with relative links to its figures."""
    parts = [f"# {_md(content.title)}", f"**{_md(content.answer)}**"]
    parts += [f"> **Caution.** {_md(caution)}" for caution in content.cautions]
    parts += _md_section("Missing", _md_list(content.missing))
    parts += _md_section("Each arm against scratch", "\n".join(_md_verdict(verdict) for verdict in content.verdicts))
    parts += _md_section("Distances of the points", _md_table(content.points), _md(content.points_note))
    parts += _md_section("Result", _md_table(content.table), _md(content.table_note))
    parts += _md_section("Figures", *(part for picture in content.pictures for part in _md_picture(picture)))
    parts += _md_section("Where the hyperparameters come from", _md(content.tuning_note), _md_table(content.tuning))
    parts += _md_section("How to read the numbers", _md_list(content.notes))
    parts += _md_section("What was run", _md_table(_facts_table(content)))
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    """Text with Markdown's own characters escaped, `code` left as code."""
    parts = CODE.split(" ".join(text.split()))
    return "".join(f"`{part}`" if is_code else _md_escaped(part) for part, is_code in zip(parts, cycle((0, 1))))


def _md_escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _md_section(title: str, *parts: str) -> list[str]:
    """A section, or nothing where there is nothing to say."""
    said = [part for part in parts if part]
    return [f"## {_md(title)}", *said] if said else []


def _md_list(items: Iterable[str]) -> str:
    return "\n".join(f"- {_md(item)}" for item in items)


def _md_verdict(verdict: Verdict) -> str:
    return f"- **{_md(verdict.arm)}**: {_md(verdict.text)}"


def _md_table(table: pd.DataFrame) -> str:
    return "" if table.empty else table_markdown(table.map(_md))


def _md_picture(picture: Picture) -> list[str]:
    return [
        f"### {_md(picture.title)}",
        f"![{_md(picture.alt or picture.title)}]({picture.file})",
        _md(picture.caption),
    ]


def _facts_table(content: Content) -> pd.DataFrame:
    return pd.DataFrame(content.facts, columns=["what", "value"])


def render_page(content: Content, folder: Path) -> str:
    """The report as one HTML file that needs nothing else: no network, no script.

    Args:
        content: what it says.
        folder: where the figures are.
    """
    sections = [
        ("Missing", _folded(_html_list(content.missing, _prose, "missing-list"), len(content.missing), "lines")),
        ("Each arm against scratch", _html_list(content.verdicts, _html_verdict, "verdicts")),
        ("Distances of the points", _html_table(content.points, "result") + _html_note(content.points_note)),
        ("Result", _html_table(content.table, "result") + _html_note(content.table_note)),
        ("Figures", "\n".join(_html_picture(picture, folder) for picture in content.pictures)),
        ("Where the hyperparameters come from", _html_tuning(content)),
        ("How to read the numbers", _html_list(content.notes, _prose)),
        ("What was run", _html_facts(content.facts)),
    ]
    shown = [(title, body) for title, body in sections if body]
    parts = [
        f"<h1>{_h(content.title)}</h1>",
        f'<p class="answer">{_prose(content.answer)}</p>',
        *(f'<p class="caution"><strong>Caution.</strong> {_prose(caution)}</p>' for caution in content.cautions),
        _html_contents([title for title, _ in shown]),
        *(f'<section>\n<h2 id="{_anchor(title)}">{_h(title)}</h2>\n{body}\n</section>' for title, body in shown),
    ]
    pieces = {"title": _h(content.title), "style": STYLE, "body": "\n".join(parts)}
    # In one pass: what was put in is never searched again.
    return re.sub(r"\{(title|style|body)\}", lambda found: pieces[found[1]], PAGE)


def _h(text: str) -> str:
    return html.escape(text)


def _prose(text: str) -> str:
    """A sentence: `code` is set as code, and a number stays with its unit."""
    escaped = CODE.sub(r"<code>\1</code>", _h(text))
    return re.sub(r"(?<=\d) (?=%|s\b)|(?<=\bn) (?== \d)|(?<=\bn =) (?=\d)", "\u00a0", escaped)


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())


def _html_contents(titles: list[str]) -> str:
    links = "".join(f'<li><a href="#{_anchor(title)}">{_h(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _html_list(items: list[Any], render: Callable[[Any], str], kind: str = "plain") -> str:
    if not items:
        return ""
    lines = "\n".join(f"<li>{render(item)}</li>" for item in items)
    return f'<ul class="{kind}">\n{lines}\n</ul>'


def _html_verdict(verdict: Verdict) -> str:
    mark = f'<span class="kind {verdict.kind}">{verdict.kind}</span>'
    return f"{mark} <strong>{_h(verdict.arm)}</strong>: {_prose(verdict.text)}"


def _html_note(text: str) -> str:
    return f'\n<p class="note">{_prose(text)}</p>' if text else ""


def _html_table(table: pd.DataFrame, kind: str) -> str:
    if table.empty:
        return ""
    sides = [' class="text"' if column in LEFT_COLUMNS else "" for column in table.columns]
    head = "".join(
        f'<th scope="col"{side}>{_h(column)}</th>' for column, side in zip(table.columns, sides, strict=True)
    )
    body = "\n".join(f"<tr>{_html_cells(row, sides)}</tr>" for row in table.itertuples(index=False, name=None))
    rows = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    # A table that is wider than the screen scrolls by itself; with the keyboard, too.
    return f'<div class="wide" tabindex="0"><table class="{kind}">\n{rows}</table></div>'


def _html_cells(row: Iterable[str], sides: list[str]) -> str:
    return "".join(f"<td{side}>{_html_cell(str(cell))}</td>" for cell, side in zip(row, sides, strict=True))


def _html_cell(text: str) -> str:
    """A cell; what a number stands with, an interval or a count, goes below it, so that the table stays narrow."""
    number, space, beside = text.partition(" ")
    if not beside.startswith(("[", "(")):
        return _h(text)
    return f"{_h(number)}{space}<small>{_h(beside)}</small>"


def _html_tuning(content: Content) -> str:
    table = _html_table(content.tuning, "tuning")
    return (_html_note(content.tuning_note) + _folded(table, len(content.tuning), "trials")).strip()


def _folded(body: str, count: int, what: str) -> str:
    """Something behind a line to open it, if it is long."""
    return body if count <= LONG else f"<details>\n<summary>All {count} {what}</summary>\n{body}\n</details>"


def _html_picture(picture: Picture, folder: Path) -> str:
    png = (folder / picture.file).read_bytes()
    width, height = (round(size / picture.density) for size in _png_size(png))
    data = base64.b64encode(png).decode("ascii")
    alt = _h(picture.alt or picture.title)
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{alt}">'
    caption = f"<figcaption>{_prose(picture.caption)}</figcaption>"
    return f'<figure>\n<h3>{_h(picture.title)}</h3>\n<div class="wide">{image}</div>\n{caption}\n</figure>'


def _png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from where the PNG format has them: bytes 16 to 23, in the header."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def _html_facts(facts: list[tuple[str, str]]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{_h(name)}</th><td>{_h(value)}</td></tr>' for name, value in facts)
    return f'<table class="facts"><tbody>\n{rows}\n</tbody></table>' if facts else ""
