r"""Linear maps p = P z on tuples of tensors.

A preconditioner *is* such a map (Ye, eq. 4): gradients are pulled back by Pᵀ, steps are pushed forward by P,
and ``gram`` is M = P Pᵀ, what a preconditioned step applies to the gradient (eq. 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from precond import vec
from precond.vec import Vec


class LinearMap(ABC):
    """A linear map P on the space of a tuple of tensors.

    ``mv`` is P z, ``rmv`` Pᵀg, ``solve`` P⁻¹p, ``rsolve`` P⁻ᵀy, ``gram`` P Pᵀ g; ``P.T`` and ``P @ Q`` are maps again.

    Attributes:
        root: whether P itself is stated. Where only M = P Pᵀ is known, P is one of many roots, and whatever
            depends on the root (a 1-norm in z) is refused.
        diagonal: whether P acts entry by entry.
        like: an example of the vectors that P acts on, or None where the map takes any shape.
    """

    root: bool = True
    diagonal: bool = False
    like: Vec | None = None

    @abstractmethod
    def mv(self, v: Vec) -> Vec:
        """P v."""

    @abstractmethod
    def rmv(self, v: Vec) -> Vec:
        """Pᵀ v."""

    def solve(self, v: Vec) -> Vec:
        """P⁻¹ v."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse; use a preconditioner whose map is invertible")

    def rsolve(self, v: Vec) -> Vec:
        """P⁻ᵀ v."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse; use a preconditioner whose map is invertible")

    def gram(self, v: Vec) -> Vec:
        """P Pᵀ v = M v."""
        return self.mv(self.rmv(v))

    def damped(self, delta: float) -> LinearMap:
        r"""The map whose Gram matrix is (M⁻¹ + δ·d̄·I)⁻¹, d̄ the mean of M⁻¹'s eigenvalues; its root is P(I + δd̄PᵀP)^(−1/2).

        It bounds how far a penalty in z reaches along directions in which M is huge.
        """
        if delta == 0:
            return self
        raise NotImplementedError(f"{type(self).__name__} has no damped form; set damping=0 in the regularizer")

    @property
    def T(self) -> LinearMap:
        """The transpose."""
        return Transposed(self)

    def __matmul__(self, other: LinearMap) -> LinearMap:
        if not isinstance(other, LinearMap):
            return NotImplemented
        return compose(self, other)

    def to_dense(self) -> Tensor:
        """The matrix of P in the order of :func:`precond.vec.flatten`, shape (n, n)."""
        if self.like is None:
            raise ValueError(f"{type(self).__name__} takes vectors of any shape; give it `like` to make it dense")
        n = sum(t.numel() for t in self.like)
        flat = vec.flatten(self.like)
        matrix = torch.eye(n, dtype=flat.dtype, device=flat.device)
        for j, e in enumerate(matrix.clone()):
            matrix[:, j] = vec.flatten(self.mv(vec.unflatten(e, self.like)))
        return matrix


class Transposed(LinearMap):
    """Pᵀ."""

    def __init__(self, map: LinearMap):
        self.map, self.like, self.root, self.diagonal = map, map.like, map.root, map.diagonal

    def mv(self, v: Vec) -> Vec:
        return self.map.rmv(v)

    def rmv(self, v: Vec) -> Vec:
        return self.map.mv(v)

    def solve(self, v: Vec) -> Vec:
        return self.map.rsolve(v)

    def rsolve(self, v: Vec) -> Vec:
        return self.map.solve(v)

    @property
    def T(self) -> LinearMap:
        return self.map


class Identity(LinearMap):
    """P = I."""

    diagonal = True

    def __init__(self, like: Vec | None = None):
        self.like = like

    def mv(self, v: Vec) -> Vec:
        return v

    rmv = solve = rsolve = gram = mv

    def damped(self, delta: float) -> LinearMap:
        # (1 + δ)⁻¹ I: kept, so that one rule holds for all maps.
        return self if delta == 0 else Scaled(self, (1 + delta) ** -0.5)

    @property
    def T(self) -> LinearMap:
        return self


class Scaled(LinearMap):
    """P = s·Q with a number s > 0."""

    def __init__(self, map: LinearMap, s: float):
        self.map, self.s, self.like, self.root, self.diagonal = map, s, map.like, map.root, map.diagonal

    def mv(self, v: Vec) -> Vec:
        return vec.scale(self.map.mv(v), self.s)

    def rmv(self, v: Vec) -> Vec:
        return vec.scale(self.map.rmv(v), self.s)

    def solve(self, v: Vec) -> Vec:
        return vec.scale(self.map.solve(v), 1 / self.s)

    def rsolve(self, v: Vec) -> Vec:
        return vec.scale(self.map.rsolve(v), 1 / self.s)

    def gram(self, v: Vec) -> Vec:
        return vec.scale(self.map.gram(v), self.s**2)

    def damped(self, delta: float) -> LinearMap:
        return Scaled(self.map.damped(delta), self.s)


class Diagonal(LinearMap):
    """P = diag(d), d a tuple of tensors of the parameters' shapes.

    Example:
        >>> Diagonal((torch.tensor([2.0, 4.0]),)).gram((torch.tensor([1.0, 1.0]),))
        (tensor([ 4., 16.]),)
    """

    diagonal = True
    holes = True  # some entries may be 0

    def __init__(self, d: Vec):
        self.d = self.like = d

    @cached_property
    def denominator(self) -> Vec:
        """The diagonal of M⁻¹ = diag(d)⁻²."""
        return vec.map_(lambda d: d**-2, self.d)

    def mv(self, v: Vec) -> Vec:
        return vec.mul(self.d, v)

    rmv = mv

    def solve(self, v: Vec) -> Vec:
        return vec.div(v, self.d)

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return vec.mul(self.d, vec.mul(self.d, v))

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if not self.holes:
            return InverseRoot(tuple(h.add(h.mean(), alpha=delta) if h.numel() else h for h in self.denominator), holes=False)
        return InverseRoot(vec.map_(lambda h: h + delta * _mean(h, h.isfinite()), self.denominator))

    @property
    def T(self) -> LinearMap:
        return self


class InverseRoot(Diagonal):
    """P = diag(h^(−1/2)), given by the denominator h of M = diag(1/h). Where h = ∞, P is 0, and so is P⁻¹ by convention.

    M v is one division, so that g/(√r + ε) comes out as torch.optim rounds it; the root is taken only when asked for.

    Args:
        denominator: h, tensors of the parameters' shapes.
        holes: whether some h may be ∞.
    """

    def __init__(self, denominator: Vec, holes: bool = True):
        self.denominator = self.like = denominator  # type: ignore[misc]
        self.holes = holes

    @cached_property
    def d(self) -> Vec:  # type: ignore[override]
        return tuple(torch._foreach_rsqrt(self.denominator)) if self.denominator else ()

    def solve(self, v: Vec) -> Vec:
        return tuple(torch.where(h.isinf(), 0, x * h.sqrt()) for x, h in zip(v, self.denominator, strict=True))

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return vec.div(v, self.denominator)


class Dense(LinearMap):
    """P as an explicit (n, n) matrix on all entries in order, row-major."""

    def __init__(self, matrix: Tensor, like: Vec | None = None):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Dense: matrix must be square, got shape {tuple(matrix.shape)}")
        self.matrix, self.like = matrix, like

    @cached_property
    def _lu(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.lu_factor(self.matrix)

    def _apply(self, f, v: Vec) -> Vec:
        flat = vec.flatten(v)
        if flat.numel() != self.matrix.shape[0]:
            raise ValueError(
                f"Dense: the matrix has {self.matrix.shape[0]} rows, the parameters have {flat.numel()} entries; "
                "give a matrix for all entries of all parameters in order"
            )
        return vec.unflatten(f(flat.to(self.matrix.dtype)).to(flat.dtype), v)

    def mv(self, v: Vec) -> Vec:
        return self._apply(lambda x: self.matrix @ x, v)

    def rmv(self, v: Vec) -> Vec:
        return self._apply(lambda x: self.matrix.T @ x, v)

    def solve(self, v: Vec) -> Vec:
        return self._apply(lambda x: torch.linalg.lu_solve(*self._lu, x[:, None])[:, 0], v)

    def rsolve(self, v: Vec) -> Vec:
        return self._apply(lambda x: torch.linalg.lu_solve(*self._lu, x[:, None], adjoint=True)[:, 0], v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        s, V = torch.linalg.eigh(self.matrix.T @ self.matrix)
        absolute = delta * _mean_inverse(s)
        return Dense(self.matrix @ (V * (1 + absolute * s) ** -0.5) @ V.T, self.like)

    @property
    def T(self) -> LinearMap:
        return Dense(self.matrix.T, self.like)

    def to_dense(self) -> Tensor:
        return self.matrix


class GramOnly(LinearMap):
    """A map known by M = P Pᵀ alone, a symmetric (n, n) matrix: what needs a root of it is refused."""

    root = False

    def __init__(self, gram: Tensor, like: Vec | None = None):
        self._gram, self.like = Dense(gram, like), like

    def _refuse(self, v: Vec) -> Vec:
        raise ValueError(
            "this preconditioner states M = P Pᵀ and no root P; give the root, Fixed(Dense(P)), where one is needed"
        )

    mv = rmv = solve = rsolve = _refuse

    def gram(self, v: Vec) -> Vec:
        return self._gram.mv(v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        m, V = torch.linalg.eigh(self._gram.matrix)
        return GramOnly((V * (m / (1 + delta * _mean_inverse(m) * m))) @ V.T, self.like)

    def to_dense(self) -> Tensor:
        raise ValueError("this map states M = P Pᵀ and no root P")


class Kronecker(LinearMap):
    """P = A ⊗ B on one tensor W, seen row-major as a matrix (out, rest): P vec(W) = vec(A W Bᵀ).

    None stands for the identity on that side.
    """

    def __init__(self, A: Tensor | None, B: Tensor | None, like: Vec | None = None):
        self.A, self.B, self.like = A, B, like

    @staticmethod
    def _sides(W: Tensor) -> tuple[int, int]:
        return (W.shape[0], W.shape[1:].numel()) if W.ndim else (1, 1)

    @staticmethod
    def _apply(v: Vec, left: Tensor | None, right: Tensor | None, op=torch.matmul) -> Vec:
        (W,) = v
        X = W.reshape(Kronecker._sides(W))
        if left is not None:
            X = op(left, X)
        if right is not None:
            X = op(right, X.T).T
        return (X.reshape(W.shape),)

    def mv(self, v: Vec) -> Vec:
        return self._apply(v, self.A, self.B)

    def rmv(self, v: Vec) -> Vec:
        return self._apply(v, *(None if X is None else X.T for X in (self.A, self.B)))

    def solve(self, v: Vec) -> Vec:
        return self._apply(v, self.A, self.B, torch.linalg.solve)

    def rsolve(self, v: Vec) -> Vec:
        return self._apply(v, *(None if X is None else X.T for X in (self.A, self.B)), torch.linalg.solve)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if self.like is None:
            raise ValueError("Kronecker: give `like` to damp it")
        (W,) = self.like
        sides = []
        for X, n in zip((self.A, self.B), self._sides(W), strict=True):
            sides.append(torch.linalg.eigh(X.T @ X) if X is not None else (W.new_ones(n), None))
        (a, U), (b, V) = sides
        s = a[:, None] * b[None, :]
        h = (1 + delta * _mean_inverse(s) * s).reshape(W.shape)
        rotation = Kronecker(U, V, self.like)
        return self @ rotation @ InverseRoot((h,)) @ rotation.T


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

    def __init__(self, R: Tensor, like: Vec, layout: Layout, gram_matrix: Tensor | None = None):
        self.R, self.like, self.layout, self._gram = R, like, layout, gram_matrix

    def _rows(self, v: Vec, f: Callable[[Tensor], Tensor]) -> Vec:
        return (self.layout.back(f(self.layout.view(v[0])), v[0]), *v[1:])

    def mv(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: W @ self.R.mT)

    def rmv(self, v: Vec) -> Vec:
        return self._rows(v, lambda W: W @ self.R)

    def gram(self, v: Vec) -> Vec:
        return super().gram(v) if self._gram is None else self._rows(v, lambda W: W @ self._gram)

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
        for w, b, rows, block in self.parts:
            found = getattr(block, method)((v[w],) if b is None else (v[w], v[b][rows]))
            out[w] = found[0]
            if b is not None:
                out[b][rows] = found[1]
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


class Product(LinearMap):
    """P = P₁P₂: p = P₁z₁, z₁ = P₂z₂."""

    def __init__(self, outer: LinearMap, inner: LinearMap):
        self.outer, self.inner = outer, inner
        self.like = outer.like if outer.like is not None else inner.like
        self.root, self.diagonal = outer.root and inner.root, outer.diagonal and inner.diagonal

    def mv(self, v: Vec) -> Vec:
        return self.outer.mv(self.inner.mv(v))

    def rmv(self, v: Vec) -> Vec:
        return self.inner.rmv(self.outer.rmv(v))

    def solve(self, v: Vec) -> Vec:
        return self.inner.solve(self.outer.solve(v))

    def rsolve(self, v: Vec) -> Vec:
        return self.outer.rsolve(self.inner.rsolve(v))

    def gram(self, v: Vec) -> Vec:
        return self.outer.mv(self.inner.gram(self.outer.rmv(v)))

    def damped(self, delta: float) -> LinearMap:
        # In the coordinates of the outer map: there the entries live whose tiny denominators the damping is for.
        return self if delta == 0 else self.outer @ self.inner.damped(delta)


class BlockDiagonal(LinearMap):
    """Maps side by side: each acts on the tensors at its own positions.

    Args:
        blocks: pairs (positions, map).
        like: example of all tensors.
        rest: the map of the tensors at positions that none names, one that takes any shape; None: they are left as they are.
    """

    def __init__(
        self, blocks: Sequence[tuple[Sequence[int], LinearMap]], like: Vec | None = None, rest: LinearMap | None = None
    ):
        self.blocks, self.like = tuple((tuple(i), m) for i, m in blocks), like
        self.rest = Identity() if rest is None else rest
        self.root = all(m.root for _, m in self.blocks)
        self.diagonal = all(m.diagonal for _, m in self.blocks)

    def _each(self, method: str, v: Vec) -> Vec:
        out = list(getattr(self.rest, method)(v))
        for positions, block in self.blocks:
            for i, t in zip(positions, getattr(block, method)(tuple(v[i] for i in positions)), strict=True):
                out[i] = t
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
        return BlockDiagonal([(i, m.damped(delta)) for i, m in self.blocks], self.like, self.rest.damped(delta))

    @property
    def T(self) -> LinearMap:
        return BlockDiagonal([(i, m.T) for i, m in self.blocks], self.like, self.rest.T)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """The mean of the entries of x for which a condition holds; 0 where it holds for none."""
    return torch.where(where, x, 0).sum() / where.sum().clamp_min(1)


def _mean_inverse(s: Tensor) -> Tensor:
    """The mean of 1/s over the eigenvalues that are not zero to rounding."""
    zero = s.amax() * max(s.shape) * torch.finfo(s.dtype).eps if s.numel() else 0.0
    return _mean(1 / s, s > zero)


def compose(a: LinearMap, b: LinearMap) -> LinearMap:
    """P = a b in the simplest form: identities vanish, diagonals and dense matrices are multiplied out."""
    if isinstance(a, Identity):
        return b
    if isinstance(b, Identity):
        return a
    match a, b:
        case Diagonal(), Diagonal():
            return Diagonal(vec.mul(a.d, b.d))
        case Dense(), Dense():
            return Dense(a.matrix @ b.matrix, a.like or b.like)
        case Dense(), Diagonal():
            return Dense(a.matrix * vec.flatten(b.d), b.like)
        case Diagonal(), Dense():
            return Dense(vec.flatten(a.d)[:, None] * b.matrix, a.like)
    return Product(a, b)


def block_diagonal(blocks: Sequence[tuple[Sequence[int], LinearMap]], like: Vec) -> LinearMap:
    """A block-diagonal map, or its only block where that block covers everything in order."""
    if len(blocks) == 1 and tuple(blocks[0][0]) == tuple(range(len(like))):
        return blocks[0][1]
    return BlockDiagonal(blocks, like)
