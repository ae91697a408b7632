"""BNP's step in place: nothing of the weight's size is made anew."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.blocks import Block, State
from precond.engine.cells import Cell
from precond.maps import Layout, Standardizing
from precond.momentum import Momentum
from precond.preconditioners import BNP
from precond.preconditioners.input_side import InputSide
from precond.vec import Scalar, Tensors


@dataclass
class Arrow:
    r"""W ← W − α dW, b ← b − α db with dW = (g_W − g_b μᵀ)/σ̃², db = β²g_b − dW μ (Ye, eqs. 25–27), expanded.

    With s = 1/σ̃²: W ← W − α g_W∘s + α g_b(μ∘s)ᵀ and dW μ = g_W(μ∘s) − g_b Σμ²s. The vectors are kept until inputs are observed again.
    """

    P: BNP
    momentum: Momentum | None
    decay: float
    _known: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)
    _version: int = field(default=-1, repr=False)

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        torch._foreach_add_(cell.state["step"], 1)
        if cell.inputs:
            cell.observe(cell.state, tuple(g))
        if self._version != (version := cell.state["mean"]._version):  # whichever engine has folded something in
            self._known, self._version = None, version
        lr = float(lr)
        if self.decay:
            torch._foreach_mul_(p, 1 - lr * self.decay)
        if self.momentum is not None:
            # Folded in place of the gradient, which stays as it is.
            m = cell.average["m"]
            torch._foreach_mul_(m, self.momentum.beta)
            torch._foreach_add_(m, g, alpha=-1 if maximize else 1)
            g, maximize = m, False
        alpha = lr if maximize else -lr
        if self._known is None and (int(cell.state["count"].min()) == 0):
            torch._foreach_add_(p, g, alpha=alpha)
            return
        s, shifted, scale = self._known = self._known or self._vectors(cell.state)
        W, gW = p[0].view(p[0].shape[0], -1), g[0].reshape(p[0].shape[0], -1)
        W.addcmul_(gW, s, value=alpha)
        if len(p) > 1:
            gb = g[1]
            W.addr_(gb, shifted, alpha=-alpha)
            p[1].addcmul_(gb, scale, value=alpha).addmv_(gW, shifted, alpha=-alpha)

    def _vectors(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """(1/σ̃², μ/σ̃², β² + Σμ²/σ̃²)."""
        (part,) = self.P.parts(state.block)
        arrow = self.P.part_map(part, state, state.block.tensors)
        assert isinstance(arrow, Standardizing)
        mean = arrow.mean.view(-1)
        s = arrow.std.view(-1).square().reciprocal_()
        shifted = mean * s
        beta = arrow.beta if isinstance(arrow.beta, float) else arrow.beta.view(())
        return s, shifted, torch.dot(mean, shifted) + beta**2


def layer_of(P: InputSide, block: Block) -> Layout | None:
    """How the rows of a layer with its whole bias lie, where they do so one after the other in memory, by groups; or None."""
    parts = P.parts(block)
    if len(parts) != 1 or parts[0].rows != slice(None) or parts[0].weight != 0:
        return None
    layout = parts[0].layout(P.request)
    alone = len(block.leaves) == (1 if parts[0].bias is None else 2)
    straight = not layout.transposed and layout.held is None and block.tensors[0].is_contiguous()
    return layout if alone and straight else None


def is_plain(P: InputSide, block: Block) -> bool:
    """Whether it is such a layer with one group of rows."""
    layout = layer_of(P, block)
    return layout is not None and layout.groups == 1


def arrow(cell: Cell, P: BNP, momentum: Momentum | None, decay: float) -> Arrow | None:
    """The kernel of a plain layer, or None."""
    if momentum is not None and (momentum.kind != "heavy_ball" or momentum.of != "cotangent" or momentum.dampening):
        return None
    return Arrow(P, momentum, decay) if is_plain(P, cell.block) else None
