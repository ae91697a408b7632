"""Orthogonalized momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import LinearMap, SymmetricKronecker, Unrooted
from precond.algebra.maps.eigen import eigenpairs
from precond.algebra.precision import in_16_bits, rounding
from precond.algebra.vec import Vec
from precond.algebra.warning import warn
from precond.optim.blocks import Block, Leaf, State, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.fixed import Fixed
from precond.optim.preconditioners.kronecker import as_matrices, as_matrix, split
from precond.optim.preconditioners.newton_schulz import JORDAN, Coefficients, iterated, polynomial, stays_bounded
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked

if TYPE_CHECKING:
    from precond.optim.momentum import Momentum


Scale = Literal["original", "match_rms_adamw", "spectral", "none"]


@dataclass(frozen=True)
class Muon(Stacked):
    r"""Momentum with its singular values made equal: M = γ(m mᵀ)^(−1/2) for the momentum m of the clean gradient, so that M m = γUVᵀ.

    The map is frozen within a step; terms of regularizers are added to m after it is made. A weight of more than two dimensions
    is the matrix (out, rest); the root is that of the smaller side's Gram matrix, mᵀm where a matrix is tall. What is no matrix keeps
    its momentum: :class:`~precond.Route` gives it another preconditioner.

    Args:
        root: ``"newton-schulz"``, the polynomial Q(mmᵀ/‖m‖²)/‖m‖ of that iteration, which is positive also where m is singular; or
            ``"eigh"``, the exact root, zero on the null space of m.
        steps, coefficients: of the Newton–Schulz iteration.
        eps: ε > 0, the least ‖m‖ that m is divided by; with ``"eigh"``, singular values below ε of the largest count as zero, and
            so do those below √(s·u), s the smaller side and u the rounding of the dtype (0.7 % for s = 384 in float32).
        scale: γ for a matrix (A, B): ``"original"``, √max(1, A/B) (Jordan et al.); ``"match_rms_adamw"``, 0.2·√max(A, B), with
            which the root mean square of a step is that of AdamW's (Liu et al.); ``"spectral"``, √(A/B), with which outputs change by the
            learning rate at most for inputs of root mean square 1, whatever the width (Yang et al.); or ``"none"``, 1.
        arithmetic: of the fused step for float32 parameters: ``"bfloat16"``, as torch's own Muon, 1 to 5 % from the polynomial
            unless m is nearly singular, on processors that have instructions for it and in float32 on others, or ``"full"``.
            The reference engine, and float64 parameters, use the parameters' own in any case.
        momentum: the average of these parameters, in place of the optimizer's; None: the optimizer's.

    Raises:
        ValueError: for a hundred steps or more, or coefficients with which the iteration diverges.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=precond.Muon(root="eigh"))
        >>> W.grad = torch.tensor([[3.0, 0.0], [0.0, -1.0]]); _ = optimizer.step()
        >>> torch.testing.assert_close(W.data, torch.diag(torch.tensor([-1.0, 1.0])), atol=1e-5, rtol=0)  # −UVᵀ

    References:
        Jordan et al. (2024), Muon; Liu et al. (2025), Muon is scalable for LLM training; Carlson et al. (2015);
        Yang, Simon & Bernstein (2023), A spectral condition for feature learning.
    """

    root: Literal["newton-schulz", "eigh"] = "newton-schulz"
    steps: int = 5
    coefficients: Coefficients = JORDAN
    eps: float = 1e-7
    scale: Scale = "original"
    arithmetic: Literal["bfloat16", "full"] = "bfloat16"
    momentum: Momentum | None = None

    timeless = True
    uses_momentum = True
    states_root = False
    invertible = False

    def __post_init__(self) -> None:
        settle(self)
        checks.positive("Muon", eps=self.eps)
        checks.whole("Muon", steps=self.steps)
        if self.steps >= 100:
            raise ValueError(f"Muon: steps must be less than 100, got {self.steps!r}; 5 is usual")
        if not stays_bounded(self.coefficients, self.steps):
            raise ValueError(
                f"Muon: coefficients (ns_coefficients) {self.coefficients!r} let singular values grow without bound in "
                f"{self.steps} steps; {JORDAN} are usual"
            )

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """Each matrix by itself; what is none together, as it is."""
        return split(leaves, self, [is_full_matrix(leaf) for leaf in leaves], Fixed())

    def handles(self, block: Block) -> bool:
        return all(map(is_full_matrix, block.leaves))

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        (p,) = block.tensors
        s, dtype = min(as_matrix(p).shape), state_dtype(p.dtype)
        return {
            "gram": torch.zeros(s, s, dtype=dtype, device=p.device),
            "norm": torch.zeros((), dtype=dtype, device=p.device),
        }

    def observe(self, state: State, seen: Seen) -> None:
        (m,) = seen.gradient if seen.momentum is None else seen.momentum
        X, norm = normalized(as_matrices(m), self.eps)
        state["norm"].copy_(shortened(norm, seen, self.eps))
        state["gram"].copy_(X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X)

    def descend(self, state: State, seen: Seen) -> Vec:
        if self.root != "newton-schulz":
            return super().descend(state, seen)
        (m,) = seen.gradient if seen.momentum is None else seen.momentum
        X, norm = normalized(as_matrices(m), self.eps)
        step, gram = self._iterated(X)
        state["norm"].copy_(shortened(norm, seen, self.eps))
        state["gram"].copy_(gram)
        step = step.to(m.dtype)
        return ((step if seen.stride is None else step * seen.stride[:, None, None]).view(m.shape),)

    def _iterated(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """(γ times the last iterate, the first Gram matrix) from matrices (k, A, B) of norm 1."""
        narrow = self.arithmetic == "bfloat16" and in_16_bits(X, len(X))
        return iterated(X.bfloat16() if narrow else X, self.coefficients, int(self.steps), self.factor(*X.shape[-2:]))

    def shaped(self, m: Tensor) -> Tensor:
        """M m of matrices (k, A, B)."""
        X, _ = normalized(m, self.eps)
        if self.root == "newton-schulz":
            return self._iterated(X)[0].to(m.dtype)
        wide = X.shape[-2] <= X.shape[-1]
        Q = self._root(X @ X.mT if wide else X.mT @ X)
        return self.factor(*X.shape[-2:]) * (Q @ X if wide else X @ Q)

    def map(self, state: State) -> LinearMap:
        (like,) = state.block.tensors
        rows, columns = as_matrices(like).shape[-2:]
        gain = torch.where(state["norm"] > 0, self.factor(rows, columns) / state["norm"].clamp_min(self.eps), 0.0)
        Q = gain[:, None, None] * self._root(state["gram"])
        return Unrooted(SymmetricKronecker(Q, None, (like,)) if rows <= columns else SymmetricKronecker(None, Q, (like,)))

    def factor(self, rows: int, columns: int) -> float:
        """γ of a matrix."""
        return factor(self.scale, rows, columns)

    def _root(self, gram: Tensor) -> Tensor:
        if self.root == "newton-schulz":
            return polynomial(gram, self.coefficients, int(self.steps))
        try:
            values, V = eigenpairs(gram)
        except torch.linalg.LinAlgError:
            warn(
                "a Gram matrix of momentum has no eigenvalues that converge: Newton–Schulz takes the root, and training goes on"
            )
            return polynomial(gram, self.coefficients, int(self.steps))
        least = values.amax(-1, keepdim=True) * max(self.eps**2, rounding(gram.shape[-1], gram.dtype))
        return (V * torch.where(values > least, values, torch.inf).rsqrt()[..., None, :]) @ V.mT


def factor(scale: Scale, rows: int, columns: int) -> float:
    """γ of a matrix: see :class:`Muon`."""
    match scale:
        case "original":
            return max(1.0, rows / columns) ** 0.5
        case "match_rms_adamw":
            return 0.2 * max(rows, columns) ** 0.5
        case "spectral":
            return (rows / columns) ** 0.5
        case _:
            return 1.0


def is_full_matrix(leaf: Leaf) -> bool:
    """A tensor of at least two dimensions that has entries."""
    return leaf.ndim >= 2 and leaf.param.numel() > 0


def shortened(norm: Tensor, seen: Seen, eps: float) -> Tensor:
    """What γ is divided by, ‖m‖ or ε at least; 1/√c times that where steps are √c times as long."""
    return norm if seen.stride is None else torch.where(norm > 0, norm.clamp_min(eps) / seen.stride, 0.0)


def normalized(m: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(m / max(‖m‖, ε), ‖m‖) of matrices (…, A, B), the squares of whose entries do not overflow; the first is 0 where m is."""
    largest = torch.linalg.vector_norm(m, torch.inf, (-2, -1), keepdim=True)
    X = m / largest.clamp_min(torch.finfo(m.dtype).tiny)
    norm = torch.linalg.vector_norm(X, 2, (-2, -1), keepdim=True)
    # Multiplied back only where ε counts: the norm of a huge m overflows, and with it that of m / ‖m‖ would vanish.
    X *= torch.minimum(norm.reciprocal(), largest / eps)
    return X, (largest * norm)[..., 0, 0]
