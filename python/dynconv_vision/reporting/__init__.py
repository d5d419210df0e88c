# SPDX-License-Identifier: BSD-3-Clause
"""Reports of runs: the source report's tables, published, corrected and measured side by side, and pictures."""

from .report import write_report
from .results import Results, ResultsError, load_history, load_results
from .summary import write_summary

__all__ = ["Results", "ResultsError", "load_history", "load_results", "write_report", "write_summary"]
