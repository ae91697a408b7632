"""Results as JSON and as one self-contained page."""

from precond.report import numbers
from precond.report.page import render, save_page
from precond.report.results import (
    Clock,
    Entry,
    Results,
    ResultsError,
    Target,
    TaskResults,
    load_results,
    outcome_from_json,
    outcome_to_json,
    save_results,
)
from precond.report.summary import Row, default_target, table

__all__ = [
    "Clock",
    "Entry",
    "Results",
    "ResultsError",
    "Row",
    "Target",
    "TaskResults",
    "default_target",
    "load_results",
    "numbers",
    "outcome_from_json",
    "outcome_to_json",
    "render",
    "save_page",
    "save_results",
    "table",
]
