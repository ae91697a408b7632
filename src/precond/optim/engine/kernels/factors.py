"""Products of rows with the root R that Whitening keeps, as kernels take them: in place, in the precision of products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

_PANEL = 192  # columns of a triangular factor that are multiplied at once


Made = TypeVar("Made")


@dataclass
class Cached(Generic[Made]):
    """What was made last, until that of which it was made is another."""

    _of: Any = None
    _made: Made | None = None

    def __call__(self, of: Any, make: Callable[[], Made]) -> Made:
        if self._of != of:
            self._of, self._made = of, make()
        return cast(Made, self._made)


class Factor(ABC):
    """R of one group of rows, in one dtype. A product is in ``out``, which is of the shape of X, or in X itself, which it may write over."""

    @abstractmethod
    def times(self, X: Tensor, out: Tensor) -> Tensor:
        """X R."""

    @abstractmethod
    def back(self, X: Tensor, out: Tensor) -> Tensor:
        """X Rᵀ."""

    @abstractmethod
    def gram(self, X: Tensor, out: Tensor) -> tuple[Tensor, float]:
        """(X R Rᵀ, ‖X R‖²)."""

    @abstractmethod
    def onto(self, X: Tensor, out: Tensor) -> Tensor:
        """R X."""

    def left(self, X: Tensor) -> Tensor:
        """R X, X as it was."""
        return self.onto(X.clone(), torch.empty_like(X))


@dataclass(eq=False)
class WholeFactor(Factor):
    """R itself.

    Attributes:
        R: (n, n).
        panels: columns of R; those of a panel have nothing below its end.
    """

    R: Tensor
    panels: Sequence[tuple[int, int]]

    @cached_property
    def _gram(self) -> Tensor:
        return self.R @ self.R.T

    def times(self, X: Tensor, out: Tensor) -> Tensor:
        for a, b in self.panels:
            torch.mm(X[:, :b], self.R[:b, a:b], out=out[:, a:b])
        return out

    def back(self, X: Tensor, out: Tensor) -> Tensor:
        for a, b in self.panels:
            torch.mm(X[:, a:], self.R[a:b, a:].T, out=out[:, a:b])
        return out

    def gram(self, X: Tensor, out: Tensor) -> tuple[Tensor, float]:
        torch.mm(X, self._gram, out=out)
        return out, dot(X, out)

    def onto(self, X: Tensor, out: Tensor) -> Tensor:
        return torch.mm(self.R, X, out=out)


@dataclass(eq=False)
class SpikedFactor(Factor):
    """R = aI + U·diag(s − a)·Uᵀ = a(I − U·diag(1 − s/a)·Uᵀ), R Rᵀ = a²(I − U·diag(1 − s²/a²)·Uᵀ).

    Attributes:
        U: (n, r).
        once, twice: (r,), 1 − s/a and 1 − s²/a².
        a: the eigenvalue of all that is orthogonal to U.
    """

    U: Tensor
    once: Tensor
    twice: Tensor
    a: float

    @classmethod
    def of(cls, U: Tensor, s: Tensor, a: Tensor, dtype: torch.dtype) -> SpikedFactor:
        ratio = s / a
        return cls(U.to(dtype), (1 - ratio).to(dtype), (1 - ratio.square()).to(dtype), float(a))

    def times(self, X: Tensor, out: Tensor) -> Tensor:
        return X.addmm_((X @ self.U).mul_(self.once), self.U.T, beta=self.a, alpha=-self.a)

    back = times

    def gram(self, X: Tensor, out: Tensor) -> tuple[Tensor, float]:
        T, square = X @ self.U, self.a**2
        turned = T * self.twice
        length = square * (dot(X, X) - dot(T, turned))
        return X.addmm_(turned, self.U.T, beta=square, alpha=-square), length

    def onto(self, X: Tensor, out: Tensor) -> Tensor:
        return X.addmm_(self.U * self.once, self.U.T @ X, beta=self.a, alpha=-self.a)


def dot(X: Tensor, Y: Tensor) -> float:
    """⟨X, Y⟩, summed in float32 at least."""
    wide = torch.promote_types(X.dtype, torch.float32)
    return float(torch.dot(X.flatten().to(wide), Y.flatten().to(wide)))


@dataclass
class Factors:
    """R of each group, made again where it was renewed.

    Attributes:
        narrow: whether products are in bfloat16, not in R's own dtype.
    """

    narrow: bool
    _last: Cached[Sequence[Factor]] = field(default_factory=Cached, init=False, repr=False)

    def __call__(self, state: Mapping[str, Tensor]) -> Sequence[Factor]:
        dtype = torch.bfloat16 if self.narrow else state["mean"].dtype
        return self._last(root_version(state), lambda: factors(state, dtype))


def root_version(state: Mapping[str, Tensor]) -> int:
    """A number that changes when the root does."""
    kept = state.get("basis", state.get("factor"))
    return 0 if kept is None else kept._version


def factors(state: Mapping[str, Tensor], dtype: torch.dtype) -> Sequence[Factor]:
    """R of each group, of a state of Whitening; nothing where it is BNP's."""
    if "factor" in state:
        R = state["factor"]
        n = R.shape[-1]
        count = max(1, n // _PANEL) if n >= 2 * _PANEL and not bool(R.tril(-1).any()) else 1
        panels = list(pairwise(n * k // count for k in range(count + 1)))
        return [WholeFactor(r, panels) for r in R.to(dtype)]
    if "basis" not in state:
        return []
    return [SpikedFactor.of(*each, dtype) for each in zip(state["basis"], state["leading"], state["rest"], strict=True)]


def root(state: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
    """R (groups, n, n), in the precision of σ (groups, n); None, the identity, where it is BNP's."""
    if "factor" in state:
        return state["factor"]
    if "basis" not in state:
        return None
    eye = torch.eye(like.shape[-1]).to(like)
    return torch.stack([R.times(eye.clone(), torch.empty_like(eye)) for R in factors(state, eye.dtype)])
