"""Averages of what is descended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from math import hypot, sqrt
from typing import Literal

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.vec import Scalar, Tensors, Vec
from precond.optim.blocks import Block, Stack, State
from precond.optim.checking.arguments import settle

LENGTHS = ("mean_length", "mean_weight")
"""What a state calls the root of the running mean of ‖a‖², with the bias of its start at 0, and the sum of that mean's weights."""

LEAST, MOST = 1e-12, 1e15
"""Lengths whose squares stay in the range of float32."""


@dataclass(frozen=True)
class Momentum:
    r"""A running average m of cotangents (before M) or of tangents (after M).

    | kind | m | what is descended |
    |---|---|---|
    | ``"ema"`` | m ← βm + (1−β)a (Ye, eq. 8) | m, or m/(1−βᵗ) |
    | ``"heavy_ball"`` | m ← βm + (1−τ)a | m |
    | ``"nesterov"`` | m ← βm + (1−τ)a | (1−τ)a + βm |

    An average of cotangents stays valid when P changes; M is applied after it. In a composition P₁P₂ it is one of P₁ᵀa, in the
    coordinates in which P₂ is made (:class:`~precond.Composition`).

    Its *coherence* is c = min(1, ‖m̂‖/ḡ), m̂ being what is descended over the sum of the weights that it gives to each a, and ḡ² the
    running mean of ‖a‖². It is 1 where gradients agree, and √((1−β)/(1+β)) or about that where they are noise: 0.23 for β = 0.9.

    Args:
        beta: β in [0, 1).
        start: ``"zero"``, m₀ = 0, or ``"first_gradient"``, m₁ = a₁.
        bias_correction: None means True for an EMA from zero and False otherwise; True elsewhere is a contradiction.
        of: ``"cotangent"``, or ``"tangent"`` as torch's RMSprop alone has it.
        dampening: τ ≥ 0, for ``"heavy_ball"`` and ``"nesterov"``; with τ = β they are averages.
        kind: one of the rows above.
        lengths: ρ in [0, 1) of ḡ², which is kept then, the bias of its start divided out; steps of a preconditioner that is made of the
            momentum (:class:`~precond.Polar`, :class:`~precond.Muon`, :class:`~precond.Schatten`) are √c times as long. None: they are not.

    Raises:
        ValueError: for a bias correction of what has no bias, or dampening of an EMA.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = precond.PreconditionedGD(
        ...     [p], lr=1.0, preconditioner=precond.Fixed(), momentum=precond.Momentum(0.5, "heavy_ball"))
        >>> for _ in range(2):  # m = 1, then 0.5 + 1
        ...     p.grad = torch.tensor([1.0]); _ = optimizer.step()
        >>> p.item()
        -2.5

    References:
        Polyak (1964); Nesterov (1983) in the form of Sutskever et al. (2013); Kingma & Ba (2015).
    """

    beta: float = 0.9
    kind: Literal["ema", "heavy_ball", "nesterov"] = "ema"
    start: Literal["zero", "first_gradient"] = "zero"
    bias_correction: bool | None = None
    of: Literal["cotangent", "tangent"] = "cotangent"
    dampening: float = 0.0
    lengths: float | None = None

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("Momentum", beta=self.beta)
        checks.non_negative("Momentum", dampening=self.dampening)
        if self.lengths is not None:
            checks.fraction("Momentum", lengths=self.lengths)
        if self.bias_correction and (self.kind != "ema" or self.start != "zero"):
            raise ValueError(
                f"Momentum: bias_correction=True corrects an EMA that starts at zero; kind={self.kind!r}, "
                f"start={self.start!r} has no bias to correct, leave bias_correction out"
            )
        if self.dampening and self.kind == "ema":
            raise ValueError("Momentum: dampening belongs to kind='heavy_ball' and 'nesterov', got kind='ema'; set dampening=0")

    @property
    def corrected(self) -> bool:
        """Whether the bias of the start at zero is divided out."""
        if self.bias_correction is None:
            return self.kind == "ema" and self.start == "zero"
        return self.bias_correction

    def init(self, block: Block) -> dict:
        """m of a block; nothing where there is no momentum to keep (β = 0, save for an EMA, whose m Adam's state dict holds)."""
        if not self.beta and self.kind != "ema":
            return {}
        m = block.zeros()
        return {"m": m} if self.lengths is None else {"m": m} | {key: m[0].new_zeros(()) for key in LENGTHS}

    def fold(self, state: State, a: Tensors) -> None:
        """Fold a into m, in place."""
        if "m" not in state:
            return
        m = state["m"]
        if self.start == "first_gradient" and "clock" in state:
            self._fold(m, a)
            for mi, ai, t in zip(m, a, state.times, strict=True):
                torch.where(t == 1, ai, mi, out=mi)
            return
        if self.start == "first_gradient" and any(first := [t == 1 for t in state.steps]):
            for mi, ai, is_first in zip(m, a, first, strict=True):
                mi.copy_(ai) if is_first else self._fold((mi,), (ai,))
        else:
            self._fold(m, a)

    def fold_all(self, states: Sequence[State], a: Sequence[Tensors]) -> None:
        """The same of several states at once, each with its a."""
        if self.start == "first_gradient":
            for state, own in zip(states, a, strict=True):
                self.fold(state, own)
        else:
            self._fold(tuple(t for state in states for t in state["m"]), tuple(t for own in a for t in own))

    def current(self, state: State, a: Tensors) -> Vec:
        """What is descended, a being folded in already."""
        if "m" not in state:
            return tuple(a)
        m = state["m"]
        if self.kind == "nesterov" and self.dampening == self.beta:
            return tuple(torch._foreach_lerp(a, m, self.beta))
        if self.kind == "nesterov":
            new = torch._foreach_mul(a, 1 - self.dampening) if self.dampening else tuple(a)
            return tuple(torch._foreach_add(new, m, alpha=self.beta))
        if self.corrected:
            return tuple(torch._foreach_div(m, state.unbiased(self.beta)))
        return m

    def stride(self, state: State, a: Tensors, m: Tensors) -> Tensor | None:
        """√c of what is descended, m, after ‖a‖² is folded into ḡ²; of a stack of each member. None where that is not kept."""
        if self.lengths is None or "mean_length" not in state:
            return None
        mean, weight = (state[key] for key in LENGTHS)
        of_a, of_m = (_length(state.block, v) for v in (a, m))
        # Squares of lengths may be none of float32.
        torch.hypot(mean * self.lengths**0.5, of_a * (1 - self.lengths) ** 0.5, out=mean)
        weight.lerp_(state.kept("one", weight.shape, lambda: torch.ones_like(weight)), 1 - self.lengths)
        c = of_m.mul_(weight.sqrt()).div_(mean.clamp_min(torch.finfo(mean.dtype).tiny))
        return c.div_(self._weights(state.times[0])).clamp_max_(1.0).sqrt_().to(m[0].dtype)

    def strides(self, states: Sequence[State], a: Sequence[Tensors], m: Sequence[Tensors]) -> list[float]:
        """The same of several blocks in this process' memory at once, each with its a and m; 1 of each where it is not kept."""
        if self.lengths is None or "mean_length" not in states[0]:
            return [1.0] * len(states)
        vectors = (*a, *m)
        norms = iter(torch.stack(torch._foreach_norm([t for v in vectors for t in v])).tolist())
        found = [hypot(*islice(norms, len(v))) for v in vectors]
        for i, length in enumerate(found):
            if not LEAST < length < MOST:
                found[i] = _length(states[0].block, vectors[i]).item()
        kept = [state[key] for key in LENGTHS for state in states]
        n, before, new = len(a), torch.stack(kept).tolist(), 1 - self.lengths
        means = [hypot(sqrt(self.lengths) * x, sqrt(new) * y) for x, y in zip(before[:n], found[:n], strict=True)]
        weights = [x + new * (1 - x) for x in before[n:]]
        torch._foreach_copy_(kept, torch.tensor([*means, *weights], dtype=kept[0].dtype).unbind())
        return [
            sqrt(min(1.0, length * sqrt(weight) / mean / float(self._weights(state.steps[0])))) if mean else 0.0
            for state, length, mean, weight in zip(states, found[n:], means, weights, strict=True)
        ]

    def _weights(self, t: Scalar) -> Scalar:
        """The sum of the weights of each a in what is descended in the step t: that of an average that is 1, from its start on."""
        if self.corrected:
            return 1.0
        new = 1 - self.beta if self.kind == "ema" else 1 - self.dampening
        first, last = 1.0 if self.start == "first_gradient" else new, new / (1 - self.beta)
        of_m = last + (first - last) * self.beta ** (t - 1)
        return new + self.beta * of_m if self.kind == "nesterov" else of_m

    def write(self, state: State, a: Tensors, out: Vec) -> Vec:
        """The same, into memory that is there already, ``out``; entries of a may be in the same place."""
        if "m" in state and self.kind == "nesterov" and self.dampening == self.beta:
            for o, m, x in zip(out, state["m"], a, strict=True):
                torch.lerp(x, m, self.beta, out=o)
        else:
            for o, x in zip(out, self.current(state, a), strict=True):
                o.copy_(x)
        return out

    def write_all(self, states: Sequence[State], a: Sequence[Tensors], out: Sequence[Vec]) -> None:
        """The same of several states at once, into memory that holds none of the a."""
        if self.kind == "nesterov" and self.dampening == self.beta:
            written = [o for own in out for o in own]
            torch._foreach_copy_(written, [x for own in a for x in own])
            torch._foreach_lerp_(written, [t for state in states for t in state["m"]], self.beta)
        else:
            for state, own, to in zip(states, a, out, strict=True):
                self.write(state, own, to)

    def _fold(self, m: Vec, a: Tensors) -> None:
        if self.kind == "ema" or self.dampening == self.beta:
            torch._foreach_lerp_(m, a, 1 - self.beta)
        else:
            torch._foreach_mul_(m, self.beta)
            torch._foreach_add_(m, a, alpha=1 - self.dampening)


def _length(block: Block, v: Tensors) -> Tensor:
    """‖v‖ on a block, (); on a stack (k,)."""
    wide = torch.float64 if v[0].device.type != "mps" else torch.float32
    each = [torch.linalg.vector_norm(t, 2, list(range(isinstance(block, Stack), t.ndim)), dtype=wide) for t in v]
    return reduce(torch.hypot, each)
