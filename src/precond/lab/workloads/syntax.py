"""Entrants as text: ``sgd(momentum=0.9)``, ``adamw + SAM(0.05, space='z')``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from precond import PreconditionedGD
from precond.algebra import schedules
from precond.lab.workloads.entrant import RECIPES, Recipe
from precond.lab.workloads.suggestions import did_you_mean
from precond.optim import averages, preconditioners
from precond.optim.regularizers import L1, L2, SAM, GradientNorm, Regularizer

REGULARIZERS: Mapping[str, type[Regularizer]] = {cls.__name__: cls for cls in (L1, L2, GradientNorm, SAM)}
# What may stand as a value beside literals: schedules of a penalty's number, preconditioners (adam(inputs=BNP())), and averages of the
# weights (adam(average=EMA(0.99))).
VALUES: Mapping[str, type[Any]] = {cls.__name__: cls for cls in (schedules.TimesLr, schedules.Warmup)} | {
    name: cls
    for module, base in ((preconditioners, preconditioners.Preconditioner), (averages, averages.WeightAverage))
    for name, cls in vars(module).items()
    if isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)
}

# What a training or a recipe decides itself, and what torch has for its own kernels.
_RESERVED = {"params", "regularizers", "nonfinite", "preconditioner", "naming", "maximize"} | {
    "foreach", "fused", "capturable", "differentiable"
}  # fmt: skip
_GRAMMAR = "write recipe, recipe(option=value) or recipe + Penalty(value, option=value), such as adamw + SAM(0.05, space='z')"


class SyntaxProblem(ValueError):
    """An entrant is not written as it should be; the message names it and the remedy."""


def parse_entrants(text: str) -> tuple[Recipe, ...]:
    """Entrants separated by commas.

    Values are Python literals, ``inf``, a schedule of a penalty's number (``TimesLr(0.25)``, ``Warmup(0.1, 500)``), a
    preconditioner (``BNP()``), or an average of the weights (``EMA(0.99)``), at which they are evaluated then; nothing is evaluated.

    Raises:
        SyntaxProblem: for anything else, for unknown names (the message offers the nearest), for entrants that are there twice.

    Example:
        >>> [entrant.label for entrant in parse_entrants("sgd(momentum=.9), adamw+L2(1e-4,space='p')")]
        ['sgd(momentum=0.9)', "adamw + L2(0.0001, space='p')"]
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SyntaxProblem(f"cannot read {text!r}: {_GRAMMAR}") from error
    # A parenthesized tuple would read the same as entrants side by side.
    nodes = tree.elts if isinstance(tree, ast.Tuple) else [tree]
    entrants = tuple(_entrant(node) for node in nodes)
    if not entrants:
        raise SyntaxProblem(f"no recipe is given: {_GRAMMAR}")
    labels = [entrant.label for entrant in entrants]
    for label in labels:
        if labels.count(label) > 1:
            raise SyntaxProblem(
                f"{label!r} is there {labels.count(label)} times; name each entrant once (several seeds: --seeds)"
            )
    return entrants


def parse_recipe(text: str, label: str | None = None) -> Recipe:
    """One entrant, under a name of one's own.

    Example:
        >>> parse_recipe("adam(inputs=BNP())", "BNP∘Adam").label
        'BNP∘Adam'
    """
    (recipe,) = parse_entrants(text)
    return recipe if label is None else dataclasses.replace(recipe, label=label)


def _entrant(node: ast.expr) -> Recipe:
    label = ast.unparse(node)
    recipe, *penalties = _summands(node)
    name, positional, options = _call(recipe, label)
    if name in REGULARIZERS:
        raise SyntaxProblem(f"{label!r}: {name} is a penalty; a recipe comes first, such as sgd + {label}")
    if name not in RECIPES:
        raise SyntaxProblem(f"{label!r}: unknown recipe {name!r}{did_you_mean(name, RECIPES)} (there are {', '.join(RECIPES)})")
    if positional:
        raise SyntaxProblem(f"{label!r}: options of {name} need their names, such as {name}(lr=0.01)")
    known = _options(RECIPES[name])
    for option in options:
        if option not in known:
            raise SyntaxProblem(
                f"{label!r}: {name} has no option {option!r}{did_you_mean(option, known)} (it has {', '.join(known)})"
            )
    lr = options.get("lr")
    if lr is not None and not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise SyntaxProblem(f"{label!r}: lr must be a number > 0, got {lr!r}")
    return Recipe(label, name, options, tuple(_penalty(node, label) for node in penalties))


def _options(recipe: Callable[..., Any]) -> list[str]:
    """Options of a recipe, and where it passes further ones on, those of the optimizer."""
    parameters = inspect.signature(recipe).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    if len(names) < len(parameters):
        names += [n for n, p in inspect.signature(PreconditionedGD).parameters.items() if p.kind is p.KEYWORD_ONLY]
    return [name for name in dict.fromkeys(names) if name not in _RESERVED]


def _summands(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _summands(node.left)
        yield node.right
    else:
        yield node


def _penalty(node: ast.expr, label: str) -> Regularizer:
    name, positional, options = _call(node, label)
    if name not in REGULARIZERS:
        raise SyntaxProblem(
            f"{label!r}: unknown penalty {name!r}{did_you_mean(name, REGULARIZERS)} (there are {', '.join(REGULARIZERS)})"
        )
    return _made(REGULARIZERS[name], positional, options, label)


def _made(cls: Any, positional: list[Any], options: dict[str, Any], label: str) -> Any:
    known = inspect.signature(cls).parameters
    for option in options:
        if option not in known:
            raise SyntaxProblem(f"{label!r}: {cls.__name__} has no option {option!r}{did_you_mean(option, known)}")
    try:
        return cls(*positional, **options)
    except (TypeError, ValueError) as error:
        raise SyntaxProblem(f"{label!r}: {error}") from error


def _call(node: ast.expr, label: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name, positional values and options of ``name`` or ``name(...)``."""
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise SyntaxProblem(f"cannot read {ast.unparse(node)!r} in {label!r}: {_GRAMMAR}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise SyntaxProblem(f"{label!r}: ** is not understood; {_GRAMMAR}")
    options = {str(keyword.arg): _value(keyword.value, label) for keyword in node.keywords}
    return node.func.id, [_value(argument, label) for argument in node.args], options


def _value(node: ast.expr, label: str) -> Any:
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.Call):
        name, positional, options = _call(node, label)
        if name not in VALUES:
            raise SyntaxProblem(
                f"{label!r}: unknown value {name!r}{did_you_mean(name, VALUES)} (there are {', '.join(VALUES)})"
            )
        return _made(VALUES[name], positional, options, label)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise SyntaxProblem(f"{label!r}: {ast.unparse(node)} is no number, string, boolean or tuple of these") from error
