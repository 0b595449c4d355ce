"""The report stage: from the results of every arm and seed to one folder of tables, figures and a page."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from maskdm import paths
from maskdm.config import Params
from maskdm.errors import UserError
from maskdm.publishing import publish_folder
from maskdm.report.figures import draw_figures
from maskdm.report.findings import answer, compare_arms
from maskdm.report.page import Content, render_markdown, render_page
from maskdm.report.prose import cautions, facts, notes, pictures, table_note
from maskdm.report.results import Results, read_results
from maskdm.report.tables import display_table, final_frame, format_final, summary_frame, table_markdown, write_csv


def write_report(params: Params, output: Path = paths.REPORT) -> pd.DataFrame:
    """Write tables, figures, summary.md and index.html from the results of every arm and seed.

    Args:
        params: what was run.
        output: the folder, published whole.

    Returns:
        the final table: a row per arm, as in final.csv.

    Raises:
        UserError: a result is missing, stale or not comparable, or the folder can't be written.
    """
    results = read_results(params)
    summary = summary_frame(results, params.budget.milestones)
    final = final_frame(summary)
    content = report_content(params, results, summary, final)
    with publish_folder(output) as folder:
        write_csv(summary, folder / "summary.csv")
        write_csv(final, folder / "final.csv")
        draw_figures(params, results, summary, folder)
        _write(folder / "final.md", table_markdown(content.table) + "\n")
        _write(folder / "summary.md", render_markdown(content))
        _write(folder / "index.html", render_page(content, folder))
    return final


def print_summary(params: Params) -> None:
    """Print the table of a report that was written before, and where the report is.

    Raises:
        UserError: there is none.
    """
    table = paths.REPORT / "final.csv"
    if not table.is_file():
        raise UserError(f"{table} is missing; run first: dvc repro")
    print(format_final(pd.read_csv(table)))
    print(f"\nexperiment {params.name}; the report: {(paths.REPORT / 'index.html').resolve()}")


def report_content(params: Params, results: Results, summary: pd.DataFrame, final: pd.DataFrame) -> Content:
    """Everything the report says, as plain text: the answer, its numbers, its limits and its origin."""
    findings = compare_arms(summary, final)
    return Content(
        title=f"Does masked pretraining pay? {params.name}",
        answer=answer(params, findings),
        cautions=cautions(params, summary, final),
        table=display_table(final),
        table_note=table_note(params, final),
        findings=findings,
        notes=notes(params, summary),
        pictures=pictures(params),
        facts=facts(params, results, summary),
    )


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
