"""``precond logistic``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from precond.lab.cli.errors import UserError, as_user_errors
from precond.lab.cli.folder import sole
from precond.lab.cli.settings import Texts
from precond.lab.cli.tables import drawn
from precond.lab.report.environment import machine, versions
from precond.lab.report.logistic import rows, save_logistic
from precond.lab.workloads.logistic import SETS, descents, logistic


@dataclass(frozen=True)
class LogisticRegression:
    """Count iterations of gradient descent on raw and standardized data, and of BNP on raw data, for logistic regression.

    Attributes:
        data: Data sets, wine and breast-cancer.
        l2: λ of the L2 penalty on the weights of standardized features, the same function for every method.
        tolerance: Gap to the optimum, relative to that of the start, that counts as reached.
        limit: Iterations at most.
        out: Output folder.
    """

    data: Texts = SETS
    l2: float = 1e-3
    tolerance: float = 1e-6
    limit: int = 100_000
    out: Path = Path("runs/logistic")

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance must lie between 0 and 1, got {self.tolerance:g}")
        if self.limit < 1:
            raise UserError(f"limit must be at least 1, got {self.limit}")
        if not self.data:
            raise UserError(f"data names no data set; there are {', '.join(SETS)}")
        torch.set_num_threads(1)
        with as_user_errors():
            problems = [logistic(name, self.l2) for name in self.data]
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)
        with sole(self.out):
            found = []
            for problem in problems:
                with console.status(f"{problem.name} …"):
                    found.append((problem, descents(problem, self.tolerance, self.limit)))
                headings = ("method", "κ", "lr", "predicted", f"to {self.tolerance:g}", "last gap")
                title = f"{problem.name}: full-batch iterations, λ = {self.l2:g}"
                console.print(drawn(title, headings, rows(found[-1][1]), console.width))
            facts = {**versions(), **machine("cpu")}
            save_logistic(self.out, found, facts, self.tolerance, shlex.join(["precond", *argv]))
        console.print(Text(f"Saved in {self.out}: report.html, results.json"), soft_wrap=True)
        return 0
