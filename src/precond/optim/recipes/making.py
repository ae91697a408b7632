"""What recipes are made of: a group's options → strategies → the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ParamSpec

from torch import Tensor

from precond.algebra.schedules import numbers, replaced
from precond.optim.checking.arguments import checked
from precond.optim.engine.cells import Choice
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.compatibility import listed
from precond.optim.optimizer.naming import Naming
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import RMS, Preconditioner, RelativeRMS
from precond.optim.regularizers import Regularizer

Given = ParamSpec("Given")
_OWN = ("self", "params", "lr", "preconditioner", "regularizers", "momentum", "naming")
_OPTIONS = tuple(name for name in signature(PreconditionedGD.__init__).parameters if name not in _OWN)
"""Of :class:`PreconditionedGD`, that every recipe takes."""


def recipe(
    function: Callable[Given, PreconditionedGD], of: Callable[..., PreconditionedGD] | None = None
) -> Callable[Given, PreconditionedGD]:
    """A function that makes an optimizer: its arguments are checked, and its further options are those of :class:`PreconditionedGD`.

    ``made`` too, the object to make where a class makes one.

    Args:
        of: the recipe that it is made of, whose options it takes too.
    """
    more = () if of is None else (name for name in signature(of).parameters if name not in ("params", "options"))
    return checked(function, further=(*more, *_OPTIONS), silent=("made",))


@dataclass(frozen=True)
class Build:
    """A group's options → strategies: a recipe's own, and the user's further regularizers."""

    recipe: Callable[[Mapping[str, Any]], Choice]
    extra: tuple[Regularizer, ...]

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        choice = self.recipe(group)
        return Choice(choice.preconditioner, choice.momentum, choice.regularizers + replaced(self.extra, group))


def implementations(name: str, foreach: bool | None, fused: bool | None, differentiable: bool, **numbers: Any) -> None:
    """Refuse what torch.optim refuses of its implementations, none of which is used here.

    Args:
        numbers: those that torch's ``foreach`` does not take as tensors.

    Raises:
        RuntimeError, ValueError: of torch's types.
    """
    for other, asked in (("foreach", foreach), ("differentiable", differentiable)):
        if fused and asked:
            raise RuntimeError(f"{name}: fused=True and {other}=True cannot be together; leave both out, `engine` decides")
    for number, value in numbers.items():
        if foreach and isinstance(value, Tensor):
            raise ValueError(f"{name}: {number} as a tensor is refused with foreach=True, as by torch.optim; leave foreach out")


def make(
    name: str,
    params: Params,
    lr: float | Tensor,
    recipe: Callable[[Mapping[str, Any]], Choice],
    defaults: dict[str, Any],
    state: Mapping[str, str],
    unsupported: Mapping[str, Any],
    regularizers: Iterable[Regularizer],
    options: dict[str, Any],
    only_started: bool = False,
    settle: Callable[[PreconditionedGD], Mapping[str, Any] | None] | None = None,
) -> PreconditionedGD:
    """A recipe's optimizer; ``options`` of :class:`PreconditionedGD`, and ``made``, the object to make where a class makes one."""
    for option, value in unsupported.items():
        if value:
            raise ValueError(f"{name}: {option}={value!r} is not supported; leave it out (torch.optim's own class has it)")
    extra = listed(name, regularizers)
    defaults = {**defaults, "foreach": None, "differentiable": False, "fused": None}
    build = Build(recipe, extra)
    choice = build(defaults)
    options.setdefault("norm_space", "p")
    options.setdefault("statistics_from", statistics(choice.regularizers))
    naming = Naming(name, {**defaults, **numbers(extra)}, build, state, only_started, settle)
    made: PreconditionedGD = options.pop("made", None) or PreconditionedGD.__new__(PreconditionedGD)
    PreconditionedGD.__init__(
        made,
        params,
        lr,
        preconditioner=choice.preconditioner,
        momentum=choice.momentum,
        regularizers=choice.regularizers,
        naming=naming,
        **options,
    )
    return made


def statistics(regularizers: Iterable[Regularizer]) -> str:
    """From what M is applied to: the regularized gradient, where a penalty joins it; penalties in z take the P before.

    As torch's coupled decay and the literature's SAM-Adam have it. M is about 1/√r̂, without bound where the clean gradient vanishes
    (a dead unit, an input that is always 0, a bias before a normalization) and the penalty's does not: 2λp/ε would be its step. Made
    of a = g + c, M a is bounded as it always is, |m̂| ≤ C√r̂, and it vanishes where a does, so that the optimum is that of L + λR.
    """
    if any(r.circular for r in regularizers):
        return "lagged"
    return "total" if any(r.joins_gradient for r in regularizers) else "loss"


def after(inputs: Preconditioner | None, P: Preconditioner, group: Mapping[str, Any]) -> Preconditioner:
    """P in the coordinates of an input-side preconditioner, whose numbers are the group's; None: P itself."""
    if inputs is None:
        return P
    return replaced(inputs, group) @ (RelativeRMS(**vars(P)) if type(P) is RMS else P)
