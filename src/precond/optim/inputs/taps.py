"""Where the inputs of a parameter are seen: one class per kind of layer of the H_e S H_eᵀ form (Ye, Theorem 3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from precond.algebra.maps import Layout
from precond.optim.inputs.moments import Moments, Request, Rows, of_samples
from precond.optim.inputs.reading import argument, is_called_as, plain


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
    slot: Any = 0


class Tap(ABC):
    """A module whose inputs are seen by a forward pre-hook.

    A call is read once (:meth:`read`), whatever is then asked of it.

    Args:
        module: the layer.

    Example:
        >>> import torch, precond
        >>> from precond.optim.inputs import Tap, Weight
        >>> class Shifted(torch.nn.Linear):  # W (x + 1) + b
        ...     def forward(self, x):
        ...         return super().forward(x + 1)
        >>> class ShiftedTap(Tap):
        ...     @property
        ...     def weights(self):
        ...         return [Weight(self.module.weight, self.module.bias)]
        ...
        ...     def read(self, args, kwargs):
        ...         return args[0] + 1
        ...
        ...     def rows(self, seen, weight):
        ...         return seen.reshape(1, -1, seen.shape[-1])
        >>> handle, model = precond.register_layer(Shifted, tap=ShiftedTap), Shifted(1, 1)
        >>> with precond.optim.inputs.observe(model, "moments") as observation:
        ...     _ = model(torch.tensor([[1.0], [3.0]]))
        ...     print(observation.collect()[model.weight].mean.item())
        3.0
        >>> handle.remove()
    """

    def __init__(self, module: nn.Module):
        self.module: Any = module

    @property
    @abstractmethod
    def weights(self) -> list[Weight]:
        """The weights that act on its inputs."""

    @property
    def refused(self) -> list[tuple[Tensor, str]]:
        """Weights of the module whose inputs are not seen, and why; for those in :attr:`weights` too it wins."""
        return []

    def answers(self, request: Request) -> bool:
        """Whether it has the statistics of a request."""
        return True

    def layout(self, weight: Weight, request: Request) -> Layout:
        """How a weight is seen by the statistics of a request."""
        return Layout()

    @abstractmethod
    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call shows, in whatever form; None where that is nothing.

        Raises:
            Unreadable: where it cannot be read; so may the methods that are given it.
        """

    @abstractmethod
    def rows(self, seen: Any, weight: Weight) -> Rows:
        """All inputs that a row of the weight meets in a call, shape (groups, N, n), or of each group its own (N, n)."""

    def pieces(self, seen: Any, weight: Weight) -> Iterator[Rows]:
        """The same in pieces that fit in memory."""
        yield self.rows(seen, weight)

    def origin(self, seen: Any, weight: Weight) -> Tensor | str:
        """The tensor that the rows are made of, with its graph, or what they are, in words."""
        return seen

    def examples(self, seen: Any) -> int | None:
        """How many examples a call shows, where its rows resemble each other within one; None: each row is one."""
        return None

    def moments(self, seen: Any, weight: Weight, request: Request, center: Tensor | None) -> Moments | None:
        """Moments of these inputs; None where there are none."""
        return of_samples(self.rows(seen, weight), request.kind, center, self.examples(seen))


class LinearTap(Tap):
    """``nn.Linear`` with any leading dimensions, and its subclasses with any arguments."""

    base: type[nn.Module] = nn.Linear

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self.module.weight, self.module.bias)]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        n = self.module.weight.shape[1]
        if is_called_as(self.module, self.base):
            x = plain(args[0] if args else kwargs.get("input"))
        else:
            x = plain(argument(self.module, args, kwargs, lambda t: t.shape[-1] == n))
        return x if x is None or x.shape[-1:] == (n,) else None  # a call of another shape raises by itself

    def rows(self, seen: Tensor, weight: Weight) -> Tensor:
        return seen.detach().reshape(1, -1, seen.shape[-1])
