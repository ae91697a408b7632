"""Which parameters of a model an objective is a function of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from precond.algebra.vec import Vec


def chosen_parameters(model: nn.Module, params: Iterable[Tensor | str] | Tensor | str | None) -> tuple[tuple[str, ...], Vec]:
    named: dict[str, Tensor] = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad and (p.is_floating_point() or p.is_complex())}
        if not chosen:
            raise ValueError(
                f"Objective: {type(model).__name__} has no parameter that requires a gradient; call requires_grad_() on some"
            )
    else:
        chosen = parameters_named(named, params)
    for name, p in chosen.items():
        if is_lazy(p):
            raise ValueError(f"Objective: parameter {name!r} is lazy and has no shape yet; call the model on a batch first")
        if not p.requires_grad:
            raise ValueError(
                f"Objective: parameter {name!r} does not require a gradient; call requires_grad_() on it or leave it out"
            )
        if p.is_complex():
            raise ValueError(
                f"Objective: parameter {name!r} is complex; curvature is defined here for real parameters, leave it out"
            )
    return tuple(chosen), tuple(chosen.values())


def parameters_named(named: Mapping[str, Tensor], params: Iterable[Tensor | str] | Tensor | str) -> dict[str, Tensor]:
    """Those of some parameters that are meant, in the order in which they are named."""
    names = {id(p): name for name, p in named.items()}
    chosen: dict[str, Tensor] = {}
    for i, wanted in enumerate([params] if isinstance(params, Tensor | str) else params):
        found = [n for n in named if fnmatchcase(n, wanted)] if isinstance(wanted, str) else [names.get(id(wanted), "")]
        if not found or found == [""]:
            what = repr(wanted) if isinstance(wanted, str) else f"a tensor of shape {tuple(wanted.shape)}"
            raise ValueError(f"Objective: params[{i}] is {what}, which is no parameter of the model; it has {', '.join(named)}")
        chosen |= {name: named[name] for name in found}
    if not chosen:
        raise ValueError("Objective: params is empty; give parameters or names, or None for all")
    return chosen
