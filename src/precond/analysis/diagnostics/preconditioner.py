r"""The P in force of an optimizer, ours or another, aligned with the parameters of an objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import BlockDiagonal, Diagonal, Identity, InverseRoot, LinearMap, Scaled
from precond.algebra.maps.widened import of_parameters, wide
from precond.algebra.vec import Vec
from precond.analysis.curvature import Objective
from precond.analysis.curvature.precision import rooted
from precond.analysis.diagnostics import peers, torch_optimizers  # noqa: F401 - registers them
from precond.analysis.diagnostics.registry import MapOf, registered
from precond.optim.optimizer import PreconditionedGD


def preconditioner_of(
    optimizer: torch.optim.Optimizer,
    params: Objective | Iterable[Tensor] | None = None,
) -> LinearMap:
    r"""P of p ← p − αM·(averaged gradient), M = P Pᵀ, as it is after the last step: ``P.T @ hessian(objective) @ P`` is H in z.

    Momentum is no part of P. The learning rate α is none either, but where groups (or routes) differ in theirs, their ratio is:
    P of a group is multiplied by √(α_group/α), with α the largest one, :func:`step_size`. So PᵀHP is what the steps go by, and
    α·λ_max(PᵀHP) < 2 is their limit of stability without momentum. (Where all rates are 0 there is no ratio, and none is
    taken.) That is exact where the tensors of one joint block share a rate. Frozen parameters are left as they are, P = I, and so
    are those that have had no gradient yet: see :meth:`PreconditionedGD.map`.

    Where an optimizer states M alone (:class:`~precond.Muon`) P is the symmetric root M^(1/2). It is singular where the momentum is (of a last
    layer on C classes, by cross entropy, it has rank C − 1): ``solve`` is the pseudo-inverse then.

    ``condition_number(P.T @ hessian(objective) @ P, float64=True)`` takes both to float64.

    Args:
        optimizer: :class:`PreconditionedGD`, or SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Muon of
            torch.optim, one of pytorch-optimizer, heavyball, schedulefree or distributed_shampoo that
            :mod:`precond.analysis.diagnostics.peers` knows, or of a class made known by :func:`register`.
        params: what P is aligned with: an objective's parameters, or these; None: all of the optimizer's that require a
            gradient, in order.

    Raises:
        RuntimeError: before the first step, where P depends on gradients; where it depends on the last one, which is gone.
        TypeError: for an optimizer whose P is not known.
        ValueError: for parameters that are not the optimizer's.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.RMSprop([p], alpha=0.0, eps=0.0)
        >>> p.grad = torch.tensor([4.0, 0.25]); optimizer.step()
        >>> preconditioner_of(optimizer).to_dense()  # diag(1/√|g|)
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])

    References:
        Ye, eqs. (4)–(8).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"preconditioner_of: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    wanted, names = _aligned(optimizer, params)
    with torch.no_grad():
        if isinstance(optimizer, PreconditionedGD):
            map_ = rooted(optimizer.map(wanted))
        else:
            map_ = _from_state(optimizer, wanted, names)
        return _weighted(map_, _ratios(optimizer, wanted))


def step_size(optimizer: torch.optim.Optimizer, params: Objective | Iterable[Tensor] | None = None) -> float:
    """α, the largest learning rate of any of the parameters, which :func:`preconditioner_of` relates the others to.

    Args:
        optimizer: as in :func:`preconditioner_of`.
        params: as there.

    Returns:
        A number; ``lr_scale`` of routes is in it.

    Example:
        >>> import torch
        >>> p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.5}])
        >>> step_size(optimizer), step_size(optimizer, [p])
        (0.5, 0.1)
    """
    wanted, _ = _aligned(optimizer, params)
    return max(_rates(optimizer, wanted), default=0.0)


def _aligned(optimizer: torch.optim.Optimizer, params: Objective | Iterable[Tensor] | None) -> tuple[Vec, Sequence[str]]:
    """The parameters that P is aligned with, and what they are called in messages."""
    if isinstance(optimizer, PreconditionedGD):
        optimizer.follow_model()
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if params is None:
        params = [p for p in own if p.requires_grad]
    names: Sequence[str]
    if isinstance(params, Objective):
        wanted, names = params.params, params.names
    else:
        wanted = tuple(params)
        names = [f"params[{i}] of shape {tuple(p.shape)}" for i, p in enumerate(wanted)]
    known = {id(p) for p in own}
    alien = [name for name, p in zip(names, wanted, strict=True) if id(p) not in known]
    if alien:
        raise ValueError(
            f"preconditioner_of: {alien[0]} is not a parameter of this optimizer ({len(alien)} of {len(wanted)} are not); give an "
            "Objective of the model that it trains (not objective.double(), which holds a copy), "
            "with params= those that it steps"
        )
    return wanted, names


def _from_state(optimizer: torch.optim.Optimizer, wanted: Vec, names: Sequence[str]) -> LinearMap:
    known = registered(optimizer)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    began = {id(p) for p, state in optimizer.state.items() if state and float(state.get("step", 1)) > 0}
    if not known.stateless and wanted and not began and any(p.requires_grad for p in wanted):
        raise RuntimeError(
            f"preconditioner_of: {type(optimizer).__name__} has seen no gradient of {names[0]} yet, nor of any other, so P is not "
            "known; take a step first"
        )
    maps: list[LinearMap] = []
    for p in wanted:
        if known.stateless or id(p) in began:
            maps.append(_map(known.map_of, optimizer, p, group_of[id(p)]))
        else:
            maps.append(Identity((p.detach(),)))
    return side_by_side(maps, tuple(p.detach() for p in wanted))


def _map(map_of: MapOf, optimizer: torch.optim.Optimizer, p: Tensor, group: Mapping[str, Any]) -> LinearMap:
    """P of one parameter.

    Raises:
        TypeError: where the state or the group is not what the function knows.
    """
    try:
        return map_of(p, optimizer.state.get(p, {}), group)
    except KeyError as error:
        cls = type(optimizer)
        state = ", ".join(map(str, optimizer.state.get(p, {}))) or "nothing"
        raise TypeError(
            f"preconditioner_of: {cls.__module__}.{cls.__qualname__} has no {error} in its groups or its state ({state}): it is of another "
            f"version than is known; state its P with @precond.analysis.diagnostics.register({cls.__name__})"
        ) from error


def side_by_side(maps: Sequence[LinearMap], like: Vec) -> LinearMap:
    """One map per tensor as one map; diagonal ones as one diagonal."""
    if all(isinstance(m, InverseRoot) for m in maps):
        return InverseRoot(tuple(m.denominator[0] for m in maps))  # type: ignore[attr-defined]
    if all(isinstance(m, Identity) for m in maps):
        return Identity(like)
    return of_parameters([((i,), m) for i, m in enumerate(maps)], like)


def _rates(optimizer: torch.optim.Optimizer, wanted: Vec) -> list[float]:
    """The learning rate of each parameter."""
    rate = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    if isinstance(optimizer, PreconditionedGD):
        choices = [optimizer.naming.build(group) for group in optimizer.param_groups]
        for leaf in optimizer.models.leaves(optimizer.param_groups, optimizer.observes):
            rate[id(leaf.param)] *= choices[leaf.group].preconditioner.lr_scale(leaf)
    return [rate[id(p)] for p in wanted]


def _ratios(optimizer: torch.optim.Optimizer, wanted: Vec) -> list[float]:
    rates = _rates(optimizer, wanted)
    largest = max(rates, default=0.0)
    return [r / largest if largest > 0 else 1.0 for r in rates]


def _weighted(map_: LinearMap, ratios: Sequence[float]) -> LinearMap:
    """√ratio·P of each tensor. M stays a map that the steps go by: blocks that act jointly have one learning rate."""
    if all(r == 1 for r in ratios):
        return map_
    like = map_.like
    assert like is not None
    if isinstance(map_, BlockDiagonal):
        parts = []
        for index, part in map_.blocks:
            own = [ratios[i] for i in index]
            if len(set(own)) == 1:
                parts.append((index, part if own[0] == 1 else Scaled(part, own[0] ** 0.5)))
            else:
                parts.append((index, _roots(own, tuple(like[i] for i in index)) @ part))
        rest = [((i,), _roots([ratios[i]], (like[i],))) for i in set(range(len(like))) - {i for p, _ in parts for i in p}]
        return BlockDiagonal([*parts, *rest], like)
    return _roots(ratios, like) @ map_


def _roots(ratios: Sequence[float], like: Vec) -> Diagonal:
    return Diagonal(tuple(torch.full_like(t, r**0.5, dtype=wide(t)) for t, r in zip(like, ratios, strict=True)))
