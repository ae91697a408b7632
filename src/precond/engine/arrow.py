"""BNP's step in place, by itself and with Adam in its coordinates: nothing of the weight's size is made anew."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.blocks import Block, State
from precond.engine.cells import Cell
from precond.engine.workspace import WORKSPACE
from precond.maps import Standardizing
from precond.momentum import Momentum
from precond.preconditioners import BNP, RMS
from precond.preconditioners.base import Seen
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
    _known: tuple[Tensor, Tensor, Tensor, float | Tensor] | None = field(default=None, repr=False)
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
        s, shifted, square, scale = self._known = self._known or self._vectors(cell.state)
        W, gW = p[0].view(p[0].shape[0], -1), g[0].reshape(p[0].shape[0], -1)
        W.addcmul_(gW, s, value=alpha)
        if len(p) > 1:
            gb = g[1]
            W.addr_(gb, shifted, alpha=-alpha)
            p[1].add_(torch.addmv(gb * (scale + square), gW, shifted, alpha=-1), alpha=alpha)

    def _vectors(self, state: State) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
        """(1/σ̃², μ/σ̃², Σμ²/σ̃², β²)."""
        mean, std, beta = _scales(self.P, state)
        s = std**-2
        shifted = mean * s
        return s, shifted, torch.dot(mean, shifted), beta**2


@dataclass
class AdamOnArrow:
    r"""Adam in BNP's coordinates: y = P₁ᵀg, u = m̂/(√r̂ + ε), p ← (1 − αλ)p − αP₁u, m and r averages of y and of y².

    Per layer Y = (g_W − g_b μᵀ)/σ̃, y_b = βg_b; W ← W − αU/σ̃, b ← b − α(βu_b − U(μ/σ̃)). Blocks that BNP leaves as they are take Adam.
    """

    P: BNP
    inner: RMS
    momentum: Momentum
    decay: float
    layer: bool
    _known: tuple[Tensor, Tensor, Tensor, float | Tensor] | None = field(default=None, repr=False)
    _version: int = field(default=-1, repr=False)

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        outer = cell.state["outer"]
        torch._foreach_add_(cell.state["step"], 1)
        if self.layer and cell.inputs:
            self.P.observe(outer, Seen(tuple(g), cell.inputs))
        if not self.layer or int(outer["count"].min()) == 0:
            self._adam(cell, p, g, lr, self.decay, maximize)
            return
        if self._version != (version := outer["mean"]._version):  # whichever engine has folded something in
            self._known, self._version = self._vectors(outer), version
        assert self._known is not None
        mean, inverse, shifted, beta = self._known
        lr = float(lr)
        W, G = p[0].view(p[0].shape[0], -1), g[0].reshape(p[0].shape[0], -1)
        (Y,) = WORKSPACE.take(W.dtype, W.shape)
        if len(p) == 1:
            y = [torch.mul(G, inverse, out=Y)]
        else:
            y = [torch.addr(G, g[1], mean, alpha=-1, out=Y).mul_(inverse), g[1] * beta]
        # As its own parameter that decays to nothing, y becomes the step −u without another buffer.
        self._adam(cell, [y[0].view_as(p[0]), *y[1:]], None, 1.0, 1.0, maximize)
        if self.decay:
            torch._foreach_mul_(p, 1 - lr * self.decay)
        W.addcmul_(Y, inverse, value=lr)
        if len(p) > 1:
            p[1].add_(torch.addmv(y[1].mul_(beta), Y, shifted, alpha=-1), alpha=lr)

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

    def _vectors(self, outer: State) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
        """(μ, 1/σ̃, μ/σ̃, β)."""
        mean, std, beta = _scales(self.P, outer)
        return mean, 1 / std, mean / std, beta


def _scales(P: BNP, state: State) -> tuple[Tensor, Tensor, float | Tensor]:
    """(μ, σ̃, β) of a layer with one group of rows."""
    arrow = P.map(state)
    assert isinstance(arrow, Standardizing)
    return arrow.mean[0, 0], arrow.std[0, 0], arrow.beta if isinstance(arrow.beta, float) else arrow.beta.reshape(())


def is_plain(P: InputSide, block: Block) -> bool:
    """Whether a block is a layer with one group of rows and its whole bias, row by row in memory."""
    parts = P.parts(block)
    if len(parts) != 1 or parts[0].rows != slice(None) or parts[0].weight != 0:
        return False
    layout = parts[0].layout(P.request)
    alone = len(block.leaves) == (1 if parts[0].bias is None else 2)
    return alone and layout.groups == 1 and not layout.transposed and block.tensors[0].is_contiguous()


def arrow(cell: Cell, P: BNP, momentum: Momentum | None, decay: float) -> Arrow | None:
    """The kernel of a plain layer, or None."""
    if momentum is not None and (momentum.kind != "heavy_ball" or momentum.of != "cotangent" or momentum.dampening):
        return None
    return Arrow(P, momentum, decay) if is_plain(P, cell.block) else None


def adam_on_arrow(cell: Cell, P: BNP, inner: RMS, momentum: Momentum | None, decay: float) -> AdamOnArrow | None:
    """The kernel of a plain layer, or of a block that BNP leaves as it is, with Adam's averages; or None."""
    layer = P.handles(cell.block)
    if layer and not is_plain(P, cell.block):
        return None
    match inner, momentum:
        case RMS(start="zero", bias_correction=True, centered=False), Momentum(kind="ema", start="zero", of="cotangent"):
            if inner.eps > 0 and momentum.corrected:
                return AdamOnArrow(P, inner, momentum, decay, layer)
    return None
