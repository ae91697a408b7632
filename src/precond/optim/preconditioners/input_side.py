"""What input-side preconditioners share: blocks of layers, and statistics of their inputs by running average."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import Identity, Layout, LinearMap, SideBySide, Sliced, Standardizing
from precond.algebra.vec import Vec
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, Stack, State, spans
from precond.optim.inputs import Moments, Request, Site
from precond.optim.inputs.moments import column, greatest, least, variances
from precond.optim.inputs.observer import Key
from precond.optim.preconditioners import layer_parts
from precond.optim.preconditioners.folding import Features, Fold, activity, fold
from precond.optim.preconditioners.layer_parts import LayerPart, NotRows, key_of
from precond.optim.preconditioners.parts import Needs, Part
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked


class InputSide(Stacked):
    """A map made of the inputs of each layer; every output row alike, so that rows need not communicate.

    A layer that is not observed (or was never called) keeps its gradient.
    """

    decay: float
    damping: float

    counts = frozenset({"count", "noise", "size", "examples", "form"})
    optional = frozenset({"form"})
    least_samples = 1

    @property
    @abstractmethod
    def request(self) -> Request:
        """What it wants to know of the inputs."""

    @property
    def needs(self) -> Needs:
        return "row"

    def looks(self, step: int) -> bool:
        return False

    @property
    def requests(self) -> frozenset[Request]:
        return frozenset({self.request})

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """One block per layer: weights and the biases that go with them; what is no layer stays by itself."""
        layers = [part.index for part in layer_parts.observed(leaves, self.request)]
        return [Part(i, self) for i in blocks.join(layers, blocks.by_tensor(leaves))]

    def handles(self, block: Block) -> bool:
        return bool(self._weights(block))

    def divisible(self, block: Block) -> bool:
        """Whether each process holds rows, with their biases."""
        try:
            self.parts(block)
        except NotRows:
            return False
        return True

    def parts(self, block: Block) -> list[LayerPart]:
        """The observed weights of a block."""
        known = block.derived.get(self.request)
        return block.kept(self.request, lambda: self._parts(block)) if known is None else known

    def _parts(self, block: Block) -> list[LayerPart]:
        parts = self._weights(block)
        return [replace(p, held=p.rows_held(block, self.request)) for p in parts] if block.sharded else parts

    def _weights(self, block: Block) -> list[LayerPart]:
        return block.kept(("weights", self.request), lambda: layer_parts.observed(block.leaves, self.request))

    @abstractmethod
    def fresh(self, part: LayerPart, block: Block) -> dict[str, Tensor]:
        """Zero statistics of a weight: ``count``, ``mean``, ``activity`` and ``variance`` or ``covariance``."""

    @abstractmethod
    def arrow(self, part: LayerPart, state: State) -> tuple[Tensor, Tensor, float | Tensor]:
        """(μ, σ, β) of U·diag(β, 1/σ), U = [[1, −μᵀ], [0, I]]: μ and σ of each input of a row, shape (groups, n), by the statistics."""

    def follow(self, part: LayerPart, state: State) -> None:
        """In a step, once inputs are folded: what is kept becomes that of the parameters that are trained now, in place."""

    def scales(self, part: LayerPart, state: State) -> tuple[Tensor, Tensor]:
        """(μ, σ̃) of each feature; with no bias to center with, μ is 0 and σ² = E[h²]. Made again where something was observed.

        Of the statistics of this layer alone, whatever others were folded beside it, so that a run that is resumed finds the same.
        """
        return state.kept("scales", (state["mean"]._version, self.damping), lambda: self._scales(state, part.bias is not None))

    def _scales(self, mine: State, bias: bool) -> tuple[Tensor, Tensor]:
        mean, variance = mine["mean"], variances(mine["variance" if "variance" in mine else "covariance"], mine["mean"])
        square = torch.addcmul(variance, mean, mean)
        centered = column([float(bias and n >= 2) for n in mine["count"].tolist()], mean)  # one sample has no variance
        if isinstance(centered, Tensor):
            mean, variance = torch.where(centered > 0, mean, 0), torch.where(centered > 0, variance, square)
        elif not centered:
            mean, variance = torch.zeros_like(mean), square
        damped = self.damping_of(square, mine).add_(variance)
        # An input that was always zero has no scale, and its weight has had no gradient; nor has one whose 1/σ² is no number of the dtype.
        return mean, damped.masked_fill_(damped <= 1 / torch.finfo(damped.dtype).max, 1.0).sqrt_()

    def part_map(self, part: LayerPart, state: State, like: Vec, layout: Layout) -> LinearMap:
        """P on (weight, bias) or (weight,) of a stack."""
        mean, std, beta = self.arrow(part, state)
        return Standardizing(mean, std, like, beta, layout)

    def kind(self, block: Block) -> Any:
        return tuple((p.weight, p.bias, (p.rows.start, p.rows.stop), p.layout(self.request)) for p in self.parts(block))

    def known(self, mine: dict[str, Tensor]) -> bool:
        """Whether P is known of a weight, or of some of its groups; else it is the identity."""
        return greatest(mine["count"]) >= self.least_samples

    def ready(self, state: State) -> bool:
        stack = state if isinstance(state.block, Stack) else state.as_stack()
        return all(least(self.statistics(part, stack)["count"]) >= self.least_samples for part in self.parts(state.block))

    def wants(self, state: State, part: LayerPart) -> Sequence[bool]:
        """Whether the inputs of a weight are to be observed at the next step, of each member of a stack."""
        return [True] * len(state.block.turns)

    def wanted(self, state: State) -> list[tuple[str, Request, Tensor | None]]:
        out = []
        for part in self.parts(state.block):
            if any(wants := self.wants(state, part)):
                known = self.damping > 0 and greatest(state[key_of("count", part)]) > 0
                out += state.kept(f"wanted {part.number}", (known, wants), lambda: self._asked(state, part, known, wants))  # noqa: B023
        return out

    def _asked(
        self, state: State, part: LayerPart, known: bool, wants: Sequence[bool]
    ) -> list[tuple[str, Request, Tensor | None]]:
        sites = self._sites(part, state.block)
        centers = state[key_of("mean", part)].unbind(0) if known else [None] * len(sites)
        return [(s.name, self.request, center) for s, center, wanted in zip(sites, centers, wants, strict=True) if wanted]

    def _sites(self, part: LayerPart, block: Block) -> list[Site]:
        """The site of a part, in each member of a stack."""
        return [self.parts(member)[part.number].site for member in block.members] if isinstance(block, Stack) else [part.site]

    def init(self, block: Block) -> dict[str, Any]:
        return {key_of(k, part): v for part in self.parts(block) for k, v in self.fresh(part, block).items()}

    def observe(self, state: State, seen: Seen) -> None:
        observe([(self, state, seen.inputs or {})])

    def seen(self, state: State, inputs: Mapping[Key, Moments]) -> Iterator[Fold]:
        """What was seen of a stack since its last step."""
        for part in self.parts(state.block):
            found = [inputs.get((site.name, self.request)) for site in self._sites(part, state.block)]
            for some in spans([f is not None for f in found]):
                mine, new = self.statistics(part, state.span(some)), Moments.joined([f for f in found[some] if f is not None])
                one = Fold(mine, new, self.rate(min(state.steps), new))
                if new.mean.device.type != "cpu":  # where it is, the step was not taken: a look at it costs nothing there
                    new.bound_to_(mine["mean"], mine[one.spread])
                yield one

    def rate(self, step: float, new: Moments) -> float | Sequence[float]:
        """ρ of what is observed for a step; or one for each layer or each group."""
        return self.decay

    def active(self, seen: Features) -> Tensor:
        """a = E|h − μ|/σ after a fold, of features (F,)."""
        return activity(seen)

    def damping_of(self, square: Tensor, mine: State) -> Tensor:
        r"""What damping adds to a variance: ε E[h²], and for inputs that are rarely active a share of the layer's mean E[h²].

        The scale of an input that few samples show is hardly known, and steps along it would be as long as it is rare. The
        share is ⅓·(1 − 3a²N/(N+8))₊ with the activity a = E|h−μ|/σ, a² = 2/π for a normal distribution and about 4f for an
        input that is nonzero in a small fraction f of the samples: inputs that are always active keep their own scale, whatever
        it is, once N samples, ten or so, have shown it.
        """
        if self.damping == 0:
            return torch.zeros_like(square)
        a, shown = mine["activity"], column([n / (n + 8) for n in mine["count"].tolist()], square)
        b, share = (a, shown) if isinstance(shown, float) else (a * shown, 1.0)
        rare = torch.addcmul(square.new_full((), 1 / 3), a, b, value=-share).clamp_min_(0)
        return rare.mul_(square.mean(-1, keepdim=True)).add_(square, alpha=self.damping)

    def map(self, state: State) -> LinearMap:
        """P; made again where the statistics have changed."""
        versions = tuple(t._version for name, t in state.items() if name != "step")
        return state.kept("map", versions, lambda: self._map(state))

    def _map(self, state: State) -> LinearMap:
        block, like, maps = state.block, state.block.tensors, []
        assert isinstance(block, Stack)
        for part in self.parts(block):
            mine, own = self.statistics(part, state), part.of(like)
            layout = SideBySide.all(part.layout(self.request), len(block.members))
            maps.append((part, self.part_map(part, mine, own, layout) if self.known(mine) else Identity(own)))
        (first, only), *more = maps
        whole = (0,) if first.bias is None else (0, 1)
        if not more and len(like) == len(whole) and first.weight == 0 and first.rows == slice(None):
            return only
        return Sliced([(p.weight, p.bias, p.rows, m) for p, m in maps], like)

    @classmethod
    def statistics(cls, part: LayerPart, state: State) -> State:
        """Those of a part of a stack, of all members' groups one after the other."""
        return state.kept(f"part {part.number}", None, lambda: cls._flat(part, state))

    @staticmethod
    def _flat(part: LayerPart, state: State) -> State:
        suffix = f".{part.number}" if part.number else ""
        mine = {
            k.removesuffix(suffix): v
            for k, v in state.items()
            if k != "step" and k.endswith(suffix) and ("." in k) == bool(suffix)
        }
        return State(state.block, {k: v.flatten(0, 1) if v.ndim > 1 else v for k, v in mine.items()})


def observe(seen: Iterable[tuple[InputSide, State, Mapping[Key, Moments]]]) -> None:
    """Fold what was seen of stacks into their statistics, of those alike at once: (what acts on one, its state, inputs)."""
    alike: dict[Any, list[Fold]] = {}
    for P, state, inputs in seen:
        for one in P.seen(state, inputs):
            mean = one.new.mean
            alike.setdefault((P, mean.dtype, mean.device), []).append(one)
    for (P, *_), folds in alike.items():
        fold(folds, P.active)
