"""Averages of what is descended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from precond.algebra import checks
from precond.algebra.vec import Tensors, Vec
from precond.optim.blocks import Block, State
from precond.optim.checking.arguments import settle


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

    Args:
        beta: β in [0, 1).
        start: ``"zero"``, m₀ = 0, or ``"first_gradient"``, m₁ = a₁.
        bias_correction: None means True for an EMA from zero and False otherwise; True elsewhere is a contradiction.
        of: ``"cotangent"``, or ``"tangent"`` as torch's RMSprop alone has it.
        dampening: τ ≥ 0, for ``"heavy_ball"`` and ``"nesterov"``; with τ = β they are averages.
        kind: one of the rows above.

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

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("Momentum", beta=self.beta)
        checks.non_negative("Momentum", dampening=self.dampening)
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
        return {"m": block.zeros()} if self.beta or self.kind == "ema" else {}

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
