"""Deterministic stratified splits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def strata(targets: Tensor, bins: int = 10) -> Tensor:
    """The stratum of each example: its class, or for floating targets the decile of its value.

    Args:
        targets: (N,) classes (integers) or (N, 1) values.
        bins: number of quantile bins of values.

    Returns:
        (N,) integers.
    """
    if not targets.is_floating_point():
        return targets
    ranks = targets.flatten().argsort(stable=True).argsort(stable=True)
    return ranks * bins // len(ranks)


def split(labels: Tensor, fractions: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Indices of disjoint parts in which every stratum has its share.

    Within each stratum the examples are permuted with ``seed`` and dealt out at the rounded cumulative fractions; what the
    fractions leave over belongs to no part. The same labels, fractions and seed give the same parts.

    Args:
        labels: (N,) stratum of each example.
        fractions: share of each part, each > 0, of sum at most 1.
        seed: of the permutations.

    Returns:
        Sorted indices of each part.

    Raises:
        ValueError: for fractions that are not positive or sum to more than 1, or where a part would be empty.

    Example:
        >>> parts = split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), {"train": 0.5, "test": 0.5}, seed=0)
        >>> [(labels := torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))[parts[name]].tolist() for name in ("train", "test")]
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if min(fractions.values()) <= 0 or sum(fractions.values()) > 1 + 1e-9:
        raise ValueError(f"fractions must be > 0 and sum to at most 1, got {dict(fractions)}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in fractions}
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        start, share = 0, 0.0
        for name, fraction in fractions.items():
            share += fraction
            stop = round(share * len(members))
            found[name].append(members[start:stop])
            start = stop
    parts = {name: torch.cat(pieces).sort().values for name, pieces in found.items()}
    for name, indices in parts.items():
        if not len(indices):
            raise ValueError(
                f"part {name!r} of {len(labels)} examples is empty; give it a larger fraction than {fractions[name]:.3g}"
            )
    return parts
