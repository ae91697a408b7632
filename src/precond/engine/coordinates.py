"""Adam's step in the coordinates of BNP or Whitening, in place: with whitening two products of matrices, in 16 bits where the weight has 32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from precond.blocks import State
from precond.engine.cells import Cell
from precond.engine.layer import Kept, layer_of
from precond.engine.precision import in_16_bits
from precond.engine.workspace import WORKSPACE
from precond.momentum import Momentum
from precond.preconditioners import BNP, RMS, Whitening
from precond.preconditioners.base import Seen
from precond.vec import Scalar, Tensors

_PANEL = 192  # columns of a triangular factor that are multiplied at once


@dataclass(frozen=True)
class _Outer:
    """P₁ = U·diag(β, σ⁻¹R) of a layer: w = (z_w Rᵀ)/σ, b = βz_b − μᵀw.

    Attributes:
        mean, inverse: μ and 1/σ, of shape (groups, 1, n).
        beta: β.
        factor: R (groups, n, n) in the precision of products, or None for the identity.
        panels: columns of R; those of a panel have nothing below its end.
    """

    mean: Tensor
    inverse: Tensor
    beta: float | Tensor = 1.0
    factor: Tensor | None = None
    panels: Sequence[tuple[int, int]] = ()


@dataclass
class AdamInCoordinates:
    r"""y = P₁ᵀg, u = m̂/(√r̂ + ε), p ← (1 − αλ)p − αP₁u, m and r averages of y and of y².

    Per layer Y = ((g_W − g_b μᵀ)/σ)R, y_b = βg_b; dW = (U Rᵀ)/σ, W ← W − αdW, b ← b − α(βu_b − dW μ). Blocks that the outer map
    leaves as they are take Adam.

    Attributes:
        decay: λ.
        groups: of rows that see different inputs; 0 where the outer map leaves the block as it is.
    """

    P: BNP | Whitening
    inner: RMS
    momentum: Momentum
    decay: float
    groups: int
    _narrow: bool = True
    _factor: tuple[int, Tensor, Sequence[tuple[int, int]]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._kept = Kept(self.P, self._make)

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        if not self.groups:
            self._adam(cell, p, g, lr, self.decay, maximize)
            return
        outer = cell.state["outer"]
        if cell.inputs:
            self.P.observe(outer, Seen((), cell.inputs))
        if (P1 := self._kept(outer)) is None:
            self._adam(cell, p, g, lr, self.decay, maximize)
        else:
            self._step(cell, P1, p, g, float(lr), maximize)
        self.P.refresh(outer)

    def _step(self, cell: Cell, P1: _Outer, p: Tensors, g: Tensors, lr: float, maximize: bool) -> None:
        shape = self.groups, len(p[0]) // self.groups, P1.mean.shape[-1]
        W, G = p[0].view(shape), g[0].reshape(shape)
        Y, Z = WORKSPACE.take(W.dtype, shape, shape)
        column, biases = (self.groups, -1, 1), []
        if len(p) == 1:
            torch.mul(G, P1.inverse, out=Y)
        else:
            gb = g[1].view(column)
            torch.addcmul(G, gb, P1.mean, value=-1, out=Y).mul_(P1.inverse)
            biases = [(gb * P1.beta).view_as(p[1])]
        if P1.factor is not None:
            Y, Z = self._turn(Y, Z, P1.factor, P1.panels)
        # As its own parameter that decays to nothing, y becomes the step −u without another buffer.
        self._adam(cell, [Y.view_as(p[0]), *biases], None, 1.0, 1.0, maximize)
        if P1.factor is not None:
            Y, Z = self._turn(Y, Z, P1.factor, P1.panels, back=True)
        Y.mul_(P1.inverse)
        if self.decay:
            torch._foreach_mul_(p, 1 - lr * self.decay)
        W.add_(Y, alpha=lr)
        if biases:
            p[1].view(column).add_((biases[0].view(column) * P1.beta).sub_(Y @ P1.mean.mT), alpha=lr)

    @staticmethod
    def _turn(Y: Tensor, Z: Tensor, R: Tensor, panels: Sequence[tuple[int, int]], back: bool = False) -> tuple[Tensor, Tensor]:
        """(Y R, or Y Rᵀ, for each group; the other of the two buffers)."""
        narrow = R.dtype != Y.dtype
        A, B = WORKSPACE.take(R.dtype, Y.shape, Y.shape) if narrow else (Y, Z)
        if narrow:
            A.copy_(Y)
        for X, out, r in zip(A, B, R, strict=True):
            for a, b in panels:
                if back:
                    torch.mm(X[:, a:], r[a:b, a:].T, out=out[:, a:b])
                else:
                    torch.mm(X[:, :b], r[:b, a:b], out=out[:, a:b])
        return (Y.copy_(B), Z) if narrow else (Z, Y)

    def _adam(self, cell: Cell, p: Tensors, g: Tensors | None, lr: Scalar, decay: float, maximize: bool) -> None:
        inner = cell.state["inner"]
        torch._fused_adamw_(
            p,
            p if g is None else g,
            cell.average["m"],
            inner["r"],
            inner["r_max"] if self.inner.amsgrad else [],
            cell.state["step"],
            lr=lr,
            beta1=self.momentum.beta,
            beta2=self.inner.decay,
            weight_decay=decay,
            eps=self.inner.eps,
            amsgrad=self.inner.amsgrad,
            maximize=maximize,
        )

    def _make(self, outer: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> _Outer:
        vectors = mean[:, None], std[:, None].reciprocal(), beta
        if "factor" not in outer:
            return _Outer(*vectors)
        R = outer["factor"]
        if self._factor is None or self._factor[0] != R._version:
            n = R.shape[-1]
            count = max(1, n // _PANEL) if not bool(R.tril(-1).any()) else 1
            ends = [n * k // count for k in range(count + 1)]
            self._factor = R._version, R.bfloat16() if self._narrow else R, list(pairwise(ends))
        return _Outer(*vectors, *self._factor[1:])


def adam_in_coordinates(
    cell: Cell, P: BNP | Whitening, inner: RMS, momentum: Momentum | None, decay: float
) -> AdamInCoordinates | None:
    """The kernel of a layer whose rows lie in memory by groups, or of a block that P leaves as it is, with Adam's averages; or None."""
    layout = layer_of(P, cell.block)
    if P.handles(cell.block) and layout is None:
        return None
    match inner, momentum:
        case RMS(start="zero", bias_correction=True, centered=False), Momentum(kind="ema", start="zero", of="cotangent"):
            if inner.eps > 0 and momentum.corrected:
                narrow = in_16_bits(cell.block.tensors[0])
                return AdamInCoordinates(P, inner, momentum, decay, layout.groups if layout else 0, narrow)
    return None
