"""What a linear map is, and the simplest ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.vec import Scalar, Vec


class LinearMap(ABC):
    """A linear map P on the space of a tuple of tensors.

    ``mv`` is P z, ``rmv`` Pᵀg, ``solve`` P⁻¹p, ``rsolve`` P⁻ᵀy, ``gram`` P Pᵀ g, ``gram_solve`` its inverse;
    ``P.T`` and ``P @ Q`` are maps again.

    Attributes:
        root: whether P itself is stated. Where only M = P Pᵀ is known, P is one of many roots, and whatever
            depends on the root (a 1-norm in z) is refused.
        diagonal: whether P acts entry by entry.
        from_left: whether P acts on each tensor as a matrix, from the left alone: it mixes no columns.
        like: an example of the vectors that P acts on, or None where the map takes any shape.

    Example:
        >>> import torch, precond
        >>> class Reversed(precond.LinearMap):  # P z = z in the other order, which is its own transpose and inverse
        ...     def mv(self, v):
        ...         return tuple(t.flip(0) for t in v)
        ...
        ...     rmv = solve = rsolve = mv
        >>> P = Reversed() @ precond.Diagonal((torch.tensor([1.0, 10.0]),))
        >>> P.mv((torch.tensor([1.0, 1.0]),)), P.T.mv((torch.tensor([1.0, 1.0]),))
        ((tensor([10.,  1.]),), (tensor([ 1., 10.]),))

    References:
        Ye, eqs. (4), (5).
    """

    root: bool = True
    diagonal: bool = False
    from_left: bool = False
    like: Vec | None = None

    @abstractmethod
    def mv(self, v: Vec) -> Vec:
        """P v."""

    @abstractmethod
    def rmv(self, v: Vec) -> Vec:
        """Pᵀ v."""

    def solve(self, v: Vec) -> Vec:
        """P⁻¹ v; where the map knows what it takes to 0, the pseudo-inverse P⁺v: P P⁺v is the part of v that P reaches."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse; use a preconditioner whose map is invertible")

    def rsolve(self, v: Vec) -> Vec:
        """P⁻ᵀ v, or the transposed pseudo-inverse."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse; use a preconditioner whose map is invertible")

    def gram(self, v: Vec) -> Vec:
        """P Pᵀ v = M v."""
        return self.mv(self.rmv(v))

    def gram_solve(self, v: Vec) -> Vec:
        """P⁻ᵀ P⁻¹ v = M⁻¹ v, which is known also where M alone is stated."""
        return self.rsolve(self.solve(v))

    def conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        """P Λ P⁻¹ v, with Λ one number for each tensor; where they are all one, Λ v, which asks for no root.

        Args:
            v: one tensor each.
            scales: the numbers.
        """
        return vec.scale(v, scales) if not v or vec.uniform(scales) else self._conjugated(v, scales)

    def _conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        """The same where the numbers differ."""
        return self.mv(vec.scale(self.solve(v), scales))

    def add_to(self, p: Vec, v: Vec, keep: float, by: float) -> None:
        """p ← keep·p + by·P v, in place."""
        if keep != 1:
            torch._foreach_mul_(p, keep)
        torch._foreach_add_(p, self.mv(v), alpha=by)

    def damped(self, delta: float) -> LinearMap:
        r"""The map whose Gram matrix is (M⁻¹ + δ·d̄·I)⁻¹, d̄ the mean of M⁻¹'s eigenvalues.

        Its root is P(I + δd̄PᵀP)^(−1/2) up to signs, or (BNP's arrow) another one in closed form that tends to P with δ.
        It bounds how far a penalty in z reaches along directions in which M is huge.

        Args:
            delta: δ ≥ 0.

        Raises:
            NotImplementedError: where the map has no such form, for δ > 0.
            ValueError: where it needs ``like`` for it, and has none.
        """
        if delta == 0:
            return self
        raise NotImplementedError(f"{type(self).__name__} has no damped form; set damping=0 in the regularizer")

    def bounded(self, t: Scalar) -> LinearMap:
        """The map itself where M's eigenvalues are at most 1/t; else one that is damped until they are, where it has such a form."""
        return self

    @property
    def T(self) -> LinearMap:
        """The transpose."""
        return Transposed(self)

    def __matmul__(self, other: LinearMap) -> LinearMap:
        if not isinstance(other, LinearMap):
            return NotImplemented
        from precond.algebra.maps.composite import compose

        return compose(self, other)

    def to_dense(self) -> Tensor:
        """The matrix of P in the order of :func:`precond.algebra.vec.flatten`, shape (n, n).

        Raises:
            ValueError: where the map has no ``like``, or states no root.
        """
        if self.like is None:
            raise ValueError(f"{type(self).__name__} takes vectors of any shape; give it `like` to make it dense")
        flat = vec.flatten(self.like)
        units = torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        columns = [vec.flatten(self.mv(vec.unflatten(e, self.like))) for e in units]
        return torch.stack(columns, 1) if columns else units


class Transposed(LinearMap):
    """Pᵀ.

    Args:
        map: P.

    Example:
        >>> import torch, precond
        >>> P = precond.Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> Transposed(P).mv((torch.tensor([1.0, 0.0]),))
        (tensor([1., 2.]),)
    """

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


class Piecewise(LinearMap):
    """A map made of maps on pieces of a vector, each of whose operations is that of the pieces."""

    @abstractmethod
    def _each(self, method: str, v: Vec) -> Vec:
        """A method of every piece on its part of v."""

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

    def gram_solve(self, v: Vec) -> Vec:
        return self._each("gram_solve", v)


class Identity(LinearMap):
    """P = I: gradient descent itself.

    Args:
        like: example of the vectors that it acts on, which :meth:`to_dense` needs; None: vectors of any shape.

    Example:
        >>> import torch, precond
        >>> v = (torch.tensor([1.0, 2.0]),)
        >>> precond.Identity().gram(v) is v
        True
    """

    diagonal = True

    def __init__(self, like: Vec | None = None):
        self.like = like

    def mv(self, v: Vec) -> Vec:
        return v

    rmv = solve = rsolve = gram = gram_solve = mv

    def damped(self, delta: float) -> LinearMap:
        # (1 + δ)⁻¹ I: kept, so that one rule holds for all maps.
        return self if delta == 0 else Scaled(self, (1 + delta) ** -0.5)

    @property
    def T(self) -> LinearMap:
        return self


class Scaled(LinearMap):
    """P = s·Q with a number s > 0, or one for each of k tensors side by side, (k,); s itself or s² is given.

    Args:
        map: Q.
        s: the number, or the numbers (k,); None: √``square``.
        square: s², where ``s`` is None: M is scaled by it without a root.

    Example:
        >>> import torch, precond
        >>> precond.Scaled(precond.Identity(), 3.0).gram((torch.tensor([1.0]),))
        (tensor([9.]),)
    """

    def __init__(self, map: LinearMap, s: float | Tensor | None = None, square: float | Tensor = 1.0):
        self.map, self.square = map, square if s is None else s**2
        self.like, self.root, self.diagonal = map.like, map.root, map.diagonal
        if s is not None:
            self.s = s

    @cached_property
    def s(self) -> float | Tensor:
        """s ≥ 0."""
        return self.square**0.5

    def _times(self, v: Vec, s: float | Tensor) -> Vec:
        if not isinstance(s, Tensor) or s.ndim == 0:
            return vec.scale(v, s)
        return tuple(t * s.view(-1, *[1] * (t.ndim - 1)) for t in v)

    def mv(self, v: Vec) -> Vec:
        return self._times(self.map.mv(v), self.s)

    def rmv(self, v: Vec) -> Vec:
        return self._times(self.map.rmv(v), self.s)

    def solve(self, v: Vec) -> Vec:
        return self._times(self.map.solve(v), 1 / self.s)

    def rsolve(self, v: Vec) -> Vec:
        return self._times(self.map.rsolve(v), 1 / self.s)

    def gram(self, v: Vec) -> Vec:
        return self._times(self.map.gram(v), self.square)

    def gram_solve(self, v: Vec) -> Vec:
        return self._times(self.map.gram_solve(v), 1 / self.square)

    def conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        return self.map.conjugated(v, scales)  # s/s, also where s is 0

    def damped(self, delta: float) -> LinearMap:
        return Scaled(self.map.damped(delta), square=self.square)
