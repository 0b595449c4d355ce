"""The report: one table, one page and four figures that answer whether masked pretraining paid."""

from maskdm.report.report import print_summary, write_report
from maskdm.report.tables import format_final, print_table

__all__ = ["format_final", "print_summary", "print_table", "write_report"]
