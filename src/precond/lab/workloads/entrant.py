"""Contenders: recipes of this library with their options and penalties, and optimizers of others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from precond.lab.workloads.evaluation import renewed_statistics
from precond.lab.workloads.learning_rates import Decay
from precond.lab.workloads.problem import Problem
from precond.optim import recipes
from precond.optim.regularizers import Regularizer

RECIPES: Mapping[str, Callable[..., Optimizer]] = recipes.RECIPES


class Entrant(ABC):
    """Makes the optimizer of a training.

    Attributes:
        label: what it is called.
        slug: part of file names.
        lr: its own learning rate, which no search changes; None: it has none.
        exact: whether a penalty needs double backprop, and with it a closure that calls no backward.
        decay: how its learning rate decays by its own design; None: as all others' do.
        restorable: whether its optimizer goes on from its state dict to the same numbers; if not, interrupted trainings start over.
    """

    label: str
    slug: str
    lr: float | None = None
    exact: bool = False
    decay: Decay | None = None
    restorable: bool = True

    def evaluating(self, optimizer: Any, problem: Problem) -> AbstractContextManager[None]:
        """Within it the model holds what is to be evaluated; after it, what is trained."""
        return nullcontext()

    @abstractmethod
    def optimizer(self, model: nn.Module, lr: float | None) -> Optimizer:
        """A fresh optimizer of the model.

        Args:
            model: the module itself, so that dropout masks and batch statistics are protected in second passes.
            lr: the learning rate; None: its own, or the optimizer's default.
        """


@dataclass(frozen=True)
class Recipe(Entrant):
    """A recipe of this library; its optimizer raises FloatingPointError at inf or NaN.

    Attributes:
        label: how it is written, ``"adamw + SAM(0.05, space='z')"``, or another name.
        recipe: a name among :data:`precond.optim.recipes.RECIPES`.
        options: keyword arguments of the recipe; ``lr`` is one's own learning rate.
        regularizers: its penalties.
    """

    label: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    regularizers: tuple[Regularizer, ...] = ()

    @property
    def slug(self) -> str:  # type: ignore[override]
        return self.recipe

    @property
    def lr(self) -> float | None:  # type: ignore[override]
        return self.options.get("lr")

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return any(r.exact for r in self.regularizers)

    def optimizer(self, model: nn.Module, lr: float | None) -> Optimizer:
        options = {**self.options, **({} if lr is None else {"lr": lr})}
        return RECIPES[self.recipe](model, **options, regularizers=self.regularizers, nonfinite="raise")

    @contextmanager
    def evaluating(self, optimizer: Any, problem: Problem) -> Iterator[None]:
        """At the average of the weights, if one is kept."""
        if optimizer.average is None:
            yield
            return
        with optimizer.averaged(), renewed_statistics(problem):
            yield


@dataclass(frozen=True)
class Peer(Entrant):
    """Any other optimizer; one gradient is counted for each time that it calls its closure.

    Attributes:
        label: what it is called.
        make: (model, learning rate) ↦ optimizer.
        slug: part of file names.
    """

    label: str
    make: Callable[[nn.Module, float], Optimizer]
    slug: str = "peer"

    def optimizer(self, model: nn.Module, lr: float | None) -> Optimizer:
        if lr is None:
            raise ValueError(f"{self.label} has no learning rate of its own; give one, or search it")
        return self.make(model, lr)
