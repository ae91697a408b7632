"""One step, written as the equations: the reference that every faster way is tested against.

P.observe(g);  c, d = Σ terms;  p ← p − α( M · momentum(g + c) + d );  prox
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from precond import contracts, vec
from precond.blocks import State
from precond.engine.cells import count_step
from precond.engine.point import Point
from precond.maps import Identity, LinearMap
from precond.regularizers.base import At
from precond.spaces import Cotangent, Instead, Prox, Tangent, Term
from precond.vec import Vec


@dataclass(frozen=True)
class Rules:
    """What a step obeys beside its groups' strategies.

    Attributes:
        statistics_from: ``"loss"``: P is built from the clean gradient; ``"total"``: from the regularized one;
            ``"lagged"``: likewise, a penalty in z being taken with the P before the step.
        max_norm: bound of the assembled gradient's norm, or None.
        norm_space: the space of that norm.
    """

    statistics_from: str = "loss"
    max_norm: float | None = None
    norm_space: str = "z"


@dataclass
class Evidence:
    """What a step knows beside the gradient at p.

    Attributes:
        observed: whether the statistics (and step counts) were committed already, by the probe.
        found: gradients at the probed points, by the number of the regularizer that asked for them.
        memo: what probes left for their terms.
        hessian: v ↦ H v, or None.
    """

    observed: bool = False
    found: dict[int, tuple[Vec, ...]] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    hessian: Callable[[Vec], Vec] | None = None


def observe(point: Point, gradient: Vec) -> None:
    """Commit a gradient to the statistics, and count the step."""
    for cell, span in point.spans:
        count_step(cell.state["step"])
        cell.observe(cell.state, gradient[span])


def ahead(point: Point, rules: Rules) -> list[State]:
    """The states of which P is made for a probe; nothing is changed.

    They are those after :func:`observe`, or, with lagged statistics, those before the step (of the first step: after it).
    """
    states = []
    for cell, span in point.spans:
        if rules.statistics_from == "lagged" and min(cell.state.steps) > 0:
            states.append(cell.state)
        else:
            state = cell.state.ahead()
            cell.observe(state, point.g[span])
            states.append(state)
    return states


def step(point: Point, rules: Rules, evidence: Evidence) -> Vec:
    """Move the parameters' values ``point.p`` (in place) and commit all state; returns the step u in p ← p − αu."""
    regularizers = point.choices[0].regularizers
    lagged = rules.statistics_from == "lagged"
    factors = cache(point.factors)  # after `observe`: asked for by the late terms alone, and by the descent
    maps = cache(lambda: [F @ N for F, N in factors()])
    before = cache(lambda: point.maps(ahead(point, rules)))
    ats = [
        point.at(
            k,
            before if r.circular and lagged else maps,
            found=evidence.found.get(k, ()),
            hessian=evidence.hessian,
            memo=evidence.memo,
        )
        for k, r in enumerate(regularizers)
    ]
    is_early = [not r.needs_map or (r.circular and lagged) for r in regularizers]
    early = [r.term(at) for r, at, now in zip(regularizers, ats, is_early, strict=True) if now]
    a = assemble(point.g, early)
    factor: Tensor | None = None
    if not evidence.observed:
        source = point.g if rules.statistics_from == "loss" else a
        settled = not any(r.circular for r in regularizers) and not evidence.found
        if rules.max_norm is not None and rules.norm_space == "p" and settled:
            # As when torch.nn.utils.clip_grad_norm_ runs before the step: the statistics see the clipped gradient.
            factor = _clip_factor(rules.max_norm, point.sums.norm(a))
            source, a = vec.scale(source, factor), vec.scale(a, factor)
        observe(point, source)
    late = [r.term(at) for r, at, now in zip(regularizers, ats, is_early, strict=True) if not now]
    a = assemble(a, late)
    if rules.max_norm is not None and factor is None:
        if rules.norm_space == "p":
            length = point.sums.norm(a)
        else:
            length = point.sums.dot(a, point.joined(maps()).gram(a)).clamp_min(0).sqrt()
        a = vec.scale(a, _clip_factor(rules.max_norm, length))
    u = descent(point, bounded(point, factors(), ats) if rules.statistics_from == "loss" else factors(), a)
    contracts.shapes("the step P Pᵀg", u, point.p)
    for term in [*early, *late]:
        if isinstance(term, Tangent):
            u = vec.add(u, term.formed())
    vec.add_scaled_(point.p, u, [-x for x in point.lr])
    for term in [*early, *late]:
        if isinstance(term, Prox):
            torch._foreach_copy_(point.p, term.apply(point.p))
    for cell in point.cells:
        cell.refresh()
    return u


def assemble(g: Vec, terms: Sequence[Term]) -> Vec:
    """g + Σ cotangents; a term that stands in place of g replaces it."""
    for term in terms:
        if isinstance(term, Instead):
            g = term.vec
    for term in terms:
        if isinstance(term, Cotangent):
            g = vec.add(g, term.vec)
    return g


def bounded(
    point: Point, factors: Sequence[tuple[LinearMap, LinearMap]], ats: Sequence[At]
) -> Sequence[tuple[LinearMap, LinearMap]]:
    """(F, N) of each cell with α·‖M‖·‖∇²R‖ ≤ 1: no step along the gradient of a penalty in p goes beyond the penalty's minimum.

    M made without knowing of the penalty may be as large as it likes, 1/σ² for inputs of a small variance σ². Where α‖M‖·2λ > 2, the
    steps p ← p − αM(g + 2λp) grow without bound, however small α∇²L is; (M⁻¹ + sI)⁻¹ in place of M leaves their fixed point.
    """
    each = [r.stiffness(at) for r, at in zip(point.choices[0].regularizers, ats, strict=True)]
    curvature = [sum(float(of_leaf[i]) for of_leaf in each) for i in range(len(point.p))]
    if not any(curvature):
        return factors
    out = []
    for (_, span), (F, N) in zip(point.spans, factors, strict=True):
        t = max(float(lr) * c for lr, c in zip(point.lr[span], curvature[span], strict=True))
        out.append((F, N.bounded(t) if t and isinstance(F, Identity) else N))
    return out


def descent(point: Point, factors: Sequence[tuple[LinearMap, LinearMap]], a: Vec, fold: bool = True) -> Vec:
    """F N Nᵀ · momentum(Fᵀa) with P = F N, or momentum(M a) where the momentum is one of tangents."""
    u: list[Tensor] = []
    for (cell, span), (F, N) in zip(point.spans, factors, strict=True):
        y = cell.averaged(F.rmv(a[span]), "cotangent", fold)
        u += cell.averaged(F.mv(N.gram(y)), "tangent", fold)
    return tuple(u)


def last_update(point: Point) -> Vec:
    """The u of the step just taken, from the state that it left; exact where an average holds what was descended."""
    regularizers = point.choices[0].regularizers
    terms = [r.term(point.at(k, point.maps)) for k, r in enumerate(regularizers) if not (r.probes or r.exact)]
    a = assemble(point.g, terms)
    u = descent(point, point.factors(), a, fold=False)
    for term in terms:
        if isinstance(term, Tangent):
            u = vec.add(u, term.formed())
    return u


def _clip_factor(max_norm: float, length: Tensor) -> Tensor:
    # The constant is torch.nn.utils.clip_grad_norm_'s.
    return (max_norm / (length + 1e-6)).clamp_max(1.0)
