"""Momentum near its polar factor, by roots that are renewed now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import Augmented, LinearMap, Scaled, augmented, parted
from precond.algebra.vec import Vec
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, Stack, State, spans, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.eigenbases import WARM_UP, at_hand
from precond.optim.preconditioners.muon import normalized
from precond.optim.preconditioners.parts import Part, placed
from precond.optim.preconditioners.polar_lengths import count_samples, exact, is_fresh, lengths, measure, spread
from precond.optim.preconditioners.polar_roots import WHOLE, Leading, root_of
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked

if TYPE_CHECKING:
    from precond.optim.momentum import Momentum

_TINY = 1e-37  # the least ‖m‖ that m is divided by


@dataclass(frozen=True)
class Polar(Stacked):
    r"""Muon on a schedule: M = s·L^(−1/2), L a running mean of m mᵀ/‖m‖² for the momentum m of a layer, [weight bias] as a matrix (A, B).

    Where L is that of m itself, L^(−1/2)m is in the direction of its polar factor UVᵀ, as in :class:`~precond.Muon`. A layer of many
    samples, convolutions' or sequences', takes it so in each step: where a root costs no more than the layer's own products. For others
    L is the mean over the steps at which the root is renewed: 1, 2, 4, 8, … and then each that ``every`` divides, or where it is the turn of
    layers of other shapes, up to a period before these; in between it stands still, and a step costs one product with the shorter side
    (mᵀm and a product from the right where A > B). The step is as long as a matrix whose ρ singular values, as many as L has, are γ: s is
    such that ‖M m‖ = γ√ρ, with ρ = tr L(L + ελ₁I)⁻¹ and γ = c·√(A/B)·(n/min(A, n))^(1/4)·ℓ. A step of the spectral norm √(A/B) changes the
    outputs for inputs of variance 1 by 1 at most, root mean square, whatever the width; so the best learning rate is that of a small net,
    where initial weights have such norms too. Where :class:`~precond.Momentum` measures its coherence c, steps are √c times as long.

    Outputs change by that where inputs lie in the ρ ≤ min(A, B) directions of the step. White inputs do so by a share ρ/B: behind
    :class:`~precond.Whitening` or :class:`~precond.BNP` the outputs of a layer that has fewer of them than inputs change by √(ρ/B) alone, those
    of one output by 1/√B. N samples span n = min(B, N) directions at most, and in these a step is as long as the geometric mean of what either
    case asks for. It is told by ``explain()``. Where inputs are not observed, or A ≥ n, nothing is longer.

    ℓ is told by the parameters at their first step, p₀ and z₀ in these coordinates: ℓ = max(‖z₀‖/√A, min(1, √σ)), σ = ‖z₀‖/‖p₀‖. Behind
    :class:`~precond.Whitening` or :class:`~precond.BNP` ‖z₀‖/√A is the root mean square of the layer's outputs. It exceeds 1 where raw inputs
    are large, and steps are longer in proportion. σ is the inputs' root mean square; where it is small, as in the depth of a net without
    normalization, steps are the geometric mean of those that change outputs by γ and those that change weights as for inputs of 1. Of
    p alone ℓ = max(‖p₀‖/√A, 1). What is no layer takes ``RMS``.

    Args:
        every: steps between roots, at most.
        decay: ρ of L over the steps that it is renewed at, in [0, 1), where these are not all.
        damping: ε ≥ 0, added to L relative to its largest eigenvalue.
        rank: r ≥ 1; where the shorter side n of a layer is longer than 4r, L is taken as λ̄I + U(Λ − λ̄)Uᵀ, with its r leading
            eigenvalues Λ, their eigenvectors U and the mean λ̄ of the others. A product with the root then takes 4nr operations for each
            column in place of 2n², a root n²r in place of n³, and it is renewed on the schedule whatever the number of samples. None: L
            as it is.
        gain: c > 0.
        max_dim: layers whose shorter side is longer take ``RMS``.
        arithmetic: of the fused step's two products for float32 parameters: ``"bfloat16"``, up to some percent off, where they are
            large, with all of L, and the processor has instructions for them, and float32 elsewhere; or ``"full"``. The reference
            engine, and float64 parameters, use the parameters' own in any case.
        others_decay, others_eps: of ``RMS``.
        momentum: the average of these parameters, in place of the optimizer's; None: the optimizer's.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=precond.Polar(damping=0.0))
        >>> W.grad = torch.tensor([[3.0, 0.0], [0.0, -1.0]]); _ = optimizer.step()
        >>> torch.testing.assert_close(W.data, torch.diag(torch.tensor([-1.0, 1.0])), atol=1e-4, rtol=0)  # −UVᵀ

    References:
        Jordan et al. (2024), Muon; Gupta, Koren & Singer (2018), Shampoo, with one side; Yang, Simon & Bernstein (2023), A spectral condition
        for feature learning, for the length of steps.
    """

    every: int = 8
    decay: float = 0.5
    damping: float = 1e-3
    rank: int | None = 32
    gain: float = 1.0
    max_dim: int = 4096
    arithmetic: Literal["bfloat16", "full"] = "bfloat16"
    others_decay: float = 0.999
    others_eps: float = 1e-8
    momentum: Momentum | None = None

    counts = frozenset({"size"})
    uses_momentum = True
    advised_damping = 0.1

    def __post_init__(self) -> None:
        settle(self)
        checks.whole("Polar", every=self.every, max_dim=self.max_dim)
        checks.positive("Polar", gain=self.gain)
        checks.fraction("Polar", decay=self.decay, others_decay=self.others_decay)
        checks.non_negative("Polar", damping=self.damping, others_eps=self.others_eps)
        if self.rank is not None:
            checks.whole("Polar", rank=self.rank)

    def _fits(self, weight: Tensor) -> bool:
        return (
            weight.ndim >= 2 and weight.numel() > 0 and min(weight.shape[0], weight.numel() // weight.shape[0]) <= self.max_dim
        )

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """A block per layer; what is no layer by RMS."""
        layers, rest = [], []
        for index in blocks.by_layer(leaves):
            of_layer = self._layer([leaves[i] for i in index])
            layers += [tuple(index[i] for i in of_layer)] if of_layer else []
            rest += [i for k, i in enumerate(index) if k not in of_layer]
        return [Part(i, self) for i in layers] + placed(self._others, leaves, rest)

    @cached_property
    def _others(self) -> RMS:
        return RMS(self.others_decay, self.others_eps)

    def _layer(self, leaves: Sequence[Leaf]) -> tuple[int, ...]:
        """Positions of the weight and its bias, or of the weight alone; nothing where there is no such matrix."""
        weights = [i for i, leaf in enumerate(leaves) if leaf.kind == "weight" and self._fits(leaf.param)]
        if len(weights) != 1:
            return ()
        weight = leaves[weights[0]]
        if weight.inputs_first and weight.ndim > 2:
            return (weights[0],)  # its rows are inputs
        rows = weight.shape[1 if weight.inputs_first else 0]
        biases = [i for i, leaf in enumerate(leaves) if leaf.kind == "bias" and tuple(leaf.shape) == (rows,)]
        return (weights[0], *biases) if len(biases) == 1 else (weights[0],)

    def handles(self, block: Block) -> bool:
        return self._layer(block.leaves) == tuple(range(len(block.leaves)))

    def looks(self, step: int) -> bool:
        return step <= WARM_UP  # at the first gradient that is finite

    def settled(self, state: State) -> bool:
        return not is_fresh(state)

    @staticmethod
    def is_turned(block: Block) -> bool:
        """Whether its weight is (in, out)."""
        return block.leaves[0].inputs_first and block.leaves[0].ndim == 2

    @classmethod
    def matrix(cls, block: Block, v: Vec) -> Tensor:
        """A vector of a layer as the matrix [W b], a row for each output; of a stack matrices side by side."""
        return augmented(v, cls.is_turned(block), isinstance(block, Stack))

    def init(self, block: Block) -> dict:
        p, n = block.tensors[0], min(self.matrix(block, block.tensors).shape)
        zeros = lambda *shape: torch.zeros(shape, dtype=state_dtype(p.dtype), device=p.device)  # noqa: E731
        L = zeros(n, n)
        root = WHOLE if self.rank is None or n <= 4 * self.rank else Leading(self.rank)
        size = torch.zeros((), dtype=state_dtype(p.dtype))  # on the host, which knows it from shapes
        return {"gram": L, **root.fresh(L), "norm": zeros(), "length": zeros() + 1, "rank": zeros() + 1, "size": size}

    def _shares(self, state: State, shape: Sequence[int]) -> list[float]:
        """The share of this step's m mᵀ in L, of each member of a stack; 0: L and its root stay."""
        whole, away = root_of(state).whole, state.until_renewed(self.every)
        return [
            1.0 if whole and exact(N, shape) else 0.0 if until else 1 - self.decay
            for N, until in zip(state["size"].tolist(), away, strict=True)
        ]

    def observe(self, state: State, seen: Seen) -> None:
        self._turned(state, seen)

    def descend(self, state: State, seen: Seen) -> Vec:
        turned, norm = self._turned(state, seen)
        length = torch.where(norm > 0, lengths(state, turned.shape[-2:], self.gain) / norm, 0.0)
        if seen.stride is not None:
            length *= seen.stride
        return parted(turned.mul_(length[:, None, None]), state.block.tensors, self.is_turned(state.block))

    def _turned(self, state: State, seen: Seen) -> tuple[Tensor, Tensor]:
        """(L^(−1/2)m/‖m‖, its norm) of the momentum seen, in a step that observes it."""
        m = self.matrix(state.block, seen.gradient if seen.momentum is None else seen.momentum)
        count_samples(state, seen.inputs)
        if first := self._first(state):
            fresh = ~state["gram"].diagonal(dim1=-2, dim2=-1).any(-1)
            if seen.position is not None:
                z, p = (self.matrix(state.block, at()) for at in (seen.position, seen.parameters or seen.position))
                measure(state, z, p, fresh)
        X, size = normalized(m, _TINY)
        shares = self._shares(state, m.shape[-2:])
        for some in spans([first or share > 0 for share in shares]):
            x, own = X[some], shares[some]
            share = own[0] if len(set(own)) == 1 else torch.tensor(own).to(X)[:, None, None]
            gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
            self.fold(
                state.span(some), gram, torch.where(fresh[some][:, None, None], X.new_ones(()), share) if first else share
            )
        turned = self.apply_inverse_root(state, X)
        norm = torch.linalg.vector_norm(turned, 2, (-2, -1))
        found = norm * size  # as if m were longer by 1/√c: then its step is √c times as long
        state["norm"].copy_(found if seen.stride is None else found / seen.stride)
        return turned, norm

    @staticmethod
    def _first(state: State) -> bool:
        """Whether some layer may be new: asked in the first eight steps and in the first of a fresh state; where a device knows, it may."""
        (t, *_) = state.steps
        looked = state.kept("looked", None, list)
        if looked and t > WARM_UP:
            return False
        looked.append(t)
        return not at_hand(state["gram"]) or is_fresh(state)

    def fold(self, state: State, gram: Tensor, share: float | Tensor) -> None:
        """Fold m mᵀ/‖m‖² into L, (k, n, n) or (n, n), with a share of all or of each (k, 1, 1), and take the root anew.

        Where that fails, or one of those side by side is not finite, what was before stays.
        """
        L = state["gram"]
        if L.ndim == 3:
            # A Gram matrix is finite where its diagonal is.
            finite = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] < torch.inf
            torch.where(finite, torch.lerp(L, gram, share), L, out=L)
        else:
            L.lerp_(gram, share)
        state["rank"].copy_(root_of(state).renew(state, L, self.damping))

    @staticmethod
    def apply_inverse_root(state: State, m: Tensor) -> Tensor:
        """L^(−1/2)m, or m L^(−1/2) where m is tall."""
        root = root_of(state)
        return root.times(state, m) if m.shape[-2] <= m.shape[-1] else root.times(state, m.mT).mT

    def findings(self, state: State) -> Sequence[str]:
        if "size" not in state:
            return ()  # of layers that other ranks step
        A, B = self.matrix(state.block, state.block.tensors).shape[-2:]
        found = [spread(N, (A, B)) for N in state["size"].reshape(-1).tolist()]
        return [f"{A:,} output{'s' * (A != 1)}: steps × {times:.2g}" if times >= 1.05 else "" for times in found]

    def map(self, state: State) -> LinearMap:
        like, stacked = state.block.tensors, isinstance(state.block, Stack)
        matrix = self.matrix(state.block, like)
        length = lengths(state, matrix.shape[-2:], self.gain)
        s = torch.where(state["norm"] > 0, length / state["norm"], 0.0)
        return Scaled(Augmented(root_of(state).map(state, matrix), like, self.is_turned(state.block), stacked), s.sqrt())
