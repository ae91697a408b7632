"""Inputs of grouped experts: weights (E, out, in), of which each sees the rows that are routed to its expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra.maps import ExpertLayout, Layout
from precond.optim.inputs.moments import Request, Rows
from precond.optim.inputs.reading import Unreadable, called_with, plain
from precond.optim.inputs.taps import Tap, Weight


def routed(
    x: Tensor,
    *,
    counts: Tensor | None = None,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    experts: int | None = None,
) -> tuple[Tensor, ...]:
    """The rows of x that each expert sees, in one of three forms: for ``inputs`` of :class:`~precond.Observed`.

    Args:
        x: (N, n), in the order of experts with ``counts`` and ``offsets``; rows beyond the last expert's belong to none.
        counts: (E,), how many rows each expert has.
        offsets: (E,), where the rows of each expert end, as ``torch.nn.functional.grouped_mm`` takes them.
        index: (N,) or (N, k), the experts of each row; numbers that are no expert's are passed by.
        experts: E, with ``index``.

    Returns:
        E tensors (rows of the expert, n), in the order of experts; one that sees nothing has (0, n).

    Raises:
        ValueError: for none of the three forms, or several.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> [rows.flatten().tolist() for rows in routed(x, counts=torch.tensor([2, 0, 1]))]
        [[1.0, 2.0], [], [3.0]]
        >>> [rows.flatten().tolist() for rows in routed(x, index=torch.tensor([[0, 1], [1, 0], [1, 2]]), experts=3)]
        [[1.0, 2.0], [1.0, 2.0, 3.0], [3.0]]
    """
    if [counts is None, offsets is None, index is None].count(False) != 1 or (index is None) != (experts is None):
        raise ValueError("routed: give counts, or offsets, or index and experts")
    if index is not None:
        rows, order = index.reshape(len(x), -1), index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(index.reshape(-1).clamp(-1, experts) + 1, minlength=experts + 2)  # type: ignore[operator]
        before, *numbers, _ = counts.tolist()
        x = x[order[before:] // rows.shape[1]]
    else:
        numbers = counts.tolist() if counts is not None else offsets.diff(prepend=offsets.new_zeros(1)).tolist()  # type: ignore[union-attr]
    return tuple(x[: sum(numbers)].split(numbers))


def is_hf_experts(module: nn.Module) -> bool:
    """Whether it has what Hugging Face's experts with gates have: two stacks of weights, and a gate between."""
    stacks = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    known = all(hasattr(module, name) for name in ("num_experts", "_apply_gate", "is_transposed", "has_bias"))
    return known and all(isinstance(p, Tensor) and p.ndim == 3 for p in stacks)


class HFExpertsTap(Tap):
    """Experts of Hugging Face's models: ``down_proj((gate, up of gate_up_proj))``; what ``down_proj`` sees is computed once more."""

    @property
    def weights(self) -> list[Weight]:
        m = self.module
        bias = lambda name: getattr(m, f"{name}_bias", None) if m.has_bias else None  # noqa: E731
        return [Weight(getattr(m, name), bias(name), slot=name) for name in ("gate_up_proj", "down_proj")]

    def layout(self, weight: Weight, request: Request) -> Layout:
        return ExpertLayout(weight.param.shape[0], self.module.is_transposed)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed | None:
        m = self.module
        if getattr(m, "_is_expert_parallel", False):
            raise Unreadable("is divided among processes by experts")
        x, index = list(called_with(m, args, kwargs).values())[:2]
        x = plain(x)
        return None if x is None else Routed(m, x, index)

    def origin(self, seen: Routed, weight: Weight) -> Tensor | str:
        return seen.x if weight.slot == "gate_up_proj" else "gates"

    def rows(self, seen: Routed, weight: Weight) -> Rows:
        return seen.parts if weight.slot == "gate_up_proj" else seen.gated


@dataclass(frozen=True, eq=False)
class Routed:
    """A call of experts: rows, and the experts of each."""

    module: Any
    x: Tensor
    index: Tensor

    @cached_property
    def parts(self) -> tuple[Tensor, ...]:
        """What each expert sees."""
        x = self.x.detach()
        return routed(x.reshape(-1, x.shape[-1]), index=self.index, experts=self.module.num_experts)

    @cached_property
    @torch.no_grad()
    def gated(self) -> tuple[Tensor, ...]:
        """What its second weight sees."""
        m = self.module
        weight = m.gate_up_proj if m.is_transposed else m.gate_up_proj.mT
        products = [x.to(weight.dtype) @ W for x, W in zip(self.parts, weight, strict=True)]
        if m.has_bias:
            products = [y + b for y, b in zip(products, m.gate_up_proj_bias, strict=True)]
        return tuple(m._apply_gate(y) for y in products)
