"""Which leaves form a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from precond.optim.blocks.leaf import Leaf, state_dtype


def by_tensor(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block per tensor."""
    return [(i,) for i in range(len(leaves))]


def by_layer(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block per layer: a module's own parameters, the weight first.

    What several modules hold is a layer of its own: their biases, where each has one, go with no row of it.
    """
    layers: dict[tuple[str, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        layers.setdefault(leaf.holders, []).append(i)
    return [tuple(sorted(i, key=lambda j: leaves[j].kind == "bias")) for i in layers.values()]


def together(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block of everything."""
    return [tuple(range(len(leaves)))] if leaves else []


def by_group(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block per parameter group: for maps that act entry by entry, which are fastest on many tensors at once."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault((leaf.group, leaf.param.device, state_dtype(leaf.param.dtype)), []).append(i)
    return [tuple(i) for i in groups.values()]


def join(a: Sequence[tuple[int, ...]], b: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The finest partition that both refine (a ∨ b); within a block, the order of a's blocks."""
    owner: dict[int, list[int]] = {}
    for part in [*a, *b]:
        merged: list[int] = []
        for block in {id(owner[i]): owner[i] for i in part if i in owner}.values():
            merged += block
        merged += [i for i in part if i not in owner]
        for i in merged:
            owner[i] = merged
    return [tuple(block) for block in {id(block): block for block in owner.values()}.values()]


CLASSES = 10
"""A table of no more rows may have as many as there are classes, or segments, by chance."""


def with_scores(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Leaves that know whether their layer scores the rows of a table: whether it alone has an output for each row of one.

    That no other has as many outputs tells it from hidden layers of a transformer as wide as its table of positions is long.
    """
    weights = {leaf.holders: leaf for leaf in leaves if leaf.kind == "weight" and leaf.ndim == 2 and leaf.param.numel()}
    layers = {holders: leaf for holders, leaf in weights.items() if not isinstance(leaf.module, nn.RNNBase | nn.RNNCellBase)}
    tables = {leaf.shape[0] for leaf in leaves if leaf.kind == "embedding" and leaf.shape[0] > CLASSES}
    alike = Counter(leaf.sides[0] for leaf in layers.values())
    found = {holders: leaf.sides for holders, leaf in layers.items() if leaf.sides[0] in tables and alike[leaf.sides[0]] == 1}
    return [replace(leaf, scores=found[leaf.holders][1]) if leaf.holders in found else leaf for leaf in leaves]
