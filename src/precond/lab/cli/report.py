"""``precond report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from precond.lab.cli.errors import as_user_errors
from precond.lab.report import load_results, save_page


@dataclass(frozen=True)
class Report:
    """Make report.html again from a results.json.

    Attributes:
        results: A results.json, or the folder that holds it.
        out: The page; report.html beside the results if not given.
    """

    results: tyro.conf.Positional[Path]
    out: Path | None = None

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        path = self.results / "results.json" if self.results.is_dir() else self.results
        page = self.out or path.with_name("report.html")
        with as_user_errors():
            save_page(page, load_results(path))
        print(f"Saved {page}")
        return 0
