"""Products of rows with the root R that Whitening keeps, as kernels take them: in place, in the precision of products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

_PANEL = 192  # columns of a triangular factor that are multiplied at once


class Factor(ABC):
    """R of one group of rows, in one dtype; ``out`` is of the shape of X, and not X."""

    @abstractmethod
    def times(self, X: Tensor, out: Tensor) -> Tensor:
        """X R in ``out``."""

    @abstractmethod
    def back(self, X: Tensor, out: Tensor) -> Tensor:
        """X Rᵀ in ``out``."""

    @abstractmethod
    def gram(self, X: Tensor, out: Tensor) -> Tensor:
        """X R Rᵀ in ``out``."""

    def left(self, X: Tensor) -> Tensor:
        """R X."""
        return self.back(X.T, torch.empty_like(X.T, memory_format=torch.contiguous_format)).T


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

    def gram(self, X: Tensor, out: Tensor) -> Tensor:
        return torch.mm(X, self._gram, out=out)


@dataclass(eq=False)
class SpikedFactor(Factor):
    """R = aI + U·diag(s − a)·Uᵀ.

    Attributes:
        U: (n, r).
        once, twice: (r, n), diag(1 − s/a)·Uᵀ and diag(1 − s²/a²)·Uᵀ.
        a: the eigenvalue of all that is orthogonal to U.
    """

    U: Tensor
    once: Tensor
    twice: Tensor
    a: float

    def times(self, X: Tensor, out: Tensor) -> Tensor:
        return self._less(X, self.once, self.a, out)

    back = times

    def gram(self, X: Tensor, out: Tensor) -> Tensor:
        return self._less(X, self.twice, self.a**2, out)

    def _less(self, X: Tensor, rows: Tensor, scale: float, out: Tensor) -> Tensor:
        torch.mm(X @ self.U, rows, out=out)
        return torch.sub(X, out, out=out).mul_(scale)


@dataclass
class Factors:
    """R of each group, made again where it was renewed.

    Attributes:
        narrow: whether products are in bfloat16, not in R's own dtype.
    """

    narrow: bool
    _version: int = -1
    _made: Sequence[Factor] = ()

    def __call__(self, state: Mapping[str, Tensor]) -> Sequence[Factor]:
        if self._version != (version := root_version(state)):
            self._version, self._made = version, factors(state, torch.bfloat16 if self.narrow else state["mean"].dtype)
        return self._made


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
    found: list[Factor] = []
    if "basis" not in state:
        return found
    for U, s, a in zip(state["basis"], state["leading"], state["rest"], strict=True):
        ratio = s / a
        once, twice = ((1 - x)[:, None] * U.T for x in (ratio, ratio.square()))
        found.append(SpikedFactor(U.to(dtype), once.to(dtype), twice.to(dtype), float(a)))
    return found
