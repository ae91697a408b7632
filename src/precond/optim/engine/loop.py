"""One step, written as the equations: the reference that every faster way is tested against.

P.observe(g);  c, d = Σ terms;  p ← p − α( bend(M · momentum(g + c)) + d );  prox
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.spaces import Bend, Cotangent, Instead, ProposedStep, Prox, Tangent, Term
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import State
from precond.optim.checking import contracts
from precond.optim.engine.counting import count_step
from precond.optim.engine.point import Point
from precond.optim.engine.verdict import Verdict
from precond.optim.regularizers.base import At, Regularizer


@dataclass(frozen=True)
class Rules:
    """What a step obeys beside its groups' strategies.

    Attributes:
        statistics_from: ``"loss"``: P is built from the clean gradient; ``"total"``: from the regularized one;
            ``"lagged"``: likewise, a penalty in z being taken with the P before the step.
        max_norm: bound of the assembled gradient's norm, or None.
        norm_space: the space of that norm.
        reference: take every block alone and by its map, without what does several things at once: the reference.
    """

    statistics_from: str = "loss"
    max_norm: float | None = None
    norm_space: str = "z"
    reference: bool = False


@dataclass
class ProbeResults:
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


def observe(point: Point, gradient: Vec, verdict: Verdict | None = None) -> None:
    """Commit a gradient to the statistics, and count the step."""
    count_step([cell.state for cell in point.cells], verdict)
    for cell, span in point.spans:
        cell.observe(cell.state, gradient[span])


def ahead(point: Point, rules: Rules) -> list[State]:
    """The states of which P is made for a probe; nothing is changed.

    They are those after :func:`observe`, or, with lagged statistics, those before the step (of the first step: after it).
    """
    lagged = rules.statistics_from == "lagged"
    return [cell.ahead(point.g[span], lagged) for cell, span in point.spans]


def step(
    point: Point, rules: Rules, evidence: ProbeResults, measured: bool = False, verdict: Verdict | None = None
) -> list[Tensor]:
    """Move the parameters' values ``point.p`` (in place) and commit all state.

    Args:
        measured: whether the lengths of the parameters' moves αu, p ← p − αu, are asked for.
        verdict: whether the step is taken, where the host does not know; None: it is.

    Returns:
        These lengths, or nothing. Where something raises, cells that have not moved have counted no step.
    """
    counted: list[State] = []
    try:
        if verdict is None:
            return _step(point, rules, evidence, measured, None, counted)
        point.g = verdict.only(point.g)
        with verdict.over([*point.p, *(t for cell in point.cells for t in cell.written())]):
            return _step(point, rules, evidence, measured, verdict, counted)
    except BaseException:
        count_step(counted, verdict, by=-1.0)
        raise


def _step(
    point: Point, rules: Rules, evidence: ProbeResults, measured: bool, verdict: Verdict | None, counted: list[State]
) -> list[Tensor]:
    """The step; ``counted`` are the states of cells that were counted and have not moved yet."""
    regularizers = point.choices[0].regularizers
    lagged = rules.statistics_from == "lagged"
    maps = cache(point.maps)  # after `observe`
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
    taking = [k for k, at in enumerate(ats) if any(at.takes_part) or at.found]
    regularizers, ats = tuple(regularizers[k] for k in taking), [ats[k] for k in taking]
    is_early = [not r.waits(at) or (r.circular and lagged) for r, at in zip(regularizers, ats, strict=True)]
    early = [r.term(at) for r, at, now in zip(regularizers, ats, is_early, strict=True) if now]
    a = assemble(point.g, early)
    factor: Tensor | None = None
    source = point.g if rules.statistics_from == "loss" else a
    alone = not evidence.observed and all(is_early) and a is source and rules.max_norm is None and not rules.reference
    if not evidence.observed and not alone:
        of_one_gradient = not any(r.circular for r in regularizers) and not evidence.found
        known = of_one_gradient or (all(is_early) and source is a)
        if rules.max_norm is not None and rules.norm_space == "p" and known:
            # As when torch.nn.utils.clip_grad_norm_ runs before the step: the statistics see the clipped gradient.
            # (With statistics_from="loss" clean gradients, where a perturbed one is descended, are no multiples of it, and stay as they are.)
            factor = _clip_factor(rules.max_norm, point.sums.norm(a))
            source, a = vec.scale(source, factor), vec.scale(a, factor)
        counted += [cell.state for cell in point.cells]
        observe(point, source, verdict)
    late = [r.term(at) for r, at, now in zip(regularizers, ats, is_early, strict=True) if not now]
    a = assemble(a, late)
    if rules.max_norm is not None and factor is None:
        if rules.norm_space == "p":
            length = point.sums.norm(a)
        else:
            length = point.sums.dot(a, point.joined(maps()).gram(a)).clamp_min(0).sqrt()
        a = vec.scale(a, _clip_factor(rules.max_norm, length))
    terms = [*early, *late]
    tangents = [term for term in terms if isinstance(term, Tangent)]
    lengths: list[Tensor] = []
    least = bounds(point, ats, regularizers) if rules.statistics_from == "loss" else []
    # One after the other: memory for one cell's step will do, unless something looks at all of them.
    if alone:
        counted += [cell.state for cell in point.cells]
        count_step(counted, verdict)
    each = ((span, cell.taken(a[span]) if alone else cell.descent(a[span], least[span])) for cell, span in point.spans)
    for span, u in bent(each, a, terms):
        lr = point.lr[span]
        contracts.shapes("the step P Pᵀg", u, point.p[span])
        if measured:
            whole = _with(u, tangents, span)
            lengths += torch._foreach_norm(vec.scale(whole, lr))
        _move(point.p[span], u, [term.part(span) for term in tangents], lr)
        del counted[:1]
        del u  # memory for the next one's
    for term in terms:
        last = term.apply if isinstance(term, Prox) else term.project if isinstance(term, Bend) else None
        if last is not None:
            vec.copy_(point.p, last(point.p))
    for cell in point.cells:
        cell.refresh()
    return lengths


def assemble(g: Vec, terms: Sequence[Term]) -> Vec:
    """g + Σ cotangents; a term that stands in place of g replaces it."""
    for term in terms:
        if isinstance(term, Instead):
            g = term.vec
    for term in terms:
        if isinstance(term, Cotangent):
            g = vec.add(g, term.vec)
    return g


def bent(each: Iterable[tuple[slice, Vec]], a: Vec, terms: Sequence[Term]) -> Iterable[tuple[slice, Vec]]:
    """(span, step) of the cells, which descend a, as terms bend them, stage after stage."""
    bends = sorted((term for term in terms if isinstance(term, Bend)), key=lambda term: term.stage)
    if not bends:
        return each
    spans, steps = zip(*each, strict=True)
    u = tuple(t for step in steps for t in step)
    made = ProposedStep(u, a)
    for bend in bends:
        u = bend.apply(u, made)
    return [(span, u[span]) for span in spans]


def bounds(point: Point, ats: Sequence[At], regularizers: Sequence[Regularizer]) -> list[Scalar]:
    """The least t of each tensor with α‖M‖·‖∇²R‖ ≤ 1 for ‖M‖ ≤ 1/t: no step along the gradient of a penalty in p goes beyond its minimum.

    M made without knowing of the penalty may be as large as it likes, 1/σ² for inputs of a small variance σ². Where α‖M‖·2λ > 2, the
    steps p ← p − αM(g + 2λp) grow without bound, however small α∇²L is; (M⁻¹ + sI)⁻¹ in place of M leaves their fixed point.
    """
    curvature = [sum(x) for x in zip(*(r.stiffness(at) for r, at in zip(regularizers, ats, strict=True)), strict=True)]
    if all(not isinstance(x, Tensor) and x == 0 for x in curvature):
        return []
    return vec.combined(lambda x, c: x * c, point.lr, curvature)


def last_update(point: Point) -> Vec:
    """The u of the step just taken, from the state that it left; exact where an average holds what was descended."""
    regularizers = point.choices[0].regularizers
    terms = [r.term(point.at(k, point.maps)) for k, r in enumerate(regularizers) if not (r.probes or r.exact)]
    a = assemble(point.g, terms)
    tangents = [term for term in terms if isinstance(term, Tangent)]
    each = ((span, cell.descent(a[span], fold=False)) for cell, span in point.spans)
    return tuple(t for span, u in bent(each, a, terms) for t in _with(u, tangents, span))


def _move(p: Vec, u: Vec, tangents: Sequence[Tangent], lr: Sequence[Scalar]) -> None:
    """p ← p − α(u + Σ tangents) in place; multiples of p itself by one multiplication."""
    keep: list[Scalar] = [1.0] * len(p)
    for term in tangents:
        if all(t is v for t, v in zip(p, term.vec, strict=True)):
            keep = vec.combined(lambda k, x, s: k - x * s, keep, lr, term.scales)
    vec.scale_(p, keep)
    for term in tangents:
        if not all(t is v for t, v in zip(p, term.vec, strict=True)):
            vec.add_scaled_(p, term.vec, vec.combined(lambda x, s: -x * s, lr, term.scales))
    vec.add_scaled_(p, u, vec.combined(lambda x: -x, lr))


def _with(u: Vec, tangents: Sequence[Tangent], span: slice) -> Vec:
    """u + Σ tangents, of a cell."""
    for term in tangents:
        u = vec.add(u, term.part(span).formed())
    return u


def _clip_factor(max_norm: float, length: Tensor) -> Tensor:
    # The constant is torch.nn.utils.clip_grad_norm_'s.
    return (max_norm / (length + 1e-6)).clamp_max(1.0)
