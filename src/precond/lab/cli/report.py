"""``precond report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from precond.lab.cli.errors import as_user_errors
from precond.lab.report import load_results, save_page
from precond.lab.report.families import families_figure
from precond.lab.workloads import write_atomically


@dataclass(frozen=True)
class Report:
    """Make report.html again from a results.json.

    Attributes:
        results: A results.json, or the folder that holds it.
        out: The page; report.html beside the results if not given.
        picture: Instead of the page an SVG file: steps and seconds to the reference's loss, by family of tasks.
        entrants: Whom the picture shows, with commas between; all if not given.
    """

    results: tyro.conf.Positional[Path]
    out: Path | None = None
    picture: Path | None = None
    entrants: str = ""

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        path = self.results / "results.json" if self.results.is_dir() else self.results
        made = self.picture or self.out or path.with_name("report.html")
        with as_user_errors():
            if self.picture is None:
                save_page(made, load_results(path))
            else:
                labels = [label.strip() for label in self.entrants.split(",") if label.strip()]
                write_atomically(made, families_figure(load_results(path), labels).encode())
        print(f"Saved {made}")
        return 0
