"""Maps on the weight and bias of a layer, every output row alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from precond.algebra.maps.base import LinearMap, Piecewise
from precond.algebra.maps.dense import _mean_inverse
from precond.algebra.maps.diagonal import Diagonal
from precond.algebra.maps.layout import Layout, SideBySide
from precond.algebra.vec import Scalar, Vec


class Standardizing(LinearMap):
    r"""BNP's arrow on a layer's (weight, bias) or (weight,): P = U·diag(β, 1/σ), U = [[1, −μᵀ], [0, I]] (eq. 25).

    Per output row: w = z_w/σ, b = βz_b − μᵀw. Acts on every output row alike.

    Args:
        mean: μ, shape (n,), or (groups, n) where rows of different groups see different inputs.
        std: σ, the same shape.
        bias_scale: β.
        like: example (weight, bias) or (weight,).
        layout: how the weight is seen as (groups, rows, n).

    Example:
        >>> import torch, precond
        >>> P = precond.Standardizing(mean=torch.tensor([3.0]), std=torch.tensor([2.0]))
        >>> P.mv((torch.tensor([[4.0]]), torch.tensor([1.0])))  # w = 4/2, b = 1 − 3·2
        (tensor([[2.]]), tensor([-5.]))

    References:
        Lange, Helfrich & Ye (2022); Ye, eq. (25).
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
        return self.layout.view(v[0]), (self.layout.column(v[1]) if len(v) > 1 else None)

    def _join(self, W: Tensor, b: Tensor | None, like: Vec) -> Vec:
        W = self.layout.back(W, like[0])
        return (W,) if b is None else (W, self.layout.back(b, like[1]))

    @cached_property
    def _mine(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """(μ, σ, β) of the rows that this process holds."""
        beta = self.beta if isinstance(self.beta, float) or self.beta.ndim == 0 else self.layout.mine(self.beta)
        return self.layout.mine(self.mean), self.layout.mine(self.std), beta

    def _shift(self, W: Tensor) -> Tensor:
        return W @ self._mine[0].mT

    def mv(self, v: Vec) -> Vec:
        (W, b), (_, std, beta) = self._split(v), self._mine
        W = W / std
        return self._join(W, None if b is None else beta * b - self._shift(W), v)

    def rmv(self, v: Vec) -> Vec:
        (W, b), (mean, std, beta) = self._split(v), self._mine
        if b is None:
            return self._join(W / std, None, v)
        return self._join(torch.addcmul(W, b, mean, value=-1).div_(std), beta * b, v)

    def solve(self, v: Vec) -> Vec:
        (W, b), (_, std, beta) = self._split(v), self._mine
        return self._join(W * std, None if b is None else (b + self._shift(W)) / beta, v)

    def rsolve(self, v: Vec) -> Vec:
        (W, b), (mean, std, beta) = self._split(v), self._mine
        if b is None:
            return self._join(W * std, None, v)
        b = b / beta
        return self._join(W * std + b * mean, b, v)

    def gram(self, v: Vec) -> Vec:
        (W, b), (mean, std, beta) = self._split(v), self._mine
        if b is None:
            return self._join(W / std.square(), None, v)
        W = torch.addcmul(W, b, mean, value=-1).div_(std.square())
        return self._join(W, beta**2 * b - self._shift(W), v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if self.like is None:
            raise ValueError("Standardizing: give `like` to damp it")
        variance = self.std.square()
        if len(self.like) == 1:
            return self._shifted(delta * self._means(variance))
        mean, k = self.mean, self.beta**-2
        return self._shifted(
            delta * self._means(k + (variance + k * mean.square()).sum(-1, keepdim=True)) / (mean.shape[-1] + 1)
        )

    def _means(self, t: Tensor) -> Tensor:
        """The mean over a layer's groups, as a column where there are several layers."""
        found = self.layout.means(t)
        return found if found.ndim == 0 else found[:, None, None]

    def bounded(self, t: Scalar) -> LinearMap:
        """Damped by the least s for which the eigenvalues of (M⁻¹ + sI)⁻¹ are known to be at most 1/t."""
        largest = self.std.square().amin(-1, keepdim=True).reciprocal()
        if self.like is None or len(self.like) > 1:
            # Of a positive matrix of two blocks the largest eigenvalue is at most the sum of theirs.
            largest = largest + self.beta**2 + (self.mean / self.std).square().sum(-1, keepdim=True)
        s = (t - 1 / largest).clamp_min(0)
        if s.device.type == "cpu" and not bool(s.any()):  # a look costs nothing there
            return self
        return self._shifted(s)

    def _shifted(self, t: Tensor) -> LinearMap:
        """The map whose Gram matrix is (M⁻¹ + tI)⁻¹, t of each group of rows or of all."""
        variance = self.std.square()
        if self.like is not None and len(self.like) == 1:
            return Standardizing(self.mean, (variance + t).sqrt(), self.like, layout=self.layout)
        # M⁻¹ + tI per row = [[1/β² + t, μᵀ/β²], [μ/β², σ² + t + μμᵀ/β²]], whose LDLᵀ factors are an arrow and a rank-one change.
        mean, k = self.mean, self.beta**-2
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
        return self._join(W - self.layout.mine(self.tau) * self._shift(W) * self._mine[0], b, v)

    rmv = mv

    def gram(self, v: Vec) -> Vec:
        return self.mv(self.mv(v))

    def solve(self, v: Vec) -> Vec:
        W, b = self._split(v)
        mean, tau = self._mine[0], self.layout.mine(self.tau)
        square = mean.square().sum(-1, keepdim=True)
        return self._join(W + tau / (1 - tau * square) * self._shift(W) * mean, b, v)

    rsolve = solve

    def damped(self, delta: float) -> LinearMap:
        return LinearMap.damped(self, delta)

    def bounded(self, t: Scalar) -> LinearMap:
        return self


class RowMatrix(LinearMap):
    """w ← R w for every row of a layer's weight, rows of different groups with their own R; the bias stays.

    Args:
        R: (groups, n, n).
        like: example (weight, bias) or (weight,).
        layout: how the weight is seen as (groups, rows, n).
        gram_matrix: R Rᵀ, where it is at hand: M then costs one product.

    Example:
        >>> import torch
        >>> layer, R = (torch.tensor([[1.0, 2.0]]), torch.tensor([5.0])), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> RowMatrix(R, layer, Layout()).mv(layer)
        (tensor([[2., 1.]]), tensor([5.]))
    """

    like: Vec

    def __init__(self, R: Tensor, like: Vec, layout: Layout, gram_matrix: Tensor | None = None):
        self.R, self.like, self.layout, self._gram = R, like, layout, gram_matrix

    @property
    def _mine(self) -> Tensor:
        """R of the groups that this process holds rows of."""
        return self.layout.mine(self.R)

    def _rows(self, v: Vec, f: Callable[[Tensor], Tensor]) -> Vec:
        return (self.layout.back(f(self.layout.view(v[0])), v[0]), *v[1:])

    def mv(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: W @ self._mine.mT)

    def rmv(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: W @ self._mine)

    def gram(self, v: Vec) -> Vec:
        known = self._gram
        return super().gram(v) if known is None else self._rows(v, lambda W: W @ self.layout.mine(known))

    def solve(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: torch.linalg.solve(self._mine, W.mT).mT)

    def rsolve(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: torch.linalg.solve(self._mine.mT, W.mT).mT)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        s, V = torch.linalg.eigh(self.R.mT @ self.R)
        absolute = delta * mean_inverse(s, self.layout, len(self.like) > 1)  # per row of each group
        inner = RowMatrix(self.R @ (V * (1 + absolute * s).rsqrt()[..., None, :]) @ V.mT, self.like, self.layout)
        return beside_bias(inner, self.like, (1 + absolute).rsqrt(), self.layout)


def mean_inverse(s: Tensor, layout: Layout, biased: bool) -> Tensor:
    """The mean inverse eigenvalue of a layer, of s (groups, n) on its rows and 1 on its bias: (1, 1), or (groups, 1) of several layers."""
    members = layout.members if isinstance(layout, SideBySide) else 1
    each = s.unflatten(0, (members, -1)).flatten(1)
    ones = s.new_ones(members, s.shape[0] // members if biased else 0)
    found = _mean_inverse(torch.cat([each, ones], 1), 1)
    return found.repeat_interleave(s.shape[0] // members, 0) if members > 1 else found


def beside_bias(on_rows: LinearMap, like: Vec, scale: Tensor, layout: Layout) -> LinearMap:
    """A map on the rows of a layer's weight with a scale (1, 1) or (groups, 1) of its bias, where it has one."""
    if len(like) == 1:
        return on_rows
    ones = tuple(torch.ones_like(t) for t in like)
    members = layout.members if isinstance(layout, SideBySide) else 1
    of_bias = scale.view(members, -1)[:, :1] if members > 1 else scale.view(())
    return on_rows @ Diagonal((ones[0], ones[1] * of_bias))


class Sliced(Piecewise):
    """Maps on (weight, part of a bias) pairs of one block: attention's projections share a bias, each owning a slice of it.

    Args:
        parts: (position of the weight, position of the bias or None, its entries, map on (weight, slice) or (weight,)).
        like: example of all tensors of the block.

    Example:
        >>> import torch, precond
        >>> q, k, bias = torch.ones(1, 1), torch.ones(1, 1), torch.ones(2)
        >>> parts = [(0, 2, slice(0, 1), precond.Identity()), (1, 2, slice(1, 2), precond.Scaled(precond.Identity(), 3.0))]
        >>> Sliced(parts).mv((q, k, bias))
        (tensor([[1.]]), tensor([[3.]]), tensor([1., 3.]))
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
            found = getattr(block, method)((v[weight],) if bias is None else (v[weight], v[bias][..., rows]))
            out[weight] = found[0]
            if bias is not None:
                out[bias][..., rows] = found[1]
        return tuple(out)

    def damped(self, delta: float) -> LinearMap:
        return Sliced([(w, b, rows, m.damped(delta)) for w, b, rows, m in self.parts], self.like)

    def bounded(self, t: Scalar) -> LinearMap:
        return Sliced([(w, b, rows, m.bounded(t)) for w, b, rows, m in self.parts], self.like)
