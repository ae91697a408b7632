"""One contender: a recipe with its options and penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from precond import recipes
from precond.regularizers import Regularizer

RECIPES: Mapping[str, Callable[..., Optimizer]] = recipes.RECIPES


@dataclass(frozen=True)
class Entrant:
    """A recipe with its options and penalties.

    Attributes:
        label: how it is written, ``"adamw + SAM(0.05, space='z')"``.
        recipe: a name among :data:`precond.recipes.RECIPES`.
        options: keyword arguments of the recipe; ``lr`` is one's own learning rate, which no search changes.
        regularizers: its penalties.
    """

    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    regularizers: tuple[Regularizer, ...] = ()

    @property
    def lr(self) -> float | None:
        """Its own learning rate, or None."""
        return self.options.get("lr")

    @property
    def exact(self) -> bool:
        """Whether a penalty needs double backprop, and with it a closure that calls no backward."""
        return any(r.exact for r in self.regularizers)

    def optimizer(self, model: nn.Module, lr: float | None) -> Optimizer:
        """A fresh optimizer of the model that raises FloatingPointError at inf or NaN.

        Args:
            model: the module itself, so that dropout masks and batch statistics are protected in second passes.
            lr: the learning rate; None: its own, or the recipe's default.
        """
        options = {**self.options, **({} if lr is None else {"lr": lr})}
        return RECIPES[self.recipe](model, **options, regularizers=self.regularizers, nonfinite="raise")
