"""SOAP's step in place: two rotations, Adam's kernel between them, and a last product that falls into the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.engine.cells import Cell
from precond.engine.workspace import WORKSPACE
from precond.momentum import Momentum
from precond.preconditioners import SOAP
from precond.preconditioners.kronecker import as_matrix
from precond.vec import Scalar, Tensors


@dataclass(frozen=True)
class Rotated:
    """W ← (1 − αλ)W − α Q_A (m̂/(√r̂ + ε)) Q_Bᵀ with m and r in the coordinates G′ = Q_Aᵀ G Q_B."""

    P: SOAP
    momentum: Momentum
    decay: float

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        state, lr = cell.state, float(lr)
        W, G = as_matrix(p[0]), as_matrix(g[0])
        A, B = state.get("left_basis"), state.get("right_basis")
        X, Y = WORKSPACE.take(W.dtype, W.shape, W.shape)
        rotated = self._turn(G, None if A is None else A.T, B, X, Y)
        step = (X if rotated is Y else Y).zero_()
        torch._fused_adamw_(
            [step],
            [rotated],
            [as_matrix(cell.average["m"][0])],
            [as_matrix(state["r"][0])],
            [],
            list(state["step"]),
            lr=1.0,
            beta1=self.momentum.beta,
            beta2=self.P.decay,
            weight_decay=0.0,
            eps=self.P.eps,
            amsgrad=False,
            maximize=maximize,
        )  # step = −m̂/(√r̂ + ε)
        if not self.P.rotates(state):
            D, (t,) = self.P.factors(state)[1], state.steps
            (h,) = D.gram(cell.average["m"])
            torch.mul(as_matrix(h), -1 / (1 - self.momentum.beta**t), out=step)
        keep = 1 - lr * self.decay
        if B is None:
            assert A is not None
            W.addmm_(A, step, beta=keep, alpha=lr)
        else:
            half = step if A is None else torch.mm(A, step, out=rotated)
            W.addmm_(half, B.T, beta=keep, alpha=lr)
        self.P.fold(state, g[0])
        cell.refresh()

    @staticmethod
    def _turn(G: Tensor, left: Tensor | None, right: Tensor | None, X: Tensor, Y: Tensor) -> Tensor:
        """left·G·right in X or Y."""
        if left is None:
            return torch.mm(G, right, out=X)  # type: ignore[arg-type]
        torch.mm(left, G, out=X)
        return X if right is None else torch.mm(X, right, out=Y)


def soap(cell: Cell, P: SOAP, momentum: Momentum | None, decay: float) -> Rotated | None:
    """The kernel of a contiguous matrix with Adam's momentum, or None."""
    (p,) = cell.block.tensors
    match momentum:
        case Momentum(kind="ema", start="zero", of="cotangent") if momentum.corrected and P.eps > 0 and p.is_contiguous():
            return Rotated(P, momentum, decay)
    return None
