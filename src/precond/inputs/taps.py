"""Where the inputs of a parameter are seen: one class per kind of layer of the H_e S H_eᵀ form (Ye, Theorem 3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from precond.inputs.moments import Moments, Request, covariance, of_rows
from precond.maps import Layout


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of a tap with the part of a bias that goes with it.

    Attributes:
        param: the weight.
        bias: its bias, or None.
        rows: which entries of the bias are its own.
        slot: which of the tap's inputs it sees, for the tap's own use.
    """

    param: Tensor
    bias: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    slot: int = 0


class Tap(ABC):
    """A module whose inputs are seen by a forward pre-hook."""

    def __init__(self, module: nn.Module):
        self.module: Any = module

    @property
    @abstractmethod
    def weights(self) -> list[Weight]:
        """The weights that act on its inputs."""

    def layout(self, weight: Weight, request: Request) -> Layout:
        """How a weight is seen by the statistics of a request."""
        return Layout()

    def examples(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """How many examples a call shows, where its rows resemble each other within one; None: each row is one."""
        return None

    @abstractmethod
    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight) -> Tensor:
        """All inputs that a row of the weight meets in a call, shape (groups, N, n)."""

    def moments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight, request: Request, center: Tensor | None
    ) -> Moments:
        """Moments of these inputs."""
        x = self.rows(args, kwargs, weight).detach()
        of = covariance if request.kind == "covariance" else of_rows
        return of(x, center, self.examples(args, kwargs))


class LinearTap(Tap):
    """``nn.Linear`` with any leading dimensions."""

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self.module.weight, self.module.bias)]

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight) -> Tensor:
        x = args[0] if args else kwargs["input"]
        return x.reshape(1, -1, x.shape[-1])
