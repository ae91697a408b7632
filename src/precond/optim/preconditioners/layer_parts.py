"""The weights of a block whose inputs are observed, with their biases, and which of their rows a process holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from precond.algebra.maps import Layout
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, Leaf
from precond.optim.inputs import Request, Site


class NotRows(ValueError):
    """No process holds whole rows of a layer."""


@dataclass(frozen=True)
class LayerPart:
    """A weight of a block with its bias: positions in the block, entries of the bias, and the site that observes it.

    Attributes:
        held: which of its rows this process holds; None: all.
    """

    weight: int
    bias: int | None
    rows: slice
    site: Site
    number: int
    held: range | None = None

    def layout(self, request: Request) -> Layout:
        """How the rows that this process holds are seen by statistics of a request."""
        layout = self.site.layout(request)
        return layout if self.held is None else layout.part(self.held, self.site.weight.shape)

    def of(self, v: Vec) -> Vec:
        """(weight, bias) or (weight,) of a vector of the block, or of the stack."""
        return (v[self.weight],) if self.bias is None else (v[self.weight], v[self.bias][..., self.rows])

    @property
    def index(self) -> tuple[int, ...]:
        """Its positions in the block."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def rows_held(self, block: Block, request: Request) -> range | None:
        """The rows that this process holds of a weight and of its bias alike; raises :class:`NotRows` where these are not whole rows."""
        weight, bias = block.leaves[self.weight], None if self.bias is None else block.leaves[self.bias]
        if weight.shard is None and (bias is None or bias.shard is None):
            return None
        dim = self.site.layout(request).output_dim
        rows = None if dim is None or weight.shard is None else weight.span(dim)
        if rows is None:
            raise NotRows(f"{weight.name!r} is not divided by rows, whose inputs are seen whole")
        if bias is not None and (bias.shard is None or bias.span(0) != rows):
            raise NotRows(
                f"{weight.name!r} and {bias.name!r} are divided differently, so that no process holds a row with its bias"
            )
        return rows


def observed(leaves: Sequence[Leaf], request: Request) -> list[LayerPart]:
    """The weights among leaves whose sites answer a request."""
    place = {leaf.param: i for i, leaf in enumerate(leaves)}
    every = dict.fromkeys(s for leaf in leaves for s in leaf.sites)
    sites = [s for s in every if s.weight in place and s.answers(request)]
    return [
        LayerPart(place[s.weight], None if s.bias is None else place.get(s.bias), s.rows, s, k) for k, s in enumerate(sites)
    ]


def key_of(name: str, part: LayerPart) -> str:
    """What a statistic of a part is called in the state: the first weight of a block has plain keys; further ones are numbered."""
    return f"{name}.{part.number}" if part.number else name
