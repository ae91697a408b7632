"""The optimizer's average of the weights: folded in after each step, and where a model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.optim.averages import WeightAverage
from precond.optim.blocks import Leaf, matches, state_dtype

Entries = list[tuple[Leaf, str, Tensor]]
MEAN, COUNT = "average", "averaged"
"""What state calls the average of a parameter, and how many weights it is of."""


def entries(average: WeightAverage | None, leaves: Sequence[Leaf], existing: Mapping[Tensor, dict[str, Any]]) -> Entries:
    """State entries of the leaves that are averaged; what exists is taken over."""
    out: Entries = []
    for leaf in leaves:
        if average is None or not matches(average.where, leaf):
            continue
        p, known = leaf.param, existing.get(leaf.param, {})
        mean, count, dtype = known.get(MEAN), known.get(COUNT), state_dtype(p.dtype)
        if mean is None or count is None or mean.shape != p.shape:
            mean, count = torch.zeros_like(p, dtype=dtype, requires_grad=False), torch.zeros(())
        out += [(leaf, MEAN, mean.to(p.device, dtype)), (leaf, COUNT, count)]
    return out


@dataclass(frozen=True)
class Averaged:
    """The leaves that are averaged, with their state.

    Attributes:
        kept: (leaf, its count of steps, e, how many weights are in e).
    """

    average: WeightAverage
    kept: tuple[tuple[Leaf, Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, average: WeightAverage, found: Entries) -> Averaged:
        """From all entries of an optimizer's state."""
        named: dict[str, dict[Tensor, tuple[Leaf, Tensor]]] = {key: {} for key in ("step", MEAN, COUNT)}
        for leaf, key, tensor in found:
            if key in named:
                named[key][leaf.param] = leaf, tensor  # whose block may hold it as another leaf, where an owner steps all of it
        steps, means, counts = named.values()
        still = torch.zeros(())  # of what is not stepped now
        count = {p: step for p, (_, step) in steps.items()}
        return cls(average, tuple((leaf, count.get(p, still), mean, counts[p][1]) for p, (leaf, mean) in means.items()))

    def steps(self) -> list[float]:
        """How many steps each has made."""
        return [step.item() for _, step, _, _ in self.kept]

    @torch.no_grad()
    def fold(self, before: Sequence[float]) -> None:
        """Fold in the weights of those that have made a step since, and put them ahead where gradients are taken there."""
        due: dict[tuple[float, torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for (leaf, step, mean, count), t in zip(self.kept, before, strict=True):
            now = step.item()
            if now > t and now >= self.average.start:
                share = self.average.share(int(count.item()))
                due.setdefault((share, leaf.tensor.device, leaf.tensor.dtype), []).append((leaf.tensor, leaf.local(mean)))
                count += 1
        for (share, *_), pairs in due.items():
            p, e = ([pair[k] for pair in pairs] for k in (0, 1))
            x = [t.to(m.dtype) for t, m in zip(p, e, strict=True)]
            if share == 1:
                torch._foreach_copy_(e, x)
            else:
                torch._foreach_lerp_(e, x, share)
            if self.average.lead:
                torch._foreach_copy_(p, torch._foreach_lerp(x, e, -self.average.lead))

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The parameters at (1−λ)x + λe inside, and afterwards where they were, bit for bit."""
        moved = [(leaf.tensor, leaf.local(mean)) for leaf, _, mean, count in self.kept if count.item()]
        saved = [p.detach().clone() for p, _ in moved]
        lead = self.average.lead
        weight = (self.average.blend + lead) / (1 + lead)  # x = (y + ce)/(1 + c)
        with torch.no_grad():
            for p, e in moved:
                p.copy_(torch.lerp(p.to(e.dtype), e, weight))
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), q in zip(moved, saved, strict=True):
                    p.copy_(q)
