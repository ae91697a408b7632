"""A table of texts, and what its cells are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from precond.lab.report import numbers
from precond.lab.report.ratios import markdown_row
from precond.lab.report.results import Results


@dataclass(frozen=True)
class PlainTable:
    """A table of texts; the first column names its rows.

    Attributes:
        heading, note: above and below it.
        columns, rows: texts.
    """

    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """With its heading and note."""
        lines = [markdown_row(self.columns), f"|---|{'---:|' * (len(self.columns) - 1)}", *map(markdown_row, self.rows)]
        return "\n".join([f"## {self.heading}\n", *lines, f"\n{self.note}\n"])


def mean(values: Iterable[float]) -> str:
    """The geometric one."""
    found = list(values)
    return numbers.short(math.exp(statistics.fmean(map(math.log, found)))) if found else numbers.NONE


def reference(results: Results) -> str:
    """In units of whose work it is told."""
    return " or ".join(dict.fromkeys(task.reference for task in results.tasks if task.reference))
