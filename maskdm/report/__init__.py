"""The report: tables, verdicts, figures and one page that answer whether masked pretraining paid."""

from maskdm.report.report import Report, print_report, print_summary, write_report

__all__ = ["Report", "print_report", "print_summary", "write_report"]
