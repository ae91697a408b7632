"""The recipes as classes under torch.optim's names, for trainers that ask for a class: ``precond.optim.AdamW``, ….

``precond.optim.AdamW(params, lr=1e-3)`` takes what ``precond.adamw`` takes and does what it does. Classes are picklable, and
each is a :class:`~precond.PreconditionedGD`, hence a ``torch.optim.Optimizer``. Their home is ``precond.optim``, as that of torch's is
``torch.optim``, since ``precond.Muon``, ``precond.SOAP`` and others are preconditioners. The names without a namesake there
(SGD, Adam, AdamW, RMSprop) are names of ``precond`` too.

Example:
    >>> import torch, precond
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = precond.optim.SOAP(model, lr=3e-3)
    >>> isinstance(optimizer, torch.optim.Optimizer), type(optimizer).__name__
    (True, 'SOAP')
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from precond.optim import recipes
from precond.optim.optimizer import PreconditionedGD

__all__ = ["BNP", "SGD", "SOAP", "Adagrad", "Adam", "AdamW", "Auto", "Muon", "RMSprop", "Recipe", "Shampoo", "Whitening"]


class Recipe(PreconditionedGD):
    """An optimizer whose constructor is a recipe: ``class MyAdamW(Recipe, recipe=precond.adamw)``.

    Its arguments are those of the recipe.

    Raises:
        TypeError: where it is constructed itself: it names no recipe.

    Example:
        >>> import torch, precond
        >>> class MyAdamW(precond.optim.Recipe, recipe=precond.adamw): ...
        >>> MyAdamW(torch.nn.Linear(3, 2), lr=1e-3).param_groups[0]["weight_decay"]
        0.01
    """

    recipe: ClassVar[Callable[..., PreconditionedGD]]

    def __init_subclass__(cls, recipe: Callable[..., PreconditionedGD] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if recipe is None:
            return

        def init(self: Recipe, params: Any, *args: Any, **options: Any) -> None:
            recipe(params, *args, **options, made=self)

        signature = inspect.signature(recipe)
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [itself, *signature.parameters.values()]
        init.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        init.__doc__, init.__annotations__, init.__wrapped__ = recipe.__doc__, recipe.__annotations__, recipe  # type: ignore[attr-defined]
        cls.recipe = staticmethod(recipe)
        cls.__init__ = init  # type: ignore[method-assign]

    # For type checkers: any recipe's arguments.
    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        raise TypeError("Recipe names no recipe: class MyAdamW(Recipe, recipe=precond.adamw)")


class SGD(Recipe, recipe=recipes.sgd):
    """:func:`precond.sgd` as a class."""


class Adagrad(Recipe, recipe=recipes.adagrad):
    """:func:`precond.adagrad` as a class."""


class RMSprop(Recipe, recipe=recipes.rmsprop):
    """:func:`precond.rmsprop` as a class."""


class Adam(Recipe, recipe=recipes.adam):
    """:func:`precond.adam` as a class."""


class AdamW(Recipe, recipe=recipes.adamw):
    """:func:`precond.adamw` as a class."""


class BNP(Recipe, recipe=recipes.bnp):
    """:func:`precond.bnp` as a class; ``precond.BNP`` is the preconditioner."""


class Whitening(Recipe, recipe=recipes.whitening):
    """:func:`precond.whitening` as a class; ``precond.Whitening`` is the preconditioner."""


class Muon(Recipe, recipe=recipes.muon):
    """:func:`precond.muon` as a class; ``precond.Muon`` is the preconditioner."""


class SOAP(Recipe, recipe=recipes.soap):
    """:func:`precond.soap` as a class; ``precond.SOAP`` is the preconditioner."""


class Shampoo(Recipe, recipe=recipes.shampoo):
    """:func:`precond.shampoo` as a class; ``precond.Shampoo`` is the preconditioner."""


class Auto(Recipe, recipe=recipes.auto):
    """:func:`precond.auto` as a class; ``precond.Auto`` is the preconditioner."""
