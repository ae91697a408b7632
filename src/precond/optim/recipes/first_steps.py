"""What :func:`precond.auto` measures in the first steps, and what it only tells."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from precond.algebra import collectives
from precond.algebra.sharding import divided
from precond.optim.blocks import Leaf, Stack
from precond.optim.engine.cells import Cell
from precond.optim.engine.sharing import Shared
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import Composition, Whitening

MEASURED_AFTER = 7
"""Steps after which the inputs of layers are looked at, once: the next is the last that may read from a device."""

SAMPLED = 4096
"""Entries of a gradient, evenly spaced, that its noise is made of."""


class FirstSteps:
    """From an optimizer, after each of its first steps, to what its groups take.

    ``measured``, the shares of independent directions in the inputs of whitened layers, decides. ``seen`` is told by ``explain()`` alone: the
    samples behind each of these layers' correlations, per input, and the noise of its gradient, tr Σ/‖G‖² with G the mean and Σ the
    covariance of the gradients of the first steps (McCandlish et al., 2018, in units of the batch). They are as few numbers as there are
    layers; of gradients :data:`SAMPLED` entries of each layer are kept until then.
    """

    def __init__(self) -> None:
        self._gradients: list[dict[str, Tensor]] = []

    def __call__(self, optimizer: PreconditionedGD) -> dict[str, Any] | None:
        """None until the whitened layers have made so many steps, and once it is known.

        A layer that has made none by then is not waited for, and one that has made some for as many steps again: what a run does not use, or
        calls rarely, decides nothing for the others, and stays whitened.
        """
        if any(group["measured"] is not None or group["capturable"] for group in optimizer.param_groups):
            self._gradients.clear()
            return None  # a captured step is one program for all steps
        shares: dict[str, float] = {}
        samples: dict[str, float] = {}
        whitened = [(cell, held) for held in optimizer.cells for cell in held.cells if _whitening(cell) is not None]
        own = [(cell, P) for held in optimizer.cells for cell in held.own if (P := _whitening(cell)) is not None]
        self._note([leaf for cell, _ in own for leaf in cell.leaves if leaf.ndim > 1])
        made = [min(cell.state.steps) for cell, _ in whitened]
        if max(made, default=0) < MEASURED_AFTER or (
            max(made) < 2 * MEASURED_AFTER and any(0 < n < MEASURED_AFTER for n in made)
        ):
            return None
        each = ((leaf, held if isinstance(held, Shared) else None) for cell, held in whitened for leaf in cell.leaves)
        alike = {leaf.name: (leaf.shape, id(shared)) for leaf, shared in each}
        for cell, P in own:
            if min(cell.state.steps) < MEASURED_AFTER:
                continue
            state = cell.state["outer"]
            state = state if isinstance(cell.block, Stack) else state.as_stack()
            shares |= P.independent(state)
            samples |= P.samples_per_input(state)
        noise = self._noise()
        for shared in optimizer.shared:
            names = [leaf.name for cell in shared.inside if _whitening(cell) is not None for leaf in cell.leaves]
            _tell(shared, names, shares, samples, noise)
        self._gradients.clear()
        # Layers of one shape decide together, by the least: they are stepped side by side.
        least = {kind: min(s for name, s in shares.items() if alike[name] == kind) for kind in map(alike.get, shares)}
        if not shares:
            return None
        return {
            "measured": {name: round(least[alike[name]], 3) for name in shares},
            "seen": {name: (float(f"{samples[name]:.3g}"), noise.get(name)) for name in shares},
        }

    def _note(self, leaves: Sequence[Leaf]) -> None:
        kept = Counter(name for known in self._gradients for name in known)
        found: dict[torch.device, dict[str, Tensor]] = {}
        for leaf in leaves:
            g = leaf.param.grad
            # Ranks that hold parts see other entries each, and would tell different numbers; others may have no gradient for long.
            if g is not None and not g.is_sparse and not divided(g) and kept[leaf.name] < MEASURED_AFTER:
                every = -(-g.numel() // SAMPLED)
                found.setdefault(g.device, {})[leaf.name] = (
                    g.detach().reshape(-1)[::every] if every > 1 else g.detach().flatten()
                )
        noted: dict[str, Tensor] = {}
        for there in found.values():
            together = torch.cat(list(there.values())).float()
            noted |= zip(there, together.split(list(map(len, there.values()))), strict=True)
        if noted:
            self._gradients.append(noted)

    def _noise(self) -> dict[str, float]:
        """tr Σ/‖G‖² by the names of weights, to two digits, at most 100: beyond they do not show G. Without those of too few gradients."""
        each: dict[str, list[Tensor]] = defaultdict(list)
        for noted in self._gradients:
            for name, g in noted.items():
                each[name].append(g)
        ratios = {name: _ratio(torch.stack(found)) for name, found in each.items() if len(found) == MEASURED_AFTER}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _whitening(cell: Cell) -> Whitening | None:
    P = cell.preconditioner
    return P.outer if isinstance(P, Composition) and isinstance(P.outer, Whitening) else None


def _tell(shared: Shared, names: Sequence[str], *numbers: dict[str, float]) -> None:
    """What owners know by the names of weights, to all ranks; what is not known is 0."""
    if not names:
        return
    device = shared.block.tensors[0].device
    table = torch.tensor([[known.get(name, 0.0) for name in names] for known in numbers], dtype=torch.float64, device=device)
    collectives.all_reduce(table, "what inputs of layers are like", shared.exchange.group)
    for known, row in zip(numbers, table.tolist(), strict=True):
        known |= {name: x for name, x in zip(names, row, strict=True) if x}


def _ratio(gradients: Tensor) -> float | None:
    """tr Σ/‖G‖² of gradients (k, n); None where there is no noise, or no end of it."""
    gradients = gradients.double()
    products = gradients @ gradients.T
    (squares, mean), k = torch.stack([products.trace(), products.mean()]).cpu().tolist(), len(gradients)  # Σ‖g‖² and ‖ḡ‖²
    spread = (squares - k * mean) / (k - 1)
    signal = mean - spread / k
    return float(f"{spread / max(signal, spread / 100):.2g}") if 0 < spread < float("inf") else None
