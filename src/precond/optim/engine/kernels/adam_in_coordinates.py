"""Adam's step in the coordinates of BNP or Whitening, in place: with whitening two products of matrices, in 16 bits where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.precision import in_16_bits
from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import State
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.factors import Cached, Factor, Factors
from precond.optim.engine.kernels.layer import CachedOnStatistics, OfLayer, layer_of
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import BNP, RMS, RelativeRMS, Whitening
from precond.optim.preconditioners.each import on
from precond.optim.preconditioners.workspace import WORKSPACE


@dataclass(frozen=True)
class _Outer:
    """P₁ = U·diag(β, σ⁻¹R) of a layer: w = (z_w Rᵀ)/σ, b = βz_b − μᵀw.

    Attributes:
        mean, inverse, shifted: μ, 1/σ and μ/σ, of shape (groups, 1, n).
        beta: β.
        factors: R of each group; none for the identity.
    """

    mean: Tensor
    inverse: Tensor
    shifted: Tensor
    beta: float | Tensor = 1.0
    factors: Sequence[Factor] = ()


@dataclass
class AdamInCoordinates(OfLayer):
    r"""y = P₁ᵀg, u = m̂/(√r̂ + ε), p ← (1 − αλ)p − αsP₁u, m and r averages of y and of y², s of RelativeRMS.

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

    def __post_init__(self) -> None:
        self._kept, self._factors = CachedOnStatistics(self.P, self._make), Factors(self._narrow)
        self._of_scale: Cached[float] = Cached()

    def observed(self, cell: Cell) -> tuple[BNP | Whitening, State] | None:
        return (self.P, cell.state["outer"]) if self.groups else None

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        if not self.groups:
            self._adam(cell, p, g, lr, self.decay, maximize)
            return
        outer = cell.state["outer"]
        if (P1 := self._kept(outer)) is None:
            self._adam(cell, p, g, lr, self.decay, maximize)
        else:
            self._step(cell, P1, p, g, float(lr) * self._scale(cell, p), float(lr) * self.decay, maximize)
        on(outer.block, self.P).refresh(outer)

    def _scale(self, cell: Cell, p: Tensors) -> float:
        """s, by which steps are longer."""
        state, outer = cell.state["inner"], cell.state["outer"]
        if not isinstance(self.inner, RelativeRMS) or "scale" not in state:
            return 1.0
        s = self._of_scale(state["scale"]._version, state["scale"].item)
        if not s:
            z = lambda: on(outer.block, self.P).map(outer).solve(tuple(p))  # noqa: E731
            self.inner.measure(state, z, lambda: self.P.ready(outer))
            s = state["scale"].item()
        return s or 1.0

    def _step(self, cell: Cell, P1: _Outer, p: Tensors, g: Tensors, lr: float, decay: float, maximize: bool) -> None:
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
        if P1.factors:
            Y, Z = self._turn(Y, Z, [R.times for R in P1.factors])
        # As its own parameter that decays to nothing, y becomes the step −u without another buffer.
        self._adam(cell, [Y.view_as(p[0]), *biases], None, 1.0, 1.0, maximize)
        if P1.factors:
            Y, Z = self._turn(Y, Z, [R.back for R in P1.factors])
        if decay:
            torch._foreach_mul_(p, 1 - decay)
        W.addcmul_(Y, P1.inverse, value=lr)
        if biases:
            p[1].view(column).add_((biases[0].view(column) * P1.beta).sub_(Y @ P1.shifted.mT), alpha=lr)

    def _turn(self, Y: Tensor, Z: Tensor, products: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> tuple[Tensor, Tensor]:
        """(Y R or Y Rᵀ, for each group; the other of the two buffers)."""
        A, B = WORKSPACE.take(torch.bfloat16, Y.shape, Y.shape) if self._narrow else (Y, Z)
        if self._narrow:
            A.copy_(Y)
        inside = [product(X, out) is X for X, out, product in zip(A, B, products, strict=True)]
        found, other = (A, B) if all(inside) else (B, A)
        return (Y.copy_(found), Z) if self._narrow else (found, other)

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
        mean, inverse = mean[:, None], std[:, None].reciprocal()
        return _Outer(mean, inverse, mean * inverse, beta, self._factors(outer))


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
