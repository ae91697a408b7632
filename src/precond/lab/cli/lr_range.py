"""``precond lr-range``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text

from precond.algebra import checks
from precond.analysis.diagnostics.rates import lr_range
from precond.analysis.diagnostics.remedies import base_of
from precond.lab.cli.errors import as_user_errors
from precond.lab.cli.target import Target
from precond.lab.workloads.randomness import isolated


@dataclass(frozen=True)
class LrRange(Target):
    """Find a learning rate by short trainings: where the loss blows up, and which rate below ends lowest.

    Attributes:
        steps: Steps of each short training.
        ramp_steps: Steps of the training in which the rate is raised.
    """

    steps: int = 40
    ramp_steps: int = 100

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        with as_user_errors():
            checks.whole("lr-range", steps=self.steps, ramp_steps=self.ramp_steps, threads=self.threads, examples=self.examples)
            torch.set_num_threads(self.threads)
        console = Console(highlight=False)
        with as_user_errors(), isolated(self.seed):
            objective, optimizer, _ = self.problem()
            entrant, base = self.entrant(), base_of(optimizer, objective.model).now()
            make = base.make if entrant is None else entrant.optimizer
            with console.status("") as status:
                found = lr_range(
                    objective, make, steps=self.steps, ramp_steps=self.ramp_steps, watch=lambda text: status.update(Text(text))
                )
        console.print(Text(f"{base.label if entrant is None else entrant.label}"))
        console.print(Text(str(found)))
        return 0
