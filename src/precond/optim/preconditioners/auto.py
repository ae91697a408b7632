"""A preconditioner for each layer, chosen by what the layer is and by what it receives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from precond.algebra import checks
from precond.algebra.maps import ExpertLayout
from precond.optim import blocks
from precond.optim.blocks import Leaf, is_matrix
from precond.optim.checking.arguments import settle
from precond.optim.inputs import Request
from precond.optim.inputs.moments import REQUESTS
from precond.optim.preconditioners.base import Preconditioner, Resolved
from precond.optim.preconditioners.bnp import BNP
from precond.optim.preconditioners.compose import Composition
from precond.optim.preconditioners.muon import Muon, is_full_matrix
from precond.optim.preconditioners.parts import Part, placed
from precond.optim.preconditioners.polar import Polar
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.route import Route
from precond.optim.preconditioners.whitening import Whitening

NOT_OBSERVED = "inputs are not observed"
NO_MATRIX = "no matrix"

SCORED = 64
"""Inputs of a score from which on its steps are shorter in proportion: RMS moves all weights alike, and a sum of n inputs by n of these."""


@dataclass(frozen=True)
class Chosen:
    """Leaves, by position, what acts on them, and why."""

    index: tuple[int, ...]
    preconditioner: Preconditioner
    why: str


def _is_one_matrix(leaf: Leaf) -> bool:
    """Whether what is no known layer's weight is a matrix or a kernel.

    Positions (1, n, d) and scales (d, 1, 1) are added and multiplied entry by entry, and a stack of matrices is not one.
    """
    kernel = isinstance(leaf.module, nn.modules.conv._ConvNd | ParametrizationList)
    return is_matrix(leaf) and leaf.param.numel() > 1 and min(leaf.sides) > 1 and (leaf.ndim != 3 or kernel)


def _layers(leaves: Sequence[Leaf]) -> Iterator[tuple[int, ...]]:
    """Layers by positions: what a user has added to a known one, as factors of LoRA in a subclass, is another; a matrix before its scales."""
    for index in blocks.by_layer(leaves):
        seen, added = (tuple(i for i in index if bool(leaves[i].sites) == known) for known in (True, False))
        recurrent = isinstance(leaves[index[0]].module, nn.RNNBase | nn.RNNCellBase)
        apart = seen and not recurrent and any(_is_one_matrix(leaves[i]) for i in added)
        for part in (seen, added) if apart else (index,):
            first = leaves[part[0]]
            if first.kind == "weight" and (first.ndim < 2 or not first.param.numel()):
                part = tuple(sorted(part, key=lambda i: not _is_one_matrix(leaves[i])))
            yield part


@dataclass(frozen=True)
class Auto(Resolved):
    """Whitened inputs and polar steps for layers, standardized inputs where layers are wide, RMS for all else.

    A layer whose weight is a matrix (out, in), or (in, out), and whose inputs are observed, takes ``whitening @ polar``; with more than
    ``max_inputs`` inputs ``bnp @ polar``, whose cost does not grow with their square. A layer that sees its inputs in groups (experts too)
    takes ``bnp @ rms``, a matrix whose inputs are not observed ``polar``, or ``muon`` if its module has several, as a weight norm or attention
    of one's own, or what a subclass adds to a layer; positions (1, n, d), class tokens and queries are no matrices, nor are stacks of them.
    The matrices of a recurrent layer are orthogonalized one by one behind ``bnp``, as is the weight of a transposed convolution, a row for
    each input; biases of both take ``rms``. A layer that alone has as many outputs as a table of embeddings has rows, more than ten, scores
    what these stand for, words or items, some seen often and some rarely. It takes ``bnp @ rms``, which evens that out as it does in the
    table; of more than 64 inputs, with shorter steps. Embeddings, normalization layers and all that is left take ``rms``. Steps of all have
    about the same size in units of a layer's outputs, so that one learning rate serves all; those of a table of embeddings, whose rows are
    outputs themselves and are seen now and then, are longer, unless a layer shares it.

    ``measured`` is what :func:`precond.auto` finds in its first steps of the inputs of layers: the share of independent directions,
    n/tr(K²) for n inputs of correlations K, 1 for white inputs and 1/n where all are one. From ``white`` on only scales are left to
    even out, and the layer takes ``bnp @ polar``. ``seen`` is told and decides nothing: trainings did not show that it should.

    Args:
        max_inputs: more inputs than this are standardized, not whitened.
        whitening, bnp, polar, rms, muon: what is chosen from; the gain of ``polar`` is for a momentum that measures its coherence, as
            that of :func:`precond.auto` does; 2 suits others.
        embeddings: what multiplies the learning rate of tables of embeddings.
        white: share of independent directions, > 0, from which inputs are standardized, not whitened; more than 1: never.
        measured: pairs (name of a weight, share of independent directions).
        seen: triples (name of a weight, samples behind its correlations per input, tr Σ/‖G‖² of its first gradients or None).

    Raises:
        TypeError: for ``measured`` that holds no pairs, or ``seen`` that holds no triples.
        ValueError: for numbers out of range.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Sequential(torch.nn.Linear(2000, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> rows = precond.PreconditionedGD(model, preconditioner=precond.Auto()).explain().rows
        >>> [row.preconditioner.split("(")[0] for row in rows if row.name.endswith("weight")]
        ['BNP', 'Whitening', 'RMS']
    """

    max_inputs: int = 1024
    whitening: Whitening = Whitening(root="cholesky", observe_steps=3, shrinkage=10.0, samples=32.0)
    bnp: BNP = BNP()
    polar: Polar = Polar(gain=3.0)
    rms: RMS = RMS(0.999)
    muon: Muon = Muon()
    embeddings: float = 5.0
    white: float = 0.8
    measured: Sequence[tuple[str, float]] = ()
    seen: Sequence[tuple[str, float, float | None]] = ()

    uses_momentum = True

    def __post_init__(self) -> None:
        settle(self)
        try:
            object.__setattr__(self, "measured", tuple((str(name), float(share)) for name, share in self.measured))
        except (TypeError, ValueError):
            raise TypeError(
                f"Auto: measured must be pairs (name of a weight, share of independent directions), got {self.measured!r}"
            ) from None
        try:
            seen = tuple((str(name), float(n), None if noise is None else float(noise)) for name, n, noise in self.seen)
        except (TypeError, ValueError):
            raise TypeError(
                f"Auto: seen must be triples (name of a weight, samples per input, noise or None), got {self.seen!r}"
            ) from None
        object.__setattr__(self, "seen", seen)
        checks.whole("Auto", max_inputs=self.max_inputs)
        checks.positive("Auto", embeddings=self.embeddings, white=self.white)

    @property
    def requests(self) -> frozenset[Request]:
        return self.whitening.requests | self.bnp.requests

    @property
    def advised_damping(self) -> float:  # type: ignore[override]
        return self.polar.advised_damping

    def lr_scale(self, leaf: Leaf) -> float:
        if leaf.scores:
            return min(1.0, SCORED / leaf.scores)
        return self.embeddings if leaf.kind == "embedding" and not leaf.shared else 1.0

    @property
    def one_by_one(self) -> Preconditioner:
        """Of the tensors of a layer that has several matrices, or whose bias belongs to no row of one."""
        return Route([(self._is_orthogonalized, self.muon)], otherwise=self.rms)

    @property
    def each_matrix(self) -> Preconditioner:
        """Of the parameters of a module that is no known layer, as of a parametrization or of attention with four matrices of its own."""
        return Route([(self._is_one_to_orthogonalize, self.muon)], otherwise=self.rms)

    def _is_orthogonalized(self, leaf: Leaf) -> bool:
        return is_full_matrix(leaf) and min(leaf.shape[0], leaf.param[0].numel()) <= self.polar.max_dim

    def _is_one_to_orthogonalize(self, leaf: Leaf) -> bool:
        return _is_one_matrix(leaf) and self._is_orthogonalized(leaf)

    def chosen(self, leaves: Sequence[Leaf]) -> list[Chosen]:
        """What acts on which leaves, and why: the table of :meth:`~precond.PreconditionedGD.explain`."""
        found: list[Chosen] = []
        rest: list[int] = []
        reasons: dict[int, str] = {}
        for index in _layers(leaves):
            layer = [leaves[i] for i in index]
            observed = any(leaf.sites for leaf in layer)
            preconditioner, why = self._of_head(layer[0], observed) if layer[0].scores else self._of_layer(layer, observed)
            if preconditioner is None:
                rest += index
                reasons |= dict.fromkeys(index, why)
                continue
            found += [Chosen(part.index, part.preconditioner, why) for part in placed(preconditioner, leaves, index)]
        for why in dict.fromkeys(reasons.values()):
            of = [i for i in rest if reasons[i] == why]
            found += [Chosen(part.index, part.preconditioner, why) for part in placed(self.rms, leaves, of)]
        return found

    def _of_head(self, weight: Leaf, observed: bool) -> tuple[Preconditioner, str]:
        scale = self.lr_scale(weight)
        why = f"{weight.sides[0]:,} outputs, as many as a table has rows: taken for their scores"
        why += f", steps × {scale:.2g}" if scale < 1 else ""
        return (self.bnp @ self.rms, why) if observed else (self.rms, f"{why}, {NOT_OBSERVED}")

    def _of_layer(self, layer: Sequence[Leaf], observed: bool) -> tuple[Preconditioner | None, str]:
        weight = layer[0]
        if weight.ndim < 2 or weight.kind != "weight" or not weight.param.numel():
            table = "rows of a table" + (", shared with a layer" if weight.shared else f", steps × {self.embeddings:g}")
            return None, {"norm": "scales and shifts", "embedding": table}.get(weight.kind, NO_MATRIX)
        rows, columns = weight.sides
        if isinstance(weight.module, nn.RNNBase | nn.RNNCellBase):
            why = "matrices of a recurrence"
            return (self.bnp @ self.one_by_one, why) if observed else (self.one_by_one, f"{why}, {NOT_OBSERVED}")
        if not observed:
            if not any(map(_is_one_matrix, layer)):
                return None, f"{NO_MATRIX}, {NOT_OBSERVED}"
            alone = sum(map(is_matrix, layer)) == 1
            return (self.polar if alone else self.each_matrix), NOT_OBSERVED
        stacked = any(isinstance(site.layout(REQUESTS[0]), ExpertLayout) for leaf in layer for site in leaf.sites)
        if stacked or getattr(weight.module, "groups", 1) > 1:
            return self.bnp @ self.rms, "rows see different inputs"
        if weight.inputs_first and weight.ndim > 2:
            return self.bnp @ self.one_by_one, "rows are inputs"
        if min(rows, columns) > self.polar.max_dim:
            return self.bnp @ self.rms, f"more than {self.polar.max_dim:,} rows and columns"
        if columns > self.max_inputs:
            return self.bnp @ self.polar, f"{columns:,} inputs are too many to whiten"
        share = dict(self.measured).get(weight.name)
        known = "" if share is None else f", {share:.2f} of their directions independent"
        told = self._told(weight.name)
        if share is not None and share >= self.white:
            return self.bnp @ self.polar, f"{columns:,} inputs{known}: white but for scales{told}"
        return self.whitening @ self.polar, f"{columns:,} inputs{known}{told}"

    def _told(self, name: str) -> str:
        """What decides nothing."""
        found = next((numbers for known, *numbers in self.seen if known == name), None)
        if found is None:
            return ""
        samples, noise = found
        noisy = "" if noise is None else f", gradient noise {'≥ ' if noise >= 100 else ''}{noise:g}"
        return f" (not decisive: {samples:g} samples per input{noisy})"

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        return [Part(c.index, c.preconditioner) for c in self.chosen(leaves)]

    def reasons(self, leaves: Sequence[Leaf]) -> dict[int, str]:
        return {i: self._of_leaf(leaves[i], c, [leaves[j] for j in c.index]) for c in self.chosen(leaves) for i in c.index}

    def _of_leaf(self, leaf: Leaf, chosen: Chosen, joined: Sequence[Leaf]) -> str:
        """What is true of one leaf, where a layer's reason is that of its first weight: RMS also takes what goes with no weight."""
        with_a_weight = any(other.sites and other.kind == "weight" for other in joined)
        by_rms = chosen.preconditioner.entrywise or (isinstance(chosen.preconditioner, Composition) and not with_a_weight)
        if not by_rms or leaf.kind in ("norm", "embedding") or leaf.scores:
            return chosen.why
        if leaf.kind == "weight" and _is_one_matrix(leaf):
            return NOT_OBSERVED
        return NO_MATRIX if leaf.ndim < 2 or chosen.why == NO_MATRIX else f"{NO_MATRIX}, {NOT_OBSERVED}"
