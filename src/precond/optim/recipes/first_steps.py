"""What :func:`precond.auto` measures in the first steps, and what it only tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.optim.blocks import Leaf, Stack
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
        self._gradients: dict[str, list[Tensor]] = {}

    def __call__(self, optimizer: PreconditionedGD) -> dict[str, Any] | None:
        """None until all whitened layers have made so many steps, and once it is known."""
        if any(group["measured"] is not None or group["capturable"] for group in optimizer.param_groups):
            self._gradients.clear()
            return None  # a captured step is one program for all steps
        shares: dict[str, float] = {}
        samples: dict[str, float] = {}
        shapes: dict[str, torch.Size] = {}
        cells = [(cell, P.outer) for cell in optimizer.cells if isinstance(P := cell.preconditioner, Composition)]
        whitened = [(cell, P) for cell, P in cells if isinstance(P, Whitening)]
        for cell, _ in whitened:
            for leaf in cell.leaves:
                self._note(leaf)
        for cell, P in whitened:
            if min(cell.state.steps) < MEASURED_AFTER:
                return None
            state = cell.state["outer"]
            state = state if isinstance(cell.block, Stack) else state.as_stack()
            shapes |= {leaf.name: leaf.shape for leaf in cell.leaves}
            shares |= P.independent(state)
            samples |= P.samples_per_input(state)
        noise = {name: _noise(self._gradients.get(name, [])) for name in shares}
        self._gradients.clear()
        # Layers of one shape decide together, by the least: they are stepped side by side.
        least = {shape: min(s for name, s in shares.items() if shapes[name] == shape) for shape in map(shapes.get, shares)}
        if not shares:
            return None
        return {
            "measured": {name: round(least[shapes[name]], 3) for name in shares},
            "seen": {name: (float(f"{samples[name]:.3g}"), noise[name]) for name in shares},
        }

    def _note(self, leaf: Leaf) -> None:
        g = leaf.param.grad
        # Ranks that hold parts see other entries each, and would tell different numbers.
        if g is None or leaf.ndim < 2 or leaf.shard is not None or g.is_sparse:
            return
        kept = self._gradients.setdefault(leaf.name, [])
        if len(kept) < MEASURED_AFTER:  # others may have no gradient for long
            entries = g.detach().reshape(-1)
            kept.append(entries[:: max(1, -(-len(entries) // SAMPLED))].float().clone())


def _noise(gradients: list[Tensor]) -> float | None:
    """tr Σ/‖G‖² of some gradients, to two digits, at most 100: beyond they do not show G. None where they are too few."""
    if len(gradients) < MEASURED_AFTER:
        return None
    G = torch.stack(gradients).double()
    n, mean = len(G), G.mean(0)
    spread = float((G - mean).square().sum()) / (n - 1)
    signal = float(mean.square().sum()) - spread / n
    return float(f"{spread / max(signal, spread / 100):.2g}") if 0 < spread < float("inf") else None
