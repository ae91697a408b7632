"""``precond train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from precond.lab.cli.errors import UserError, as_user_errors
from precond.lab.cli.settings import Lr, Settings
from precond.lab.cli.single import compare
from precond.lab.workloads import parse_entrants


@dataclass(frozen=True)
class Train(Settings):
    """Train one model with one recipe; save the model (model.pt, a state dict), its results and a report.

    A recipe may have options and penalties in p or in z: --recipe "adamw(weight_decay=0.1)+SAM(0.05,space='z')"

    Attributes:
        recipe: The recipe.
        seed: Of initialization, order of the data, and dropout.
        lr: Learning rate: a number, default (the recipe's own), or search (over the grid, on the validation part only).
    """

    recipe: str = "adamw"
    seed: int = 0
    lr: Lr = "default"

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        with as_user_errors():
            entrants = parse_entrants(self.recipe)
        if len(entrants) > 1:
            raise UserError(f"train takes one recipe, got {len(entrants)}; precond compare takes several")
        return compare("train", self, entrants, (self.seed,), self.lr, argv)
