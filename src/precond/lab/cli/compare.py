"""``precond compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from precond.lab.cli.errors import as_user_errors
from precond.lab.cli.settings import Integers, Lr, Settings
from precond.lab.cli.single import compare
from precond.lab.workloads import parse_entrants

# The famous ones; one penalty in z and in p; Adam in the coordinates of standardized inputs; a second gradient per step.
# Radii and λ fit the raw digits.
_RECIPES = (
    "sgd,rmsprop,adam,adam+L2(0.5,space='z'),adam+L2(0.001,space='p'),adam(inputs=BNP()),"
    "adamw+SAM(0.05,space='p'),adamw+SAM(0.02,space='z')"
)

# One argument; the commas in it are read by the parser of entrants.
_Text = Annotated[str, tyro.conf.arg(metavar="A,B,…")]


@dataclass(frozen=True)
class Compare(Settings):
    """Train several entrants with several seeds, and report curves, work to a target and test results on one page.

    An entrant is a recipe, with options and penalties in p or in z where wanted:
    --recipes "sgd(momentum=0.9),adamw,adamw+SAM(0.05,space='z')"

    Attributes:
        recipes: Entrants, with commas between them.
        seeds: One training per seed.
        lr: Learning rate: a number for all entrants, search (each finds its own, with the same number of trials, on the
            validation part only), or default (each recipe's own). One in an entrant, adam(lr=0.01), goes before.
    """

    recipes: _Text = _RECIPES
    seeds: Integers = (0, 1, 2)
    lr: Lr = "search"

    def run(self, argv: Sequence[str]) -> int:
        """The exit code."""
        with as_user_errors():
            entrants = parse_entrants(self.recipes)
        return compare("compare", self, entrants, self.seeds, self.lr, argv)
