"""Remedies tried: short trainings of copies, each at a rate of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra import checks
from precond.analysis.curvature import Objective
from precond.analysis.curvature.batches import checked, size
from precond.analysis.diagnostics.advice import MORE, Advice, fewer
from precond.analysis.diagnostics.diagnosis import Diagnosis
from precond.analysis.diagnostics.problem import as_objective
from precond.analysis.diagnostics.rates import Range, lr_range
from precond.analysis.diagnostics.remedies import Candidate, base_of
from precond.analysis.diagnostics.short import Curve, compared

_FIRST = 3  # remedies that are tried
_CHEAP = 3e7


@dataclass(frozen=True)
class Tried:
    """One of them.

    Attributes:
        label: what was trained.
        curve: at the rate that ended lowest.
        ratio: steps without it over steps with it, to where the slower of both gets; None for what is compared with.
        predicted: the interval that was predicted, in words.
        why: it could not be trained; ``""`` where it could.
    """

    label: str
    curve: Curve | None
    ratio: float | None
    predicted: str = ""
    why: str = ""

    def __str__(self) -> str:
        if self.curve is None:
            return f"{self.label}: {self.why}"
        end = f"{self.label}: loss {self.curve.losses[0]:.4g} → {self.curve.final:.4g} at learning rate {self.curve.lr:.2g}"
        return end if self.ratio is None else f"{end}, {fewer(self.ratio)}"


def try_remedies(
    found: Diagnosis,
    objective: Objective | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    data: Any = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 150,
    examples: int = 2048,
    watch: Callable[[str], None] | None = None,
) -> tuple[Diagnosis, tuple[Tried, ...]]:
    """Train as now and with each of the first three remedies, at rates of their own, and put what was found into the advice.

    What is not advised is tried after what is, where there are fewer than three. What then saves a fifth of the steps is advice, ordered by
    what was measured; what does not is none. Copies of the model are trained on the objective's batches in turn; curves are losses on the
    same. A rate is that of several, half a decade apart, whose training ends lowest: what is tried gets as many as what it is compared
    with needs.

    Args:
        found: what :func:`~precond.diagnose` returned.
        objective, optimizer, data, loss_fn, examples: as it was called with.
        steps: of each training.
        watch: called before each training, with words.

    Returns:
        The diagnosis with tested rates, and what was tried, as it is now first.

    Raises:
        ValueError: for a number of steps that is not positive.

    Example:
        >>> import torch, precond
        >>> x = torch.tensor([[-1.0, -30.0], [1.0, -30.0], [-1.0, 30.0], [1.0, 30.0]])
        >>> objective = precond.Objective(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, [(x, x.sum(1, keepdim=True))])
        >>> found, tried = try_remedies(precond.diagnose(objective), objective, steps=20)
        >>> len(tried) > 1 and tried[1].ratio > 1  # the first remedy takes fewer steps
        True
    """
    checks.positive("try_remedies", steps=steps)
    objective = as_objective(objective, data, loss_fn, examples)
    now = base_of(optimizer, objective.model).now()
    reference = _trained(objective, now, steps, watch)
    if isinstance(reference, str):
        return found, (Tried(now.label, None, None, why=reference),)
    advised = {a.remedy.name: a for a in found.advice if a.remedy is not None}
    others = {c.name: c.advice for c in found.considered if c.advice is not None}
    tried, after = [Tried(now.label, reference.best, None)], dict[str, Advice]()
    for a in [*advised.values(), *(a for name, a in others.items() if name not in advised)][:_FIRST]:
        assert a.remedy is not None
        result = _trained(objective, a.remedy, steps, watch)
        if isinstance(result, str):
            tried.append(Tried(a.remedy.label, None, None, a.promise, result))
            continue
        ratio, _ = compared(reference.curves, result.curves, steps)
        tried.append(Tried(a.remedy.label, result.best, ratio, a.promise))
        after[a.remedy.name] = a.tried(result.lr, ratio)
    return _learned(found, after), tuple(tried)


def _learned(found: Diagnosis, after: Mapping[str, Advice]) -> Diagnosis:
    """The diagnosis with what was tried: advice where it pays, considered where it does not."""
    first = [a for a in found.advice if a.remedy is None or a.remedy.name not in after]
    pays = sorted((a for a in after.values() if a.rank >= MORE), key=lambda a: -a.rank)
    considered = [
        c if c.name not in after else replace(c, why="" if after[c.name] in pays else after[c.name].promise)
        for c in found.considered
    ]
    # What keeps training from working at all stays first.
    urgent = [a for a in first if not a.gain.known and a.lr is not None]
    rest = [a for a in first if a not in urgent]
    return replace(found, advice=(*urgent, *pays, *rest), considered=tuple(considered))


def cheap(objective: Objective) -> bool:
    """Whether a range test takes seconds and not minutes, by parameters times examples of a batch."""
    return sum(p.numel() for p in objective.params) * size(checked(objective.batches[0], 0), 0) <= _CHEAP


def with_rates(found: Diagnosis, objective: Objective, watch: Callable[[str], None] | None = None) -> Diagnosis:
    """The diagnosis with a range test for every optimizer that it advises."""
    advice: Sequence[Advice] = found.advice
    changed = []
    for a in advice:
        result = None if a.remedy is None else _trained(objective, a.remedy, 40, watch)
        changed.append(a.tried(result.lr) if isinstance(result, Range) else a)
    return replace(found, advice=tuple(changed))


def _trained(objective: Objective, candidate: Candidate, steps: int, watch: Callable[[str], None] | None) -> Range | str:
    """Its range test, or why there is none."""
    prepared = objective if candidate.prepare is None else candidate.prepare(objective)
    say = None if watch is None else lambda text: watch(f"{candidate.label}: {text}")
    try:
        return lr_range(prepared, candidate.make, steps=steps, watch=say)
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
