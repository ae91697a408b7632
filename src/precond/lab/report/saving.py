"""Everything that is written of a comparison."""

from __future__ import annotations

from pathlib import Path

from precond.lab.report.page import save_page
from precond.lab.report.pooled import pooled
from precond.lab.report.ratios import as_json, save_summary
from precond.lab.report.results import Results, save_results
from precond.lab.report.summary import table


def save(folder: Path, results: Results) -> list[str]:
    """Write results.json and report.html, and summary.md where entrants are compared with a reference.

    Returns:
        Names of the files.

    Raises:
        WriteError: where they cannot be written.
    """
    save_results(
        folder / "results.json", results, [[row.as_dict() for row in table(t)] for t in results.tasks], as_json(results)
    )
    save_page(folder / "report.html", results)
    if not any(task.reference for task in results.tasks):
        return ["report.html", "results.json"]
    save_summary(folder / "summary.md", results, (table.markdown() for table in pooled(results)))
    return ["report.html", "results.json", "summary.md"]
