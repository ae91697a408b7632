"""How a weight, a matrix or not, lies as rows that meet the inputs of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How a weight is seen as (groups, rows, n): the rows of one group see the same n inputs.

    Attributes:
        groups: number of groups.
        transposed: whether the weight has its input dimension first, as transposed convolutions have.
        repeat: kernel positions per channel, over which channel statistics are repeated; 1 where n counts them.
        held: of the rows of all groups, those that this process holds, where it does not hold all.
        rows: of a group, where ``held`` is given.

    Example:
        >>> import torch
        >>> W = torch.arange(6.0).view(3, 2)  # (in, out)
        >>> Layout(transposed=True).view(W).shape, Layout(transposed=True).inputs(W.shape)
        (torch.Size([1, 2, 3]), 3)
    """

    groups: int = 1
    transposed: bool = False
    repeat: int = 1
    held: range | None = None
    rows: int = 0

    @property
    def output_dim(self) -> int | None:
        """The dimension of the weight along which whole rows follow each other; None where there is none."""
        return (1 if self.groups == 1 else None) if self.transposed else 0

    @property
    def straight(self) -> bool:
        """Whether a contiguous weight is (groups, rows, n) as it lies in memory, the rows of all groups along its first dimension."""
        return not self.transposed and self.held is None

    def inputs(self, shape: torch.Size) -> int:
        """n, of a weight of some shape."""
        return shape[0] // self.groups * shape[2:].numel() if self.transposed else shape[1:].numel()

    def part(self, held: range, shape: torch.Size) -> Layout:
        """The same for some rows of a weight of some shape: where there are several groups, they may be cut."""
        return self if self.groups == 1 else replace(self, held=held, rows=shape[0] // self.groups)

    @property
    def _met(self) -> tuple[int, int]:
        """The first group that held rows belong to, and the one after the last."""
        assert self.held is not None
        first = self.held.start // self.rows
        return first, (-(-self.held.stop // self.rows) if self.held else first)

    def mine(self, statistic: Tensor) -> Tensor:
        """A statistic (groups, …) of the groups that rows are held of."""
        return statistic if self.held is None else statistic[slice(*self._met)]

    def view(self, weight: Tensor) -> Tensor:
        """The weight as (groups, rows, n); cut groups are filled up with zeros, which no other row notices."""
        if self.held is not None:
            first, last = self._met
            flat = weight.reshape(len(self.held), weight.shape[1:].numel())
            filled = nn.functional.pad(flat, (0, 0, self.held.start - first * self.rows, last * self.rows - self.held.stop))
            return filled.reshape(last - first, self.rows, flat.shape[1])
        g = self.groups
        if not self.transposed:
            return weight.reshape(g, weight.shape[0] // g, weight.shape[1:].numel())
        w = weight.reshape(g, weight.shape[0] // g, weight.shape[1], weight.shape[2:].numel())
        return w.transpose(1, 2).flatten(2)

    def back(self, view: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`view`, and of :meth:`column`."""
        if self.held is not None:
            start = self.held.start - self._met[0] * self.rows
            return view.flatten(0, 1)[start : start + len(self.held)].reshape(like.shape)
        if not self.transposed or like.ndim == 1:
            return view.reshape(like.shape)
        w = view.reshape(self.groups, like.shape[1], like.shape[0] // self.groups, like.shape[2:].numel())
        return w.transpose(1, 2).reshape(like.shape)

    def column(self, bias: Tensor) -> Tensor:
        """The bias as (groups, rows, 1)."""
        if self.held is not None:
            return self.view(bias[:, None])
        return bias.reshape(self.groups, bias.shape[0] // self.groups, 1)

    def means(self, t: Tensor) -> Tensor:
        """The mean of all entries of a statistic (groups, …) of a layer, one number or one for each of the groups."""
        return t.mean()

    def spread_out(self, statistic: Tensor) -> Tensor:
        """A statistic per channel as one per input of a row."""
        return statistic.repeat_interleave(self.repeat, -1) if self.repeat > 1 else statistic


@dataclass(frozen=True)
class SideBySide(Layout):
    """Weights of k layers alike in one tensor, (k, …), each seen by a layout: their groups follow each other.

    Attributes:
        of: the layout of each.
        members: k.
        groups, transposed, repeat, held, rows: those of ``of``.

    Example:
        >>> import torch
        >>> SideBySide.all(Layout(), 4).view(torch.zeros(4, 3, 2)).shape  # four layers (3, 2)
        torch.Size([4, 3, 2])
    """

    of: Layout = Layout()
    members: int = 1

    @classmethod
    def all(cls, of: Layout, members: int) -> SideBySide:
        """k layers with one layout."""
        return cls(
            groups=of.groups, transposed=of.transposed, repeat=of.repeat, held=of.held, rows=of.rows, of=of, members=members
        )

    @property
    def straight(self) -> bool:
        return self.of.straight

    def mine(self, statistic: Tensor) -> Tensor:
        return statistic if self.held is None else self.of.mine(statistic)

    def view(self, weight: Tensor) -> Tensor:
        if self.straight:
            return weight.reshape(self.members * self.groups, weight.shape[1] // self.groups, weight.shape[2:].numel())
        return self._each(self.of.view, weight)

    def back(self, view: Tensor, like: Tensor) -> Tensor:
        if self.straight:
            return view.reshape(like.shape)
        if self.members == 1:
            return self.of.back(view, like[0])[None]
        parts = zip(view.unflatten(0, (self.members, -1)).unbind(0), like.unbind(0), strict=True)
        return torch.stack([self.of.back(v, one) for v, one in parts])

    def column(self, bias: Tensor) -> Tensor:
        return self._each(self.of.column, bias)

    def _each(self, f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        return f(t[0]) if self.members == 1 else torch.cat([f(one) for one in t.unbind(0)])

    def means(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (self.members, -1)).flatten(1).mean(1).repeat_interleave(t.shape[0] // self.members)


@dataclass(frozen=True)
class ExpertLayout(Layout):
    """A stack of ``groups`` weights (out, in), or (in, out) where it is ``transposed``: experts, which see different inputs each.

    ``held`` are the experts that this process holds, where it does not hold all.

    Attributes:
        groups, transposed, repeat, held, rows: as in :class:`Layout`; ``repeat`` and ``rows`` are not used.

    Example:
        >>> import torch
        >>> ExpertLayout(4, transposed=True).view(torch.zeros(4, 3, 2)).shape  # four experts (in 3, out 2)
        torch.Size([4, 2, 3])
    """

    @property
    def output_dim(self) -> int:
        return 0

    @property
    def straight(self) -> bool:
        return False

    def inputs(self, shape: torch.Size) -> int:
        return shape[1 if self.transposed else 2]

    def part(self, held: range, shape: torch.Size) -> Layout:
        return replace(self, held=held)

    def mine(self, statistic: Tensor) -> Tensor:
        return statistic if self.held is None else statistic[self.held.start : self.held.stop]

    def view(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def back(self, view: Tensor, like: Tensor) -> Tensor:
        return view[..., 0] if like.ndim == 2 else view.mT if self.transposed else view

    def column(self, bias: Tensor) -> Tensor:
        return bias[..., None]
