"""Factors of both sides of a layer: K-FAC's B ⊗ A from gradients in whitened coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from precond.algebra import checks
from precond.algebra.maps import BlockDiagonal, LinearMap, SymmetricKronecker
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, State, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.kronecker import as_matrices, fold
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.rational import renew
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked
from precond.optim.preconditioners.whitening import Whitening


@dataclass(frozen=True)
class OutputFactor(Stacked):
    r"""M = (B/β + ε′I)^(−e) on the outputs of each layer: one matrix for the rows of its weight and for its bias.

    B is the mean of GGᵀ + g_b g_bᵀ over steps, β its mean eigenvalue, by which it is divided so that M keeps the gradient's scale.
    A layer is a weight (out, rest) and a bias (out,); what is none is left as it is.

    Args:
        power: e; 1 is the natural gradient's.
        decay: ρ of B in [0, 1).
        damping: ε ≥ 0, relative to the largest eigenvalue.
        every: steps between roots, which are also taken at step 1; layers of other shapes, and of one where they are many, take turns.
        max_dim: layers of more outputs are left as they are.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=precond.OutputFactor(damping=0.0))
        >>> W.grad = torch.tensor([[2.0, 0.0], [0.0, 1.0]]); _ = optimizer.step()
        >>> torch.testing.assert_close(W.data, -torch.diag(torch.tensor([1.25, 2.5])))  # B/β = diag(1.6, 0.4)

    References:
        Martens & Grosse (2015), for B; taken from gradients as :func:`KFAC` says.
    """

    power: float = 1.0
    decay: float = 0.95
    damping: float = 1e-2
    every: int = 10
    max_dim: int = 8192

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("OutputFactor", decay=self.decay)
        checks.non_negative("OutputFactor", damping=self.damping)
        checks.positive("OutputFactor", power=self.power)
        checks.whole("OutputFactor", every=self.every, max_dim=self.max_dim)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """A block per layer."""
        return [Part(i, self) for i in blocks.by_layer(leaves)]

    def handles(self, block: Block) -> bool:
        outputs = {leaf.shape[0] if leaf.ndim else 1 for leaf in block.leaves}
        weights = [leaf for leaf in block.leaves if leaf.ndim >= 2 and leaf.kind == "weight" and leaf.param.numel()]
        biases = [leaf for leaf in block.leaves if leaf.kind == "bias" and leaf.ndim == 1]
        if any(leaf.inputs_first for leaf in weights):
            return False  # their rows are inputs
        known = len(weights) + len(biases) == len(block.leaves) and bool(weights)
        return known and len(outputs) == 1 and 2 <= next(iter(outputs)) <= self.max_dim

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        p = block.tensors[0]
        n, dtype = p.shape[0], state_dtype(p.dtype)
        return {
            "outputs": torch.zeros(n, n, dtype=dtype, device=p.device),
            "outputs_root": torch.eye(n, dtype=dtype, device=p.device),
        }

    def observe(self, state: State, seen: Seen) -> None:
        B, keep = state["outputs"], self.decay
        for g in seen.gradient:
            fold(B, g[..., None] if g.ndim == 2 else as_matrices(g), False, keep, 1 - self.decay)
            keep = 1.0
        for some in [slice(0, len(B))] if min(state.steps) == 1 else state.due(self.every):
            mean = B[some].diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            normal = torch.where(mean > 0, B[some] / mean, 0.0)
            renew([state["outputs_root"][some]], [normal], self.power, self.damping)

    def map(self, state: State) -> LinearMap:
        like = state.block.tensors
        sides = [((i,), SymmetricKronecker(state["outputs_root"], None, (t,))) for i, t in enumerate(like)]
        return BlockDiagonal(sides, like)


def KFAC(
    decay: float = 0.95, damping: float = 1e-3, every: int = 100, output_damping: float = 1e-2, output_every: int = 10
) -> Preconditioner:
    r"""M = B⁻¹ ⊗ A⁻¹ up to a factor, A = E[ĥĥᵀ] of a layer's inputs: ``Whitening() @ OutputFactor()``.

    K-FAC's B is E[δδᵀ] over samples, δ the gradient of a sample's loss at the layer's outputs. It is taken here from gradients alone:
    in the coordinates of whitened inputs the mean of G′G′ᵀ = G A⁻¹ Gᵀ is, if δ and h are independent as K-FAC supposes, a
    multiple of B (in/N, of N samples). So nothing but the layers' inputs is observed. Hooks on outputs would add a pass
    over all activations per step, fail where activations are changed in place, and count recomputed forwards twice.

    Args:
        decay, damping, every: see :class:`~precond.Whitening`; with no outputs' factor it is FOOF (Benzing, 2022).
        output_damping, output_every: see :class:`OutputFactor`.

    Returns:
        The composition, a :class:`~precond.Preconditioner`.

    Example:
        >>> import precond
        >>> precond.KFAC() == precond.Whitening(every=100, rank=None) @ precond.OutputFactor(every=10)
        True

    References:
        Martens & Grosse (2015); Benzing (2022).
    """
    return Whitening(decay, damping, every=every, rank=None) @ OutputFactor(1.0, decay, output_damping, output_every)
