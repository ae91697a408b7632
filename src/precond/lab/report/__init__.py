"""Results as JSON and as one self-contained page."""

from precond.lab.report import numbers
from precond.lab.report.page import render, save_page
from precond.lab.report.ratios import Overall, Ratio, geometric_mean, markdown, overall, ratios, save_summary
from precond.lab.report.results import (
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
from precond.lab.report.saving import save
from precond.lab.report.summary import Row, default_target, table

__all__ = [
    "Clock",
    "Entry",
    "Overall",
    "Ratio",
    "Results",
    "ResultsError",
    "Row",
    "Target",
    "TaskResults",
    "default_target",
    "geometric_mean",
    "load_results",
    "markdown",
    "numbers",
    "outcome_from_json",
    "outcome_to_json",
    "overall",
    "ratios",
    "render",
    "save",
    "save_page",
    "save_results",
    "save_summary",
    "table",
]
