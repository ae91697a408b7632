"""What ranks have seen of layers that one of them owns, as it is sent, and put together there: layers alike at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from precond.optim.inputs.moments import Moments, OfRows
from precond.optim.inputs.triangles import pack, packed_size, unpack

Parts = tuple[Tensor, Tensor, Tensor]
"""A mean, a spread and deviations, flat, of all layers of a bundle, as they were sent."""


class Layer(NamedTuple):
    """A layer's statistics, as all ranks know them.

    Attributes:
        groups, features: of its inputs.
        full: whether their covariance is asked for.
        owner: the rank that needs them.
    """

    groups: int
    features: int
    full: bool
    owner: int


class Told(NamedTuple):
    """What a rank has told of a layer.

    Attributes:
        counts, examples: as of :class:`Moments`.
        rows: how many samples it sends in place of their covariance, which takes more room; 0 where it sends that.
    """

    counts: tuple[float, ...]
    examples: float
    rows: int

    @property
    def any(self) -> bool:
        """Whether it has seen something."""
        return any(self.counts)


@dataclass(frozen=True)
class Bundle:
    """Layers of one owner that are put together at once, as groups of one: alike, and of each of which a rank sends as many samples.

    Where matrices are sent or made a layer is alone: several of them at once would take memory.

    Attributes:
        index: their numbers.
        layer: what one is like.
        told: of each rank that has seen something, what it has told of each layer.
    """

    index: tuple[int, ...]
    layer: Layer
    told: tuple[tuple[int, tuple[Told, ...]], ...]

    @property
    def owner(self) -> int:
        """The rank that needs them."""
        return self.layer.owner

    def __hash__(self) -> int:
        return hash(self.index)

    @cached_property
    def rows(self) -> dict[int, int]:
        """Of each rank how many samples of a layer it sends."""
        return {r: told[0].rows for r, told in self.told}

    def sizes(self, rank: int) -> tuple[int, int, int]:
        """How many numbers a rank sends of :data:`Parts`."""
        n, rows = self.layer.features, self.rows[rank]
        spread = n if not self.layer.full else rows * n if rows else packed_size(n)
        groups = self.layer.groups * len(self.index)
        return groups * n, groups * spread, groups * n

    def numbers(self, rank: int) -> int:
        """How many numbers a rank sends."""
        return sum(self.sizes(rank))

    def parts(self, mine: Sequence[Moments | None]) -> list[Tensor]:
        """What a rank sends of what it has seen, layer after layer."""
        own = [m for i in self.index if (m := mine[i]) is not None]
        return [*(m.mean for m in own), *(_spread(m) for m in own), *(m.absolute for m in own)]

    @cached_property
    def _counts(self) -> Tensor:
        """(ranks, groups) in float64."""
        return torch.tensor([[n for t in told for n in t.counts] for _, told in self.told], dtype=torch.float64)

    @cached_property
    def _examples(self) -> list[float]:
        """Of each layer, of all ranks."""
        return [sum(column) for column in zip(*([t.examples for t in told] for _, told in self.told), strict=True)]

    def together(self, me: int, mine: Sequence[Moments | None], found: Sequence[tuple[int, Parts]]) -> Iterable[Moments]:
        """What this rank and others have seen, of each layer.

        Args:
            mine: of all layers, what this one has.
            found: of each other rank that has seen something, what it sent.
        """
        if not found:
            return [m for i in self.index if (m := mine[i]) is not None]
        groups, n = len(self.index) * self.layer.groups, self.layer.features
        every = {r: (mean.view(groups, n), spread, absolute.view(groups, n)) for r, (mean, spread, absolute) in found}
        own = [m for i in self.index if (m := mine[i]) is not None] if me in self.rows else []
        if own:
            every[me] = (_one([m.mean for m in own]), _one([_spread(m) for m in own]), _one([m.absolute for m in own]))
        ranks = [r for r, _ in self.told]
        return self._of_all([every[r] for r in ranks], [self.rows[r] for r in ranks])

    def _of_all(self, every: Sequence[Parts], rows: Sequence[int]) -> Iterable[Moments]:
        """The same about the common mean, in the parts' own precision: no difference of large numbers.

        Rows are put one after the other, for one product or to be folded in where they are; triangles are added as they came. All in the order
        of ranks, so that whoever owns the layer finds the same bits.
        """
        total = self._counts.sum(0)
        share = (self._counts / total.clamp_min(1)).to(every[0][0])[..., None]  # (ranks, groups, 1)
        means = torch.stack([mean for mean, _, _ in every])
        mean = (share * means).sum(0)
        away = means - mean
        absolute = torch.stack([absolute for _, _, absolute in every]).sum(0)
        spreads = [spread for _, spread, _ in every]
        make: Callable[..., Moments] = Moments
        if not self.layer.full:
            spread = sum(w * (t.view_as(mean) + a.square()) for w, t, a in zip(share, spreads, away, strict=True))
        elif all(rows) and sum(rows) <= self.layer.features:
            make, spread = OfRows, _about(away, spreads)
        else:
            spread = _covariance(share, away, spreads, rows, total.to(mean))
        parts = (total.to(mean.dtype), mean, spread, absolute)
        each = zip(*(t.split(self.layer.groups) for t in parts), strict=True)
        return [make(*of, torch.tensor(x, dtype=mean.dtype)) for of, x in zip(each, self._examples, strict=True)]


@dataclass(frozen=True)
class Plan:
    """Who sends what, which all ranks know alike.

    Attributes:
        bundles: of the layers that some rank has seen.
        size: how many ranks there are.
    """

    bundles: tuple[Bundle, ...]
    size: int

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, layers: tuple[Layer, ...], table: tuple[tuple[float, ...], ...]) -> Plan:
        """From what each rank has told, layer after layer: counts of samples, of examples, and how many samples it sends."""
        told: list[list[Told]] = []
        for row in table:
            numbers = iter(row)
            told.append([Told(tuple(next(numbers) for _ in range(g)), next(numbers), int(next(numbers))) for g, *_ in layers])
        alike: dict[object, list[int]] = {}
        for i, layer in enumerate(layers):
            rows = tuple((r, of[i].rows) for r, of in enumerate(told) if of[i].any)
            small = not layer.full or (all(n for _, n in rows) and sum(n for _, n in rows) <= layer.features)
            if rows:
                alike.setdefault((layer, rows, None if small else i), []).append(i)
        return cls(
            tuple(
                Bundle(
                    tuple(index),
                    layers[index[0]],
                    tuple((r, tuple(of[i] for i in index)) for r, of in enumerate(told) if of[index[0]].any),
                )
                for index in alike.values()
            ),
            len(table),
        )

    def as_much_as(self, other: Plan) -> bool:
        """Whether each rank sends as much to each as by another plan of the same layers."""
        return all(self.rows(r) == other.rows(r) for r in range(self.size))

    def rows(self, rank: int) -> Mapping[int, int]:
        """Of each layer of which a rank has seen something how many samples it sends; 0 where it sends their covariance."""
        return self._rows[rank]

    @cached_property
    def _rows(self) -> list[dict[int, int]]:
        return [{i: b.rows[r] for b in self.bundles if r in b.rows for i in b.index} for r in range(self.size)]

    def parts(self, me: int, mine: Sequence[Moments | None], like: Tensor) -> list[list[Tensor]]:
        """To each rank what this one sends of what it has seen."""
        return [[t if t.dtype == like.dtype else t.to(like) for b in of for t in b.parts(mine)] for of in self._to(me)]

    def nothing(self, me: int, like: Tensor) -> list[list[Tensor]]:
        """As many numbers, of no meaning."""
        return [[like.new_zeros(sum(b.numbers(me) for b in of))] for of in self._to(me)]

    def sizes(self, me: int) -> list[list[int]]:
        """Of each rank of what sizes the parts are that it sends to this one."""
        return [[n for b in of for n in b.sizes(r)] for r, of in enumerate(self._at(me))]

    def found(self, me: int, parts: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Bundle, list[tuple[int, Parts]]]]:
        """The bundles of this rank, with what each other one has sent of them, from its parts."""
        of: dict[Bundle, list[tuple[int, Parts]]] = {b: [] for b in self.bundles if b.owner == me}
        for r, bundles in enumerate(self._at(me)):
            each = iter(parts[r])
            for bundle in bundles:
                of[bundle].append((r, (next(each), next(each), next(each))))
        yield from of.items()

    def _to(self, me: int) -> list[list[Bundle]]:
        """To each rank what this one sends."""
        return self._sent(lambda bundle, r: bundle.owner == r != me and me in bundle.rows)

    def _at(self, me: int) -> list[list[Bundle]]:
        """Of each rank what it sends to this one."""
        return self._sent(lambda bundle, r: bundle.owner == me != r and r in bundle.rows)

    def _sent(self, which: Callable[[Bundle, int], bool]) -> list[list[Bundle]]:
        return [[bundle for bundle in self.bundles if which(bundle, r)] for r in range(self.size)]


class Habit(NamedTuple):
    """What ranks have sent of some layers.

    Attributes:
        plan: the last time.
        steady: whether it was as much as the time before.
    """

    plan: Plan
    steady: bool


def _one(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _spread(m: Moments) -> Tensor:
    if isinstance(m, OfRows):
        return m.rows
    return pack(m.spread) if m.spread.ndim > m.mean.ndim else m.spread


def _about(away: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Rows of ranks, each about its own mean, as rows about the common mean, from which these are ``away``."""
    _, groups, n = away.shape
    each = [t.view(groups, -1, n) for t in rows]
    out = away.new_empty(groups, sum(t.shape[1] for t in each), n)
    for place, t, a in zip(out.split([t.shape[1] for t in each], 1), each, away, strict=True):
        torch.add(t, a[:, None], out=place)
    return out


def _covariance(share: Tensor, away: Tensor, spreads: Sequence[Tensor], rows: Sequence[int], total: Tensor) -> Tensor:
    """Σ share·(spread + away awayᵀ) of ranks, of which each has sent rows or a triangle."""
    _, groups, n = away.shape
    spread = away.new_zeros(groups, n, n)
    if triangles := [k for k, of in enumerate(rows) if not of]:
        one, *others = triangles
        flat = spreads[one].view(groups, -1) * share[one]
        for k in others:
            flat.addcmul_(spreads[k].view(groups, -1), share[k])
        spread = unpack(flat, n)
        spread.baddbmm_((share[triangles] * away[triangles]).permute(1, 2, 0), away[triangles].transpose(0, 1))
    if few := [k for k, of in enumerate(rows) if of]:
        D = _about(away[few], [spreads[k] for k in few])
        spread.baddbmm_(D.mT, D / total.clamp_min(1)[:, None, None])
    return spread
