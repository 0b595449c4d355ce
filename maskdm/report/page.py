"""One content, two forms: Markdown beside its figures, and a page that carries them within itself."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from maskdm.report.findings import Finding
from maskdm.report.tables import table_markdown


@dataclass(frozen=True)
class Picture:
    """A figure of the report's folder; `density` is its pixels per pixel of the page."""

    file: str
    title: str
    caption: str
    density: float = 1.5


@dataclass(frozen=True)
class Content:
    """What the report says, as plain text: each form escapes it."""

    title: str
    answer: str
    cautions: list[str]
    table: pd.DataFrame
    table_note: str
    findings: list[Finding]
    notes: list[str]
    pictures: list[Picture]
    facts: list[tuple[str, str]]


def render_markdown(content: Content) -> str:
    """The report as GitHub Markdown with relative links to its figures."""
    parts = [f"# {_md(content.title)}", f"**{_md(content.answer)}**"]
    parts += [f"> **Caution.** {_md(caution)}" for caution in content.cautions]
    parts += ["## Result", table_markdown(content.table.map(_md)), _md(content.table_note)]
    if content.findings:
        parts += [
            "## Each arm against scratch",
            "\n".join(_md_finding(finding) for finding in content.findings),
        ]
    parts += [
        "## How to read the numbers",
        "\n".join(f"- {_md(note)}" for note in content.notes),
        "## Figures",
    ]
    for picture in content.pictures:
        parts += [
            f"### {_md(picture.title)}",
            f"![{_md(picture.title)}]({picture.file})",
            _md(picture.caption),
        ]
    facts = pd.DataFrame([(_md(name), _md(value)) for name, value in content.facts], columns=["what", "value"])
    parts += ["## What was run", facts.to_markdown(index=False, tablefmt="pipe", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    """Text with Markdown's own characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _md_finding(finding: Finding) -> str:
    return f"- **{_md(finding.arm)}**: {_md(finding.text)}: **{_md(finding.verdict)}**"


def render_page(content: Content, folder: Path) -> str:
    """The report as one HTML file that needs nothing else: no network, no script.

    Args:
        content: what it says.
        folder: where the figures are.
    """
    body = "\n".join(
        [
            f"<h1>{_h(content.title)}</h1>",
            f'<p class="answer">{_h(content.answer)}</p>',
            *(f'<p class="caution"><strong>Caution.</strong> {_h(caution)}</p>' for caution in content.cautions),
            "<h2>Result</h2>",
            _html_table(content.table),
            f'<p class="note">{_h(content.table_note)}</p>',
            _html_findings(content.findings),
            "<h2>How to read the numbers</h2>",
            _html_list([_h(note) for note in content.notes]),
            "<h2>Figures</h2>",
            *(_html_picture(picture, folder) for picture in content.pictures),
            "<h2>What was run</h2>",
            _html_facts(content.facts),
        ]
    )
    return _PAGE.replace("{title}", _h(content.title)).replace("{style}", _STYLE).replace("{body}", body)


def _h(text: str) -> str:
    return html.escape(text)


def _html_list(items: list[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"


def _html_table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{_h(column)}</th>" for column in table.columns)
    rows = ("".join(f"<td>{_h(cell)}</td>" for cell in row) for row in table.itertuples(index=False))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    table_html = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="wide"><table class="result">\n{table_html}</table></div>'


def _html_findings(findings: list[Finding]) -> str:
    if not findings:
        return ""
    return "<h2>Each arm against scratch</h2>\n" + _html_list([_html_finding(f) for f in findings])


def _html_finding(finding: Finding) -> str:
    word = finding.verdict.split()[0]  # better, worse, equal or undecided: the colour's class
    verdict = f'<strong class="{_h(word)}">{_h(finding.verdict)}</strong>'
    return f"<strong>{_h(finding.arm)}</strong>: {_h(finding.text)}: {verdict}"


def _html_picture(picture: Picture, folder: Path) -> str:
    png = (folder / picture.file).read_bytes()
    data, width = base64.b64encode(png).decode("ascii"), round(_png_width(png) / picture.density)
    image = f'<img src="data:image/png;base64,{data}" width="{width}" alt="{_h(picture.title)}">'
    caption = f"<figcaption>{_h(picture.caption)}</figcaption>"
    return f"<figure>\n<h3>{_h(picture.title)}</h3>\n{image}\n{caption}\n</figure>"


def _png_width(png: bytes) -> int:
    """The width in pixels, from where the PNG format has it: bytes 16 to 19, in the header."""
    return int.from_bytes(png[16:20], "big")


def _html_facts(facts: list[tuple[str, str]]) -> str:
    rows = "\n".join(f"<tr><th>{_h(name)}</th><td>{_h(value)}</td></tr>" for name, value in facts)
    return f'<table class="facts"><tbody>\n{rows}\n</tbody></table>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """\
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b6470; --line: #d9dee4;
  --page: #ffffff; --tint: #f4f6f8;
  --better: #00634a; --worse: #a33f00; --caution: #b8860b; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #a2abb6; --line: #39414b; --page: #15181c; --tint: #1f242a;
    --better: #4fd1a5; --worse: #ff9d5c; --caution: #d9a520; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .6rem; }
p, li { max-width: 50rem; }
li { margin: .25rem 0; }
.answer { font-size: 1.2rem; font-weight: 600; line-height: 1.4; }
.caution { border-left: 4px solid var(--caution); background: var(--tint); padding: .6rem .9rem;
  margin: .6rem 0; }
.note, figcaption { color: var(--soft); font-size: .9rem; max-width: 52rem; }
.better { color: var(--better); }
.worse { color: var(--worse); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
.result { font-variant-numeric: tabular-nums; }
.result thead th { border-bottom: 2px solid var(--soft); }
.result :is(th, td):is(:nth-child(1), :nth-child(2)), .facts :is(th, td) { text-align: left; }
.result td:first-child { font-weight: 600; }
.result tbody tr:hover { background: var(--tint); }
.facts th { font-weight: 600; vertical-align: top; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0 0 2.2rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { margin-top: .5rem; }
@media print { main { max-width: none; padding: 0; } figure { break-inside: avoid; } }"""
