r"""How many steps a remedy would save, from a quadratic model of the whole network.

Each layer is a block: of a neuron's Hessian H_e S H_eᵀ (Theorem 3) the model keeps s·C, C the mean of ĥĥᵀ and s one number for the layer,
measured along its gradient; of the loss above the minimum, in direction i of C with eigenvalue λ_i, ½‖g_i‖²/(s λ_i). What is no diagnosed
layer is one more block, of one direction, that no remedy changes. Gradient descent at the rate 1/max(s λ) leaves after t steps

    E(t) = Σ_blocks Σ_i E_i exp(−2t s λ_i/max(s λ))

and a remedy, p = P z, replaces C by PᵀCP and g by Pᵀg in the layers that it reaches. The gain is the ratio of the steps in which both get
equally far. κ of a layer is what this comes to after very many steps, where that layer sets the pace.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from precond.algebra.vec import Vec
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.conditioning import coordinates, directions, gradient_rows
from precond.analysis.diagnostics.streaming import InputStatistics

# How far curvature is measured along the gradient: so much of the loss goes by the first order. Where a saturated loss is straight, farther.
_STEPS = (1e-2, 1e-1, 1.0)


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the network in one choice of coordinates.

    Attributes:
        values: λ_i, of all its groups.
        energies: ‖g_i‖²/λ_i: twice the loss above the minimum, for s = 1.
    """

    values: Tensor
    energies: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A layer, or all that is none.

    Attributes:
        name: of the layer; ``""`` for the rest.
        blocks: by coordinates; ``"raw"`` is always there.
        s: its curvature over that of C.
        share: the number of layers that it stands for.
        data: whether it receives the data themselves, with a bias that takes up their means, and shows their scale.
    """

    name: str
    blocks: Mapping[str, Block]
    s: float
    share: float = 1.0
    data: bool = False

    @property
    def largest(self) -> float:
        """The largest eigenvalue as inputs are."""
        return float(self.blocks["raw"].values.max())


def parts_of(objective: Objective, gathered: Sequence[InputStatistics], g: Vec) -> list[Part]:
    """The network in parts.

    Args:
        objective: in the state in which the inputs were gathered; curvature is measured on it, on fewer batches where that is cheaper.
        gathered: of its layers.
        g: its gradient.
    """
    place = {id(p): i for i, p in enumerate(objective.originals)}
    loss, found, taken = objective.value(), [], set[int]()
    for seen in gathered:
        index = [place[id(seen.site.weight)], *([place[id(seen.site.bias)]] if seen.biased else [])]
        taken |= {*index, *(place[id(p)] for p in seen.alike if id(p) in place)}
        rows = gradient_rows(seen, tuple(g[i] for i in index))
        blocks = blocks_of(seen, rows)
        if blocks is None:
            continue
        along = _curvature(objective, loss, {i: g[i] for i in index})
        # Of the neurons that this layer has in the objective, its bias is cut where it shares one with others (in_proj of attention).
        expected = sum(float((rows[k].double().cpu() @ R.T).square().sum()) for k, R in enumerate(_designs(seen)))
        found.append(
            Part(
                seen.name,
                blocks,
                along / expected if expected > 0 else math.nan,
                seen.share,
                seen.source == "data" and seen.biased and not seen.rescaled,
            )
        )
    rest = [i for i in range(len(g)) if i not in taken]
    square = float(sum(g[i].double().square().sum() for i in rest))
    if square > 0:
        one = torch.ones(1, dtype=torch.float64)
        along = _curvature(objective, loss, {i: g[i] for i in rest})
        found.append(Part("", {"raw": Block(one, square * one)}, along / square))
    known = [part for part in found if part.s > 0]
    if not known:
        return []
    # Along a direction of no or negative curvature the model says nothing: what other layers have is put there. Behind a normalization
    # that is curvature itself, s·C, since the scale of inputs is taken out.
    usual, bent = (
        sorted(of)[len(known) // 2] for of in ([part.s for part in known], [part.s * part.largest for part in known])
    )
    free = {seen.name for seen in gathered if seen.rescaled}
    return [part if part.s > 0 else replace(part, s=bent / part.largest if part.name in free else usual) for part in found]


def blocks_of(seen: InputStatistics, rows: Tensor) -> dict[str, Block] | None:
    """A layer's eigenvalues and energies by coordinates, of all its groups together; None where it has no gradient.

    Args:
        seen: what was gathered.
        rows: the gradient of its neurons, (groups, rows, n + 1), or n without a bias.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for k, R in enumerate(_designs(seen)):
        G, rank = rows[k].double().cpu(), directions(seen, k)
        if not rank:
            continue
        for name, transform in coordinates(seen, k).items():
            found.setdefault(name, []).append(energies(transform(R), transform(G), rank))
    blocks = {name: Block(*(torch.cat(column) for column in zip(*pairs, strict=True))) for name, pairs in found.items()}
    return blocks if blocks and float(blocks["raw"].energies.sum()) > 0 else None


def energies(R: Tensor, G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(λ_i, ‖g_i‖²/λ_i) of RᵀR, for the gradients in the rows of G."""
    _, sigma, V = torch.linalg.svd(R, full_matrices=False)
    values = sigma[:rank].square()
    return values, (G @ V[:rank].T).square().sum(0) / values


def _designs(seen: InputStatistics) -> list[Tensor]:
    return [seen.design(k) for k in range(len(seen.R))]


def _curvature(objective: Objective, loss: float, along: Mapping[int, Tensor]) -> float:
    """dᵀHd for some entries d of the gradient, from values of the loss: forwards alone, which every model has.

    The parameters stay as they are: shifted copies take their places while the loss is evaluated.
    """
    square = float(sum(d.double().square().sum() for d in along.values()))
    if square == 0 or loss == 0:
        return math.nan

    def shifted(h: float) -> float:
        other, twins = copy.copy(objective), dict(objective._twins)
        for i, d in along.items():
            twins[id(_original(objective, i))] = torch.nn.Parameter(objective.params[i].detach() + h * d)
        other._twins = twins
        return other.value()

    for step in _STEPS:
        h = step * abs(loss) / square
        bend = shifted(h) - 2 * loss + shifted(-h)
        # Rounding of the loss is no curvature.
        if bend > 1e-5 * abs(loss) * step:
            return bend / h**2
    return math.nan


def _original(objective: Objective, i: int) -> Tensor:
    """The model's own parameter."""
    return dict(objective.model.named_parameters(remove_duplicate=False))[objective.names[i]]


# --- how fast each falls ---------------------------------------------------------------------------------------------------


def speed_up(slow: LossDecay, fast: LossDecay, steps: int, start: float = 1.0) -> float:
    """The ratio of steps without and with a remedy, to the loss to which the slower of both gets in ``steps``.

    Args:
        slow, fast: without and with it.
        steps: of the training.
        start: the loss without it over that with it where both start, above a least loss of about 0.
    """
    if not (slow.total > 0 and fast.total > 0):
        return 1.0
    without, with_it = start * slow.remaining(steps), fast.remaining(steps)
    if without < with_it:  # the remedy makes it worse
        return max(slow.time_to(with_it / start, steps), 1.0) / steps
    return steps / max(fast.time_to(without, steps), 1.0)


class LossDecay:
    """E(t)/E(0) of the network in some coordinates.

    Args:
        parts: of the network.
        name: of the coordinates; parts that do not have them are as they are.
        alone: each part at its own best rate, as adaptive methods come near to; otherwise one rate for all.
    """

    def __init__(self, parts: Sequence[Part], name: str, alone: bool):
        chosen = [(part.s, part.share, part.blocks.get(name, part.blocks["raw"])) for part in parts]
        fastest = max((s * float(block.values.max()) for s, _, block in chosen), default=1.0)
        rates = [s * block.values / (s * float(block.values.max()) if alone else fastest) for s, _, block in chosen]
        self.E = torch.cat([share * block.energies / s for s, share, block in chosen]) if chosen else torch.zeros(1)
        self.rates = torch.cat(rates) if chosen else torch.zeros(1)
        self.total = float(self.E.sum())

    def remaining(self, t: float) -> float:
        """E(t)/E(0)."""
        return float((self.E * torch.exp(-2 * t * self.rates)).sum()) / self.total

    def time_to(self, goal: float, most: float) -> float:
        """The t at which so much is left, at most ``most``; by bisection of its logarithm."""
        low, high = 0.5, float(most)
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.remaining(middle) > goal else (low, middle)
        return high
