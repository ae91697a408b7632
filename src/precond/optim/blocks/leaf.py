"""Parameters with what is known of them, and rules that choose among them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra.sharding import Shard, local
from precond.optim.ranks.pieces import Pieces, held_by

_OUTPUTS = {"head", "heads", "lm_head", "classifier", "output", "readout", "unembed", "logits"}


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter.

    Attributes:
        name: its qualified name, ``param_3`` where no names are known.
        param: the parameter.
        kind: ``"weight"``, ``"bias"``, ``"norm"``, ``"embedding"``, or ``"vector"`` (one-dimensional, its module unknown).
        layer: qualified name of the module that owns it; its own name where none is known.
        module: that module, or None.
        attribute: what the module calls it, or nothing.
        group: the number of its parameter group.
        sites: where the inputs of the layer are observed, for which it is the weight or the bias.
        inputs_first: whether its first dimension counts the inputs of its layer, as in transposed convolutions.
        turn: which of the steps of a period its periodic work falls on (:mod:`precond.optim.blocks.turns`).
        replicas: the processes that hold copies of it, as under DistributedDataParallel; None where none are known.
        shared: what other modules hold it, by name, as where a head's weight is the table of embeddings.
        scores: how many inputs an output of its layer has, where that scores the rows of a table (:func:`with_scores`); 0 elsewhere.
    """

    name: str
    param: Tensor = field(repr=False)
    kind: str = "weight"
    layer: str = ""
    module: nn.Module | None = field(default=None, repr=False)
    group: int = 0
    sites: tuple[Any, ...] = field(default=(), repr=False)
    inputs_first: bool = False
    attribute: str = field(default="", repr=False)
    turn: int = 0
    replicas: Any = field(default=None, repr=False)
    shared: tuple[str, ...] = ()
    scores: int = 0

    @property
    def holders(self) -> tuple[str, ...]:
        """The modules that hold it: what the same ones hold goes together, as a weight with its bias."""
        return (self.layer, *self.shared)

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter, whoever holds it."""
        return self.param.shape

    @property
    def ndim(self) -> int:
        """The number of its dimensions."""
        return self.param.ndim

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of a layer of which it is the weight; of convolutions what a row holds."""
        rows, columns = self.shape[0], self.param.numel() // self.shape[0]
        return (columns, rows) if self.inputs_first and self.ndim == 2 else (rows, columns)

    @cached_property
    def shard(self) -> Shard | None:
        """How it is divided among processes; None where this one holds all of it."""
        return Shard.of(self.param)

    @cached_property
    def pieces(self) -> Pieces | None:
        """Who holds what of it; None where this process alone is known to hold it."""
        return held_by(self.param, self.replicas)

    def span(self, dim: int) -> range | None:
        """The positions along ``dim`` that this process holds; None where it is divided along another dimension."""
        if self.pieces is None:
            return range(self.shape[dim])
        box = self.pieces.boxes[self.pieces.rank]
        if any(s != slice(0, n) for d, (s, n) in enumerate(zip(box, self.shape, strict=True)) if d != dim):
            return None
        return range(box[dim].start, box[dim].stop)

    @property
    def tensor(self) -> Tensor:
        """The memory that this process holds of it."""
        return self.local(self.param)

    @property
    def known(self) -> bool:
        """Whether its values are those of ``tensor``."""
        return True

    def local(self, t: Tensor) -> Tensor:
        """This process's part of a tensor that is divided like the parameter."""
        return t if self.shard is None else local(t)

    def whole(self, part: Tensor) -> Tensor:
        """The inverse of :meth:`local`."""
        return part if self.shard is None else self.shard.whole(part)


@dataclass(frozen=True, eq=False)
class WholeLeaf(Leaf):
    """A parameter of which processes hold parts, where one of them steps all of it: its gradient comes, and its values stay away.

    Attributes:
        zeros: what ``tensor`` is, of its whole shape, unless values are shown.
        shown: its values, for as long as they are shown.
    """

    zeros: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    shown: list[Tensor] = field(default_factory=list, repr=False)
    shard = None

    @property
    def tensor(self) -> Tensor:
        return self.shown[-1] if self.shown else self.zeros

    @property
    def known(self) -> bool:
        return bool(self.shown)


Rule = Callable[[Leaf], bool] | str
"""Which parameters: a predicate of a leaf, or a pattern for its name (``"*.bias"``)."""


def matches(rule: Rule | None, leaf: Leaf) -> bool:
    """Whether a rule holds for a leaf; None holds for all."""
    if rule is None:
        return True
    if isinstance(rule, str):
        return fnmatch.fnmatchcase(leaf.name, rule)
    try:
        return bool(rule(leaf))
    except Exception as error:
        error.add_note(f"raised by the rule (where=) {rule!r} for the parameter {leaf.name!r}; a rule takes a precond.Leaf")
        raise


def is_decayed(leaf: Leaf) -> bool:
    """Whether a parameter is a matrix or a kernel of some layer, and no table of embeddings: what weight decay is usually meant for.

    Biases, parameters of normalization layers, and scales, slopes and gates of other modules (one-dimensional, or numbers) are not.

    Args:
        leaf: the parameter with what is known of it.

    Returns:
        True where it is; a rule for ``where=`` and :class:`~precond.Route`.

    Example:
        >>> import torch, precond
        >>> layer = torch.nn.Linear(3, 2)
        >>> weight = precond.Leaf("head.weight", layer.weight)
        >>> bias = precond.Leaf("head.bias", layer.bias, kind="bias")
        >>> [precond.is_decayed(leaf) for leaf in (weight, bias)]
        [True, False]
    """
    return is_matrix(leaf)


def is_matrix(leaf: Leaf) -> bool:
    """Whether a parameter is a weight with at least two dimensions that is no embedding.

    Args:
        leaf: the parameter with what is known of it.

    Returns:
        True where it is; a rule for ``where=`` and :class:`~precond.Route`.

    Example:
        >>> import torch, precond
        >>> leaves = [precond.Leaf("W", torch.zeros(2, 3)), precond.Leaf("b", torch.zeros(2), kind="bias")]
        >>> list(map(precond.is_matrix, leaves))
        [True, False]
    """
    return leaf.kind == "weight" and leaf.ndim >= 2


def is_hidden(leaf: Leaf) -> bool:
    """Whether a parameter is a matrix between layers: not an embedding, and by its name not the layer that makes the outputs.

    Args:
        leaf: the parameter with what is known of it.

    Returns:
        True where it is; a rule for ``where=`` and :class:`~precond.Route`.

    Example:
        >>> import torch, precond
        >>> W = torch.zeros(2, 3)
        >>> precond.is_hidden(precond.Leaf("body.weight", W)), precond.is_hidden(precond.Leaf("head.weight", W))
        (True, False)
    """
    return is_matrix(leaf) and _OUTPUTS.isdisjoint(leaf.name.split("."))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit floats, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
