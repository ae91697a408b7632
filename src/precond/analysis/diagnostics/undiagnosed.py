"""What a diagnosis does not cover, and says so."""

from __future__ import annotations

from collections.abc import Iterable

from precond.analysis.curvature import (
    Objective,
)
from precond.analysis.diagnostics.streaming import InputStatistics

_MANY = 0.05  # of the parameters


def uncovered(objective: Objective, gathered: Iterable[InputStatistics], known: Iterable[str]) -> list[str]:
    """A line about trained parameters of no layer whose inputs could be diagnosed, where they are many and no other line names them."""
    met = {id(p) for seen in gathered for p in (seen.site.weight, seen.site.bias, *seen.alike) if p is not None}
    left = {name: p.numel() for name, p in zip(objective.names, objective.originals, strict=True) if id(p) not in met}
    named = {word.removesuffix(";") for line in known for word in line.split()}
    left = {name: n for name, n in left.items() if not named & {name, name.rpartition(".")[0]}}
    share = sum(left.values()) / sum(p.numel() for p in objective.params)
    if share < _MANY:
        return []
    largest = sorted(left, key=lambda name: -left[name])
    return [
        f"{', '.join(largest[:3])}{', …' if len(largest) > 3 else ''}, {100 * share:.0f} % of the parameters, belong to no layer whose "
        "inputs are diagnosed, such as embeddings and scales"
    ]


def covered_share(objective: Objective, gathered: Iterable[InputStatistics]) -> float:
    """Of the entries in layers that were seen, or that others stand for."""
    own = {id(p): p.numel() for p in objective.originals}
    met = {id(p) for seen in gathered for p in (seen.site.weight, seen.site.bias, *seen.alike) if p is not None}
    return sum(n for key, n in own.items() if key in met) / sum(own.values())
