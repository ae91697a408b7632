"""Which functions a forward pass calls on which tensors, as it runs: whatever the code of the model looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from precond.analysis.curvature.batches import tensors


@dataclass(frozen=True, eq=False)
class Op:
    """A call that returned a tensor.

    Attributes:
        function: what was called.
        args, kwargs: with what.
        out: what it returned.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor

    @property
    def inputs(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        yield from tensors(self.args)
        yield from tensors(self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class Record(TorchFunctionMode):
    """Collects the calls made inside."""

    def __init__(self):
        super().__init__()
        self.ops: list[Op] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # Attributes (x.shape, x.T of a weight) come this way too; those that are no tensors do not matter.
        for tensor in tensors(out):
            self.ops.append(Op(func, args, kwargs, tensor))
        return out

    def producer(self, x: Tensor, before: int) -> int | None:
        """Position of the call that gave x its value, among those before a position (an in-place call gives it another one)."""
        return next((i for i in range(before - 1, -1, -1) if self.ops[i].out is x), None)

    def readers(self, i: int) -> list[int]:
        """Positions of the calls that read what call i returned, before another one overwrites it."""
        x, found = self.ops[i].out, []
        for j in range(i + 1, len(self.ops)):
            if any(t is x for t in self.ops[j].inputs):
                found.append(j)
            if self.ops[j].out is x:
                break
        return found
