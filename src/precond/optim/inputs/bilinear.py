"""Inputs of ``nn.Bilinear``: x₁ᵀW x₂ is linear in W, with the products of all pairs of features as its inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from precond.optim.inputs.reading import Unreadable, called_with, is_called_as, plain
from precond.optim.inputs.taps import Tap, Weight

_MOST = 4096  # products of which statistics are kept


class BilinearTap(Tap):
    """A weight (out, in₁, in₂), whose rows meet x₁ ⊗ x₂."""

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self.module.weight, self.module.bias)]

    @property
    def refused(self) -> list[tuple[Tensor, str]]:
        n = self.module.weight.shape[1:].numel()
        return [(self.module.weight, f"is bilinear with {n:,} products of inputs, more than {_MOST:,}")] if n > _MOST else []

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        named = called_with(self.module, args, kwargs)
        names = ("input1", "input2")
        if not is_called_as(self.module, nn.Bilinear) and not all(isinstance(named.get(name), Tensor) for name in names):
            raise Unreadable(f"is in a {type(self.module).__name__}, whose forward was given no input1 and input2")
        a, b = (plain(named.get(name)) for name in names)
        return None if a is None or b is None else (a, b)

    def origin(self, seen: tuple[Tensor, Tensor], weight: Weight) -> str:
        return "products"

    def rows(self, seen: tuple[Tensor, Tensor], weight: Weight) -> Tensor:
        a, b = (x.detach().reshape(-1, x.shape[-1]) for x in seen)
        return (a[:, :, None] * b[:, None, :]).reshape(1, len(a), -1)
