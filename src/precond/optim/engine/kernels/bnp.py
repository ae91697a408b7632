"""BNP's step in place: nothing of the weight's size is made anew."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import State
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.layer import CachedOnStatistics, OfLayer, Task, is_plain
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import BNP


@dataclass
class BNPStep(OfLayer):
    r"""W ← W − α dW, b ← b − α db with dW = (g_W − g_b μᵀ)/σ̃², db = β²g_b − dW μ (Ye, eqs. 25–27), expanded.

    With s = 1/σ̃²: W ← W − α g_W∘s + α g_b(μ∘s)ᵀ and dW μ = g_W(μ∘s) − g_b Σμ²s. The vectors are kept until inputs are observed again.
    """

    P: BNP
    momentum: Momentum | None
    decay: float

    def __post_init__(self) -> None:
        self._kept = CachedOnStatistics(self.P, _vectors)

    def observed(self, cell: Cell) -> tuple[BNP, State]:
        return self.P, cell.state

    @property
    def joint(self) -> Hashable:
        return BNPStep, self.momentum

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        self.steps([Task(self, cell, p, g, lr, maximize)])

    @staticmethod
    def steps(tasks: Sequence[Task]) -> None:
        momentum: Momentum | None = tasks[0].kernel.momentum
        descended = [torch._foreach_neg(task.g) if task.maximize else task.g for task in tasks]
        if momentum is not None:
            # Folded in place of the gradient, which stays as it is.
            averages = [task.cell.average for task in tasks]
            momentum.fold_all(averages, descended)
            descended = [average["m"] for average in averages]
        for (kernel, cell, p, _, lr, *_), v in zip(tasks, descended, strict=True):
            kernel._move(cell, p, v, float(lr))

    def _move(self, cell: Cell, p: Tensors, v: Tensors, lr: float) -> None:
        """p ← (1 − αλ)p − αMv."""
        if self.decay:
            torch._foreach_mul_(p, 1 - lr * self.decay)
        if (kept := self._kept(cell.state)) is None:
            torch._foreach_add_(p, v, alpha=-lr)
            return
        s, shifted, scale = kept
        W, vW = p[0].view(p[0].shape[0], -1), v[0].reshape(p[0].shape[0], -1)
        W.addcmul_(vW, s, value=-lr)
        if len(p) > 1:
            W.addr_(v[1], shifted, alpha=lr)
            p[1].addcmul_(v[1], scale, value=-lr).addmv_(vW, shifted, alpha=lr)


def _vectors(state: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1/σ̃², μ/σ̃², β² + Σμ²/σ̃²)."""
    s = std.view(-1).square().reciprocal_()
    shifted = mean.view(-1) * s
    return s, shifted, torch.dot(mean.view(-1), shifted) + (beta if isinstance(beta, float) else beta.view(())) ** 2


def bnp_step(cell: Cell, P: BNP, momentum: Momentum | None, decay: float) -> BNPStep | None:
    """The kernel of a plain layer, or None."""
    if momentum is not None and (momentum.kind != "heavy_ball" or momentum.of != "cotangent" or momentum.dampening):
        return None
    return BNPStep(P, momentum, decay) if is_plain(P, cell.block) else None
