"""Singular values of the momentum to a power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import LinearMap, SymmetricKronecker, Unrooted
from precond.algebra.maps.eigen import eigenpairs
from precond.algebra.precision import rounding
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, Leaf, State, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.eigenbases import at_hand
from precond.optim.preconditioners.fixed import Fixed
from precond.optim.preconditioners.kronecker import as_matrices, as_matrix, split
from precond.optim.preconditioners.muon import Scale, factor, is_full_matrix, normalized, shortened
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.rational import inverse_roots
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked

if TYPE_CHECKING:
    from precond.optim.momentum import Momentum


@dataclass(frozen=True)
class Schatten(Stacked):
    r"""Steepest descent in a Schatten norm: M m = γ'UΣˢVᵀ for the momentum m = UΣVᵀ, with M = γ'(mmᵀ)^((s−1)/2) ⊗ I.

    s = 0 is :class:`~precond.Muon` with its exact root (the spectral norm), s = 1 the momentum itself (the Frobenius norm), and between
    them directions in which m is small, noise among them, are lengthened less: the norm is that of exponent q with s = 1/(q − 1). Taken
    from both sides, (mmᵀ)^((s−1)/4)·m·(mᵀm)^((s−1)/4), it is the same. γ' is such that a step is as long as Muon's, ‖M m‖ = γ√min(A, B).

    Args:
        power: s in [0, 1].
        eps: ε > 0, the least ‖m‖ that m is divided by; singular values that are rounding of the largest, √(n·u), count as zero.
        scale: γ of a matrix (A, B), as in :class:`~precond.Muon`.
        momentum: the average of these parameters, in place of the optimizer's; None: the optimizer's.

    Raises:
        ValueError: for a power outside of [0, 1].

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=precond.Schatten(0.5))
        >>> W.grad = torch.tensor([[4.0, 0.0], [0.0, 1.0]]); _ = optimizer.step()
        >>> expected = -torch.diag(torch.tensor([2.0, 1.0])) * (2 / 5) ** 0.5  # Σ^½, as long as Muon's, √2
        >>> torch.testing.assert_close(W.data, expected, atol=1e-4, rtol=0)

    References:
        Carlson, Cevher & Carin (2015), stochastic spectral descent; Bernstein & Newhouse (2024) for norms; Jordan et al. (2024), Muon.
    """

    power: float = 0.5
    eps: float = 1e-7
    scale: Scale = "original"
    momentum: Momentum | None = None

    uses_momentum = True
    states_root = False
    invertible = False

    def __post_init__(self) -> None:
        settle(self)
        checks.positive("Schatten", eps=self.eps)
        if not 0 <= self.power <= 1:
            raise ValueError(f"Schatten: power must be in [0, 1], got {self.power!r}; 0 is Muon, 1 the momentum itself")

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """Each matrix by itself; what is none together, as it is."""
        return split(leaves, self, [is_full_matrix(leaf) for leaf in leaves], Fixed())

    def handles(self, block: Block) -> bool:
        return all(map(is_full_matrix, block.leaves))

    def init(self, block: Block) -> dict:
        (p,) = block.tensors
        s, dtype = min(as_matrix(p).shape), state_dtype(p.dtype)
        zeros = lambda *shape: torch.zeros(shape, dtype=dtype, device=p.device)  # noqa: E731
        return {"gram": zeros(s, s), "norm": zeros(), "size": zeros()}

    def observe(self, state: State, seen: Seen) -> None:
        (m,) = seen.gradient if seen.momentum is None else seen.momentum
        self._observed(state, as_matrices(m), seen)

    def descend(self, state: State, seen: Seen) -> Vec:
        (m,) = seen.gradient if seen.momentum is None else seen.momentum
        return (self._observed(state, as_matrices(m), seen).reshape(m.shape),)

    def _observed(self, state: State, m: Tensor, seen: Seen) -> Tensor:
        """M m; the state knows mmᵀ/‖m‖², ‖m‖ and ‖UΣˢVᵀ‖ of m/‖m‖ then."""
        X, norm = normalized(m, self.eps)
        gram = X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X
        shaped, size = self._shaped(X, self._root(gram))
        for key, value in (("gram", gram), ("norm", shortened(norm, seen, self.eps)), ("size", size)):
            state[key].copy_(value)
        return shaped if seen.stride is None else shaped * seen.stride[:, None, None]

    def shaped(self, m: Tensor) -> Tensor:
        """M m of matrices (k, A, B)."""
        X, _ = normalized(m, self.eps)
        return self._shaped(X, self._root(X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X))[0]

    def _shaped(self, X: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """(γ'R X, ‖R X‖)."""
        Y = R @ X if X.shape[-2] <= X.shape[-1] else X @ R
        size = torch.linalg.vector_norm(Y, 2, (-2, -1))
        return Y * self._gain(X.shape[-2:], size)[:, None, None], size

    def _gain(self, shape: Sequence[int], size: Tensor) -> Tensor:
        length = factor(self.scale, *shape) * min(shape) ** 0.5
        return torch.where(size > 0, length / size, 0.0)

    def _root(self, gram: Tensor) -> Tensor:
        """(mmᵀ)^((s−1)/2), zero where m is."""
        e = (1 - self.power) / 2
        if e == 0:
            return torch.eye(gram.shape[-1]).to(gram).expand_as(gram)
        least = rounding(gram.shape[-1], gram.dtype)
        if not at_hand(gram):
            return inverse_roots(gram, e, least).nan_to_num_(0.0)
        values, V = eigenpairs(gram)
        some = values > values.amax(-1, keepdim=True) * least
        return (V * torch.where(some, torch.where(some, values, 1.0) ** -e, 0.0)[..., None, :]) @ V.mT

    def map(self, state: State) -> LinearMap:
        (like,) = state.block.tensors
        rows, columns = as_matrices(like).shape[-2:]
        gain = self._gain((rows, columns), state["size"])
        gain = torch.where(state["norm"] > 0, gain / state["norm"].clamp_min(self.eps), 0.0)
        Q = gain[:, None, None] * self._root(state["gram"])
        return Unrooted(SymmetricKronecker(Q, None, (like,)) if rows <= columns else SymmetricKronecker(None, Q, (like,)))
