"""Maps on the weight and bias of a layer, every output row alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.maps.base import LinearMap
from precond.maps.diagonal import Diagonal
from precond.vec import Vec


@dataclass(frozen=True)
class Layout:
    """How a weight is seen as (groups, rows, n): the rows of one group see the same n inputs.

    Attributes:
        groups: number of groups.
        transposed: whether the weight has its input dimension first, as transposed convolutions have.
        repeat: kernel positions per channel, over which channel statistics are repeated; 1 where n counts them.
    """

    groups: int = 1
    transposed: bool = False
    repeat: int = 1

    def view(self, weight: Tensor) -> Tensor:
        """The weight as (groups, rows, n)."""
        g = self.groups
        if not self.transposed:
            return weight.reshape(g, weight.shape[0] // g, weight.shape[1:].numel())
        w = weight.reshape(g, weight.shape[0] // g, weight.shape[1], weight.shape[2:].numel())
        return w.transpose(1, 2).flatten(2)

    def back(self, view: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`view`."""
        if not self.transposed:
            return view.reshape(like.shape)
        w = view.reshape(self.groups, like.shape[1], like.shape[0] // self.groups, like.shape[2:].numel())
        return w.transpose(1, 2).reshape(like.shape)

    def spread_out(self, statistic: Tensor) -> Tensor:
        """A statistic per channel as one per input of a row."""
        return statistic.repeat_interleave(self.repeat, -1) if self.repeat > 1 else statistic


class Standardizing(LinearMap):
    r"""BNP's arrow on a layer's (weight, bias) or (weight,): P = U·diag(β, 1/σ), U = [[1, −μᵀ], [0, I]] (eq. 25).

    Per output row: w = z_w/σ, b = βz_b − μᵀw. Acts on every output row alike.

    Args:
        mean: μ, shape (n,), or (groups, n) where rows of different groups see different inputs.
        std: σ, the same shape.
        bias_scale: β.
        like: example (weight, bias) or (weight,).
        layout: how the weight is seen as (groups, rows, n).
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        like: Vec | None = None,
        bias_scale: float | Tensor = 1.0,
        layout: Layout | None = None,
    ):
        self.mean = mean.reshape(mean.shape[:-1].numel(), 1, mean.shape[-1])
        self.std = std.reshape(self.mean.shape)
        self.beta = bias_scale
        self.like = like
        self.layout = Layout(self.mean.shape[0]) if layout is None else layout

    def _split(self, v: Vec) -> tuple[Tensor, Tensor | None]:
        return self.layout.view(v[0]), (v[1].reshape(self.layout.groups, -1, 1) if len(v) > 1 else None)

    def _join(self, W: Tensor, b: Tensor | None, like: Vec) -> Vec:
        W = self.layout.back(W, like[0])
        return (W,) if b is None else (W, b.reshape(like[1].shape))

    def _shift(self, W: Tensor) -> Tensor:
        return (W * self.mean).sum(-1, keepdim=True)

    def mv(self, v: Vec) -> Vec:
        W, b = self._split(v)
        W = W / self.std
        return self._join(W, None if b is None else self.beta * b - self._shift(W), v)

    def rmv(self, v: Vec) -> Vec:
        W, b = self._split(v)
        if b is None:
            return self._join(W / self.std, None, v)
        return self._join((W - b * self.mean) / self.std, self.beta * b, v)

    def solve(self, v: Vec) -> Vec:
        W, b = self._split(v)
        return self._join(W * self.std, None if b is None else (b + self._shift(W)) / self.beta, v)

    def rsolve(self, v: Vec) -> Vec:
        W, b = self._split(v)
        if b is None:
            return self._join(W * self.std, None, v)
        b = b / self.beta
        return self._join(W * self.std + b * self.mean, b, v)

    def gram(self, v: Vec) -> Vec:
        W, b = self._split(v)
        if b is None:
            return self._join(W / self.std.square(), None, v)
        W = (W - b * self.mean) / self.std.square()
        return self._join(W, self.beta**2 * b - self._shift(W), v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if self.like is None:
            raise ValueError("Standardizing: give `like` to damp it")
        variance = self.std.square()
        if len(self.like) == 1:
            return Standardizing(self.mean, (variance + delta * variance.mean()).sqrt(), self.like, layout=self.layout)
        # M⁻¹ + tI per row = [[1/β² + t, μᵀ/β²], [μ/β², σ² + t + μμᵀ/β²]], whose LDLᵀ factors are an arrow and a rank-one change.
        mean, k = self.mean, self.beta**-2
        t = delta * (k + (variance + k * mean.square()).sum(-1, keepdim=True)).mean() / (mean.shape[-1] + 1)
        corner = k + t
        std = (variance + t).sqrt()
        v, c = mean / std, k - k * k / corner
        square = v.square().sum(-1, keepdim=True)
        tau = torch.where(square > 0, (1 - (1 + c * square).rsqrt()) / square, 0)
        arrow = Standardizing(mean * k / corner, std, self.like, torch.as_tensor(corner).rsqrt(), self.layout)
        return arrow @ _RankOne(v, tau, self.like, self.layout)


class _RankOne(Standardizing):
    """w ← (I − τvvᵀ)w for each row of a layer's weight; the bias stays."""

    def __init__(self, v: Tensor, tau: Tensor, like: Vec | None, layout: Layout):
        super().__init__(v, v, like, layout=layout)
        self.tau = tau

    def mv(self, v: Vec) -> Vec:
        W, b = self._split(v)
        return self._join(W - self.tau * self._shift(W) * self.mean, b, v)

    rmv = mv

    def gram(self, v: Vec) -> Vec:
        return self.mv(self.mv(v))

    def solve(self, v: Vec) -> Vec:
        W, b = self._split(v)
        square = self.mean.square().sum(-1, keepdim=True)
        return self._join(W + self.tau / (1 - self.tau * square) * self._shift(W) * self.mean, b, v)

    rsolve = solve

    def damped(self, delta: float) -> LinearMap:
        return LinearMap.damped(self, delta)


class RowMatrix(LinearMap):
    """w ← R w for every row of a layer's weight, rows of different groups with their own R; the bias stays.

    Args:
        R: (groups, n, n).
        like: example (weight, bias) or (weight,).
        layout: how the weight is seen as (groups, rows, n).
        gram_matrix: R Rᵀ, where it is at hand: M then costs one product.
    """

    like: Vec

    def __init__(self, R: Tensor, like: Vec, layout: Layout, gram_matrix: Tensor | None = None):
        self.R, self.like, self.layout, self._gram = R, like, layout, gram_matrix

    def _rows(self, v: Vec, f: Callable[[Tensor], Tensor]) -> Vec:
        return (self.layout.back(f(self.layout.view(v[0])), v[0]), *v[1:])

    def mv(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: W @ self.R.mT)

    def rmv(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: W @ self.R)

    def gram(self, v: Vec) -> Vec:
        known = self._gram
        return super().gram(v) if known is None else self._rows(v, lambda W: W @ known)

    def solve(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: torch.linalg.solve(self.R, W.mT).mT)

    def rsolve(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: torch.linalg.solve(self.R.mT, W.mT).mT)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        s, V = torch.linalg.eigh(self.R.mT @ self.R)
        s = s.clamp_min(torch.finfo(s.dtype).tiny)
        bias = self.layout.groups * self.layout.view(self.like[0]).shape[1] if len(self.like) > 1 else 0
        rows = self.layout.view(self.like[0]).shape[1]
        absolute = delta * ((1 / s).sum() * rows + bias) / (s.numel() * rows + bias)
        inner = RowMatrix(self.R @ (V * (1 + absolute * s).rsqrt()[..., None, :]) @ V.mT, self.like, self.layout)
        if len(self.like) == 1:
            return inner
        ones = tuple(torch.ones_like(t) for t in self.like)
        return inner @ Diagonal((ones[0], ones[1] * (1 + absolute).rsqrt()))


class Sliced(LinearMap):
    """Maps on (weight, part of a bias) pairs of one block: attention's projections share a bias, each owning a slice of it.

    Args:
        parts: (position of the weight, position of the bias or None, its entries, map on (weight, slice) or (weight,)).
        like: example of all tensors of the block.
    """

    def __init__(self, parts: Sequence[tuple[int, int | None, slice, LinearMap]], like: Vec | None = None):
        self.parts, self.like = tuple(parts), like
        self.root = all(m.root for *_, m in parts)

    def _each(self, method: str, v: Vec) -> Vec:
        out = list(v)
        biases = {b for _, b, _, _ in self.parts if b is not None}
        for b in biases:
            out[b] = v[b].clone()
        for weight, bias, rows, block in self.parts:
            found = getattr(block, method)((v[weight],) if bias is None else (v[weight], v[bias][rows]))
            out[weight] = found[0]
            if bias is not None:
                out[bias][rows] = found[1]
        return tuple(out)

    def mv(self, v: Vec) -> Vec:
        return self._each("mv", v)

    def rmv(self, v: Vec) -> Vec:
        return self._each("rmv", v)

    def solve(self, v: Vec) -> Vec:
        return self._each("solve", v)

    def rsolve(self, v: Vec) -> Vec:
        return self._each("rsolve", v)

    def gram(self, v: Vec) -> Vec:
        return self._each("gram", v)

    def damped(self, delta: float) -> LinearMap:
        return Sliced([(w, b, rows, m.damped(delta)) for w, b, rows, m in self.parts], self.like)
