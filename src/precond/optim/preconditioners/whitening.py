"""Whitened inputs: the full covariance of what a layer receives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import Layout, LinearMap
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, Stack, State, spans, state_dtype
from precond.optim.blocks.turns import next_renewal
from precond.optim.checking.arguments import settle
from precond.optim.inputs import Moments, Request
from precond.optim.inputs.moments import by_group, least
from precond.optim.preconditioners.correlation import Correlation, Leading, Root, Whole
from precond.optim.preconditioners.eigenbases import at_hand
from precond.optim.preconditioners.folding import Features, least_activity
from precond.optim.preconditioners.input_side import InputSide
from precond.optim.preconditioners.layer_parts import LayerPart, key_of
from precond.optim.preconditioners.seen import Seen

_REQUEST = Request("covariance", "patch")


@dataclass(frozen=True)
class Whitening(InputSide):
    r"""Each layer in the coordinates of its whitened inputs: P = U·diag(1, D⁻¹K^(−1/2)), U and D as in BNP.

    K = D⁻¹CD⁻¹ is the correlation matrix of the inputs, C their damped covariance and D² its diagonal, so that M = P Pᵀ is the
    inverse of E[ĥĥᵀ] damped feature by feature, whatever their scales. Without a bias C is E[hhᵀ].

    N samples do not determine n features' correlations: K is shrunk towards the identity, K ← (1−γ)K + γI with γ = sn/(N + sn), N the
    effective number of samples behind the running average. Of layers with many inputs the leading eigenvalues of K are kept and the
    others, which then differ little, get their mean (``rank``).

    The covariance is observed, and the root taken, on a schedule that is fixed by the number of steps: at steps 1, 2, 4, 8, …
    and then every ``every`` steps, from the ``observe_steps`` steps before. Between refreshes the map stands still, unless the bias is frozen or
    thawed: it is then one of E[hhᵀ], or of C, at once. Layers of other shapes
    than the first one, and of one shape where they are many, take turns: they are refreshed up to a period before these steps.

    Args:
        decay: ρ of the running covariance over the steps that are observed, in [0, 1).
        damping: ε ≥ 0, relative to each feature's E[h²]; rarely active inputs get more, as in :class:`~precond.BNP`.
        root: ``"symmetric"``, K^(−1/2), or ``"cholesky"``, L⁻ᵀ with K = LLᵀ: the same M, another z, a tenth of the cost.
        every: steps between refreshes.
        observe_steps: how many steps before a refresh are observed.
        shrinkage: s ≥ 0.
        samples: c ≥ 0; where it is not 0, batches that hold cn samples or more, convolutions' or sequences', are not averaged with those
            before, nor observed more than once before a refresh, and with fewer samples in proportion: as much as n features need.
        rank: r ≥ 1; where a layer has more than 4r inputs, K is taken as λ̄I + U(Λ − λ̄)Uᵀ, with its r leading eigenvalues Λ, their
            eigenvectors U and the mean λ̄ of the others, and the root is symmetric whatever ``root`` says. A refresh then takes n²r
            operations in place of n³, a product with a row of the weight 4nr in place of 2n². None: K as it is.
        power: p in [0, 1] of P = U·diag(1, D⁻¹K^(−p/2)), M being K^(−p) where features have scale 1: 1 whitens, 0 leaves BNP's arrow, and
            between them directions in which inputs vary little are favored less. Scales are units, and divided out whatever p is. With
            ``root="cholesky"`` 1.

    Raises:
        TypeError: (with an optimizer) where parameters are given instead of a module, whose inputs can be observed.
        ValueError: for a power outside of [0, 1], or other than 1 with ``root="cholesky"``.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])  # E[hhᵀ] = [[1, ½], [½, 1]]
        >>> whitening = precond.Whitening(damping=0.0, shrinkage=0.0, rank=None)
        >>> optimizer = precond.PreconditionedGD(model, preconditioner=whitening)
        >>> model(x).mean().backward(); _ = optimizer.step()  # the root is taken after the step
        >>> P = precond.preconditioner_of(optimizer).to_dense()
        >>> torch.testing.assert_close(P @ P.T @ torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.eye(2), atol=1e-5, rtol=0)

    References:
        Desjardins et al. (2015); Ledoit & Wolf (2004) for shrinkage; Benzing (2022), FOOF; Ye, Theorem 3;
        Tipping & Bishop (1999), Probabilistic principal component analysis, for K of a rank.
    """

    decay: float = 0.95
    damping: float = 1e-3
    root: Literal["symmetric", "cholesky"] = "symmetric"
    every: int = 100
    observe_steps: int = 5
    shrinkage: float = 1.0
    samples: float = 0.0
    rank: int | None = 64
    power: float = 1.0

    least_samples = 2  # one has no covariance

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("Whitening", decay=self.decay)
        checks.non_negative("Whitening", damping=self.damping, shrinkage=self.shrinkage, samples=self.samples)
        checks.positive("Whitening", every=self.every, observe_steps=self.observe_steps)
        if self.rank is not None:
            checks.whole("Whitening", rank=self.rank)
        if not 0 <= self.power <= 1:
            raise ValueError(f"Whitening: power must be in [0, 1], got {self.power!r}; 1 whitens, 0 standardizes")
        if self.root == "cholesky" and self.power != 1:
            raise ValueError(f"Whitening: root='cholesky' is one of power=1, got power={self.power!r}; use root='symmetric'")

    @property
    def request(self) -> Request:
        return _REQUEST

    @property
    def has_owner(self) -> bool:
        return True  # rows need nothing of each other, but each process would take the root

    def idle(self, step: int, turns: Iterable[int]) -> bool:
        return all([next_renewal(step, self.every, turn) - step >= self.observe_steps for turn in turns])

    def wants(self, state: State, part: LayerPart) -> list[bool]:
        away, steps = state.until_renewed(self.every, ahead=1), int(self.observe_steps)
        size = least(state[key_of("size", part)]) if self.samples and min(away) < steps else 0.0
        if size:
            steps = min(steps, math.ceil(self.samples * state[key_of("mean", part)].shape[-1] / size))
        return [k < steps for k in away]

    def rate(self, step: float, new: Moments) -> float | Sequence[float]:
        if not self.samples:
            return self.decay
        enough = self.samples * new.mean.shape[-1]
        return [min(max(1 - n / enough, 0.0), self.decay) for n in new.count.tolist()]

    def active(self, seen: Features) -> Tensor:
        found = super().active(seen)
        if not self.samples or seen.known is False:
            return found
        # Deviations are from the mean before. About the new one E|h − μ| may be less by |Δμ|: an input that has died, whose mean has
        # moved to where it always is now, deviated much from where it was, and would count as active.
        least_of_both = torch.minimum(found, seen.activity.lerp(least_activity(seen), seen.gain))
        return least_of_both if seen.known is True else torch.where(seen.known, least_of_both, found)

    def fresh(self, part: LayerPart, block: Block) -> dict[str, Tensor]:
        weight = block.leaves[part.weight].param
        groups, n = part.site.shape(self.request)
        root = Whole(self.root, self.power) if self.rank is None or n <= 4 * self.rank else Leading(int(self.rank), self.power)
        zeros = lambda *shape: torch.zeros(shape, dtype=state_dtype(weight.dtype), device=weight.device)  # noqa: E731
        return {
            **{name: torch.zeros(groups, dtype=state_dtype(weight.dtype)) for name in ("count", "noise", "size", "form")},
            "mean": zeros(groups, n),
            "covariance": zeros(groups, n, n),
            "activity": zeros(groups, n),
            **root.fresh(zeros(groups, n)),
        }

    def root_of(self, state: dict[str, Tensor]) -> Root:
        """How the root of a layer's correlations is kept."""
        return Leading(state["basis"].shape[-1], self.power) if "basis" in state else Whole(self.root, self.power)

    def arrow(self, part: LayerPart, state: State) -> tuple[Tensor, Tensor, float | Tensor]:
        return *self.scales(part, state), 1.0

    def observe(self, state: State, seen: Seen) -> None:
        super().observe(state, seen)
        for part in self.parts(state.block):
            if self.known(mine := self.statistics(part, state)):
                self.follow(part, mine)

    def follow(self, part: LayerPart, state: State) -> None:
        for some in self._strayed(part, state):
            own = State(state.block, {name: t[some] for name, t in state.items()})
            for name, identity in self.root_of(own).fresh(own["mean"]).items():
                own[name].copy_(identity)
            self._renew([(part, own)])

    def _strayed(self, part: LayerPart, state: State) -> list[slice]:
        """The groups whose bias was frozen or thawed since their root was taken: it is of other correlations than the scales are of."""
        other = -self._form(part)
        return state.kept("strayed", state["form"]._version, lambda: spans([form == other for form in state["form"].tolist()]))

    @staticmethod
    def _form(part: LayerPart) -> float:
        """Of what correlations a root is: 1 about the mean, −1 with no bias to center with; 0: the identity, or not known."""
        return -1.0 if part.bias is None else 1.0

    def _renew(self, some: Sequence[tuple[LayerPart, State]]) -> None:
        """Take the roots of some weights anew, those alike at once."""
        together: dict[Root, list[tuple[State, Correlation]]] = {}
        for part, mine in some:
            std = self.scales(part, mine)[1]
            mean = None if part.bias is not None else mine["mean"]  # with no bias to center with, E[hhᵀ]
            shrunk = 1 + self.shrinkage * std.shape[-1] * by_group(mine["noise"], std)  # 1/(1 − γ)
            K = Correlation(mine["covariance"], mean, std, shrunk)
            together.setdefault(self.root_of(mine), []).append((mine, K))
        for root, found in together.items():
            root.renew(*zip(*found, strict=True))
        for part, mine in some:
            mine["form"].fill_(self._form(part))

    def part_map(self, part: LayerPart, state: State, like: Vec, layout: Layout) -> LinearMap:
        if self._strayed(part, state):  # what a look finds before a step: it changes nothing
            self.follow(part, state := state.copied())
        # Before the first refresh the root is the identity, which leaves BNP's arrow.
        return super().part_map(part, state, like, layout) @ self.root_of(state).map(state, like, layout)

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        for some in spans([k == 0 for k in state.until_renewed(self.every)], self._at_once(state)):
            self.renew([state.span(some)])

    def renew(self, stacks: Sequence[State]) -> None:
        """Take the roots of stacks anew whose turn it is: those of which something is known."""
        found = [(part, self.statistics(part, stack)) for stack in stacks for part in self.parts(stack.block)]
        self._renew([(part, mine) for part, mine in found if self.known(mine)])

    def _at_once(self, state: State) -> float:
        """Of how many members whole roots are taken at once: an accelerator is to have no more memory for them than for a step.

        A root takes four matrices of its size or more, a step about four copies of the weights.
        """
        whole = [t for part in self.parts(state.block) if (t := state.get(key_of("factor", part))) is not None]
        if not whole or at_hand(whole[0]):
            return math.inf
        return max(1, len(state.block.turns) * sum(t.numel() for t in state.block.tensors) // sum(t.numel() for t in whole))

    def independent(self, state: State) -> dict[str, float]:
        """The share of independent directions in the inputs of each weight, by its name: n/tr(K²), K their correlations, (n, n).

        What N samples add to the squares of correlations, about n²/N in all, is taken off. Weights of which nothing is known are left out.
        """
        out: dict[str, float] = {}
        members = state.block.members if isinstance(state.block, Stack) else (state.block,)
        for part in self.parts(state.block):
            mine = self.statistics(part, state)
            if not self.known(mine):
                continue
            _, std = self.scales(part, mine)
            n = std.shape[-1]
            K = Correlation(mine["covariance"], None if part.bias is not None else mine["mean"], std, 1.0).whole()
            squares = torch.linalg.vector_norm(K, 2, (-2, -1)).square() - n * n * mine["noise"].to(K.device)
            shares = (n / squares.clamp_min(n)).view(len(members), -1).mean(1).cpu().tolist()
            out |= {member.leaves[part.weight].name: s for member, s in zip(members, shares, strict=True)}
        return out

    def samples_per_input(self, state: State) -> dict[str, float]:
        """The effective number of samples behind the correlations of each weight's inputs over that of inputs; the least of its groups."""
        members = state.block.members if isinstance(state.block, Stack) else (state.block,)
        out: dict[str, float] = {}
        for part in self.parts(state.block):
            mine = self.statistics(part, state)
            if self.known(mine):
                found = (1 / (mine["mean"].shape[-1] * mine["noise"])).view(len(members), -1).amin(1).tolist()
                out |= {member.leaves[part.weight].name: x for member, x in zip(members, found, strict=True)}
        return out
