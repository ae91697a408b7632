"""SOAP's step in place: two rotations, Adam's kernel between them, and a last product that falls into the weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.algebra.maps import Orthogonal, completed
from precond.algebra.vec import Scalar, Tensors
from precond.optim.engine.cells import Cell
from precond.optim.engine.factors import Last
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import SOAP
from precond.optim.preconditioners.kronecker import as_matrix
from precond.optim.preconditioners.soap import BASES
from precond.optim.preconditioners.stacked import on
from precond.optim.preconditioners.workspace import WORKSPACE


@dataclass
class Rotated:
    """W ← (1 − αλ)W − α Q_A (m̂/(√r̂ + ε)) Q_Bᵀ with m and r in the coordinates G′ = Q_Aᵀ G Q_B."""

    P: SOAP
    momentum: Momentum
    decay: float
    _bases: dict[str, _Completed] = field(
        default_factory=lambda: {name: _Completed() for name in BASES}, init=False, repr=False
    )

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        state, lr = cell.state, float(lr)
        W, G = as_matrix(p[0]), as_matrix(g[0])
        A, B = (None if name not in state else last(state[name]) for name, last in self._bases.items())
        rotated, free = _turned(None if A is None else A.T, G, B, *WORKSPACE.take(W.dtype, W.shape, W.shape))
        step = free.zero_()
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
        stack = state.as_stack()
        if (chosen := self.P.chosen(stack)) is not None and not bool(chosen):
            D, (t,) = on(cell.block, self.P).factors(state)[1], state.steps
            (h,) = D.gram(cell.average["m"])
            torch.mul(as_matrix(h), -1 / (1 - self.momentum.beta**t), out=step)
        keep = 1 - lr * self.decay
        if isinstance(B, Tensor):
            W.addmm_(_times(A, step, rotated), B.T, beta=keep, alpha=lr)
        else:
            if B is not None:
                step = B.T.from_right(step)
            if isinstance(A, Tensor):
                W.addmm_(A, step, beta=keep, alpha=lr)
            else:
                W.mul_(keep).add_(_times(A, step, rotated), alpha=lr)
        self.P.fold(stack, g[0][None])
        cell.refresh()


def _turned(left: Orthogonal | None, G: Tensor, right: Orthogonal | None, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(left·G·right in one of X and Y, the other)."""
    if left is None and isinstance(right, Tensor):
        return torch.mm(G, right, out=X), Y
    if isinstance(left, Tensor):
        torch.mm(left, G, out=X)
    else:
        X = _times(left, G, Y)
    if isinstance(right, Tensor):
        return torch.mm(X, right, out=Y), X
    return (X if right is None else right.from_right(X)), Y


def _times(Q: Orthogonal | None, X: Tensor, free: Tensor) -> Tensor:
    """Q X, in ``free`` or in X itself."""
    if isinstance(Q, Tensor):
        return torch.mm(Q, X, out=free)
    return X if Q is None else Q @ X


@dataclass
class _Completed:
    """The orthogonal matrix of a basis, made again where that is another."""

    _last: Last[Orthogonal] = field(default_factory=Last)

    def __call__(self, basis: Tensor) -> Orthogonal:
        return self._last(basis._version, lambda: completed(basis))


def soap(cell: Cell, P: SOAP, momentum: Momentum | None, decay: float) -> Rotated | None:
    """The kernel of a contiguous matrix with Adam's momentum, or None."""
    (p,) = cell.block.tensors
    match momentum:
        case Momentum(kind="ema", start="zero", of="cotangent") if momentum.corrected and P.eps > 0 and p.is_contiguous():
            return Rotated(P, momentum, decay)
    return None
