r"""K-FAC and EKFAC: a Gauss–Newton or Fisher matrix, layer by layer, as Kronecker products of what goes in and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from precond.algebra import checks
from precond.analysis.curvature.errors import CoupledSamples
from precond.analysis.curvature.keeping import Batch, differentiable
from precond.analysis.curvature.kronecker import Factor, InBasis, LayerwiseMap, Pair, Place
from precond.analysis.curvature.neurons.layer import Call, Layer, arrangements
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.analysis.curvature.outputs import checked, slopes
from precond.optim.inputs.moments import Request, widened

Factors = Literal["exact", "sampled", "empirical", "inputs"]
Sharing = Literal["expand", "reduce"]
_ENTRIES = 2**24  # of samples' gradients that are held at once
_BYTES = 2**30  # of what layers receive and what comes back to them, kept between two passes over the data


def kfac(
    objective: Objective, fisher: Factors = "exact", *, sharing: Sharing = "expand", samples: int = 1, seed: int = 0
) -> LayerwiseMap:
    r"""K ≈ G, block-diagonal over layers: B ⊗ A on each [W b] (out × in + 1), row-major, so that K vec(X) = vec(B X A).

    Let ĥ_nt = [h; 1] be the inputs of the layer at place t of sample n (a position of a sequence or an image, T of them), and
    δ_rnt = (∂f_n/∂a_nt)ᵀV_rn with ∇²_f L = Σ_r V_r V_rᵀ. The layer's block of the Gauss–Newton matrix is
    Σ_rn vec(Σ_t δ_rnt ĥ_ntᵀ) vec(Σ_t δ_rnt ĥ_ntᵀ)ᵀ. In its place stand

        expand: A = 1/(NT) Σ_nt ĥ_nt ĥ_ntᵀ,  B = Σ_rnt δ_rnt δ_rntᵀ;
        reduce: A = 1/N Σ_n h̄_n h̄_nᵀ, h̄_n the mean of ĥ_nt over t,  B = Σ_rn δ̄_rn δ̄_rnᵀ, δ̄_rn = Σ_t δ_rnt.

    Without weight sharing (T = 1) they are one. The block is exact where the δ are the same in all samples, as in a deep linear network under
    the squared error: there ``"expand"`` where each output depends on one place, ``"reduce"`` where it is a mean over them.

    Args:
        objective: a mean loss whose model returns one tensor (N, …). All its parameters must be weights and biases of linear layers and
            convolutions (of any dimension, transposed, grouped); name these in ``params`` where there are others.
        fisher: what stands for ∇²_f: ``"exact"`` (a backward pass for each of its rank r, as many as outputs at most), ``"sampled"`` or
            ``"empirical"`` (:func:`fisher`), or ``"inputs"``: B = I, no backward pass at all (FOOF).
        sharing: as above.
        samples: draws per sample of ``"sampled"``.
        seed: of the draws.

    Returns:
        A map with ``mv`` and ``solve``, ``inverse(damping)``, ``preconditioner(damping)``, ``eigenvalues`` and ``factors``.

    Raises:
        ValueError: for parameters that belong to no such layer, or to several.
        CoupledSamples: where the loss is no sum over samples.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> K = kfac(Objective(model, lambda out, y: 0.5 * (out - y).square().mean(), [(x, torch.zeros(2, 1))]))
        >>> K.to_dense()  # one linear layer: exact
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
        >>> K.inverse(damping=0.5).to_dense()
        tensor([[1.0000, 0.0000],
                [0.0000, 0.4000]])

    References:
        Martens & Grosse (2015); Grosse & Martens (2016), convolutions; Eschenhagen, Immer, Turner, Schneider & Hennig (2023), section 3
        (expand, reduce); Benzing (2022), FOOF.
    """
    layers = _layers("kfac", objective, fisher, sharing, samples)
    return _kfac(objective, _Passes("kfac", objective, layers, fisher, sharing == "reduce", samples, seed), sharing)


def _kfac(objective: Objective, passes: _Passes, sharing: Sharing) -> LayerwiseMap:
    layers = passes.layers
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    places = dict.fromkeys(layers, 0)
    for batch in passes:
        for name, layer in layers.items():
            h = batch.inputs(name)
            if sharing == "reduce":
                h = h[:, batch.arranged(name)].mean(2)  # (groups, N, T, n) over T
            _add(A, name, _moment(h, layer.place))
            places[name] += h.shape[1]
        for back in batch.backward():
            for name in layers:
                d = back(name)
                if sharing == "reduce":
                    d = d[:, batch.arranged(name)].sum(2)
                _add(B, name, d.mT @ d)
    for name, layer in layers.items():
        A[name] /= places[name]
        if name not in B:  # no backward pass at all
            groups, rows = layer.place.layout.groups, layer.layer.units // layer.place.layout.groups
            B[name] = torch.eye(rows, dtype=A[name].dtype, device=A[name].device).expand(groups, -1, -1)
    factors: dict[str, Factor] = {name: Pair(B[name], A[name]) for name in layers}
    return LayerwiseMap({name: layer.place for name, layer in layers.items()}, factors, _like(objective))


def ekfac(
    objective: Objective,
    fisher: Literal["exact", "sampled", "empirical"] = "exact",
    *,
    sharing: Sharing = "expand",
    samples: int = 1,
    seed: int = 0,
) -> LayerwiseMap:
    r"""K = (U ⊗ V) diag(S) (U ⊗ V)ᵀ on each layer's [W b]: K-FAC's eigenvectors, and the diagonal S of the layer's block in them.

    S_ij = Σ_rn (Uᵀ(Σ_t δ_rnt ĥ_ntᵀ)V)²_ij with the symbols of :func:`kfac`, whose eigenvalues b_i a_j it replaces. Of all diagonals in this
    basis it is nearest to the layer's block of the Gauss–Newton matrix in the Frobenius norm; its trace is that of the block.

    Args:
        objective, fisher, sharing, samples, seed: as of :func:`kfac`; ``sharing`` decides the basis alone.

    Example:
        >>> import torch
        >>> from precond.analysis.curvature import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, lambda out, y: 0.5 * (out - y).square().mean(), [(x, torch.zeros(2, 1))])
        >>> ekfac(objective).to_dense()  # one linear layer: exact
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])

    References:
        George, Laurent, Bouthillier, Ballas & Vincent (2018), Fast approximate natural gradient descent in a Kronecker-factored eigenbasis.
    """
    checks.one_of("ekfac", "fisher", fisher, ["exact", "sampled", "empirical"])
    layers = _layers("ekfac", objective, fisher, sharing, samples)
    passes = _Passes("ekfac", objective, layers, fisher, True, samples, seed, keep=_BYTES)
    K = _kfac(objective, passes, sharing)
    S: dict[str, Tensor] = {}
    for batch in passes:
        turned = {name: _turned(batch.inputs(name), known.place, K.factors[name].basis[1]) for name, known in layers.items()}
        for back in batch.backward():
            for name in layers:
                d = back(name) @ K.factors[name].basis[0]
                _add(S, name, _squared(d, turned[name], batch.arranged(name)))
    factors: dict[str, Factor] = {name: InBasis(*K.factors[name].basis, S[name]) for name in layers}
    return LayerwiseMap(K.places, factors, K.like)


def _moment(h: Tensor, place: Place) -> Tensor:
    """Σ ĥĥᵀ, (groups, n, n), with the bias's one where there is a bias: [[Σhhᵀ, Σh], [Σhᵀ, count]]."""
    if place.weight is None:
        return h.new_full((h.shape[0], 1, 1), h.shape[1])
    if place.bias is None:
        return h.mT @ h
    n = h.shape[2]
    out = h.new_empty(h.shape[0], n + 1, n + 1)
    out[:, :n, :n] = h.mT @ h
    out[:, :n, n] = out[:, n, :n] = h.sum(1)
    out[:, n, n] = h.shape[1]
    return out


def _turned(h: Tensor, place: Place, V: Tensor) -> Tensor:
    """ĥV of all places, (groups, places, n)."""
    if place.weight is None:
        return V.expand(-1, h.shape[1], -1)
    return h @ V if place.bias is None else torch.baddbmm(V[:, -1:], h, V[:, :-1])


def _squared(d: Tensor, h: Tensor, places: Tensor) -> Tensor:
    """Σ_n (Σ_t δ_nt h_ntᵀ)² entry by entry, (groups, rows, n), of δ (groups, places, rows) and h (groups, places, n)."""
    if places.shape[1] == 1:
        return d.square().mT @ h.square()
    total = d.new_zeros(d.shape[0], d.shape[2], h.shape[2])
    for some in places.split(max(1, _ENTRIES // max(total.numel(), 1))):
        total += (d[:, some].mT @ h[:, some]).square().sum(1)
    return total


@dataclass(frozen=True, eq=False)
class _Known:
    """A layer and where its parameters stand."""

    layer: Layer
    place: Place


class _Pass:
    """A batch forwarded, with what each layer received, and what comes back to it.

    Attributes:
        keep: whether what was computed is kept for the next time.
    """

    def __init__(self, layers: dict[str, _Known], calls: dict[str, list[Call]], at: Evaluation, V: Tensor | None, sure: bool):
        self.layers, self.calls, self.f, self.V, self.sure = layers, calls, at.outputs, V, sure
        self._deltas = [call.delta for name in layers for call in calls[name]]
        self._slopes: list[dict[str, Tensor]] = []
        self._inputs: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}
        self.keep = False

    @property
    def bytes(self) -> int:
        """Of all that would be kept, about: what comes back for each r, and what is received, patches of kernels as such."""
        each = sum(t.numel() * t.element_size() for t in self._deltas) * (1 if self.V is None else len(self.V))
        patches = (known.layer.tap.weights[0].param[0].numel() * call.delta.numel() / max(known.layer.units, 1)
                   for name, known in self.layers.items() for call in self.calls[name])  # fmt: skip
        return each + int(sum(patches)) * 8

    def inputs(self, name: str) -> Tensor:
        """h at all places, (groups, places, n)."""
        if name in self._inputs:
            return self._inputs[name]
        h = widened(_joined([self.layers[name].layer.inputs(call) for call in self.calls[name]], 1))
        if self.keep:
            self._inputs[name] = h
        return h

    def backward(self) -> Iterator[Callable[[str], Tensor]]:
        """For each r, a function that gives δ_r of a layer at all its places, (groups, places, rows)."""
        if self._slopes:
            for found in self._slopes:
                yield found.__getitem__
            return
        for r, cotangent in enumerate(() if self.V is None else self.V):
            found = self._back(cotangent, r < len(self.V) - 1)  # type: ignore[arg-type]
            if self.keep:
                self._slopes.append(found)
            yield found.__getitem__

    def arranged(self, name: str) -> Tensor:
        """The places of each sample, (N, T): those that a change of the outputs of half of the samples alone comes back to.

        Raises:
            CoupledSamples: where there are none.
        """
        if not self._places:
            options = {name: self._options(name) for name in self.layers}
            if self.sure and all(len(found) == 1 for found in options.values()):
                self._places = {name: found[0] for name, found in options.items()}
            else:
                self._places = self._separated(options)
        return self._places[name]

    def _separated(self, options: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        N = self.f.shape[0]
        inside = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) < N // 2).to(self.f.device)
        half = torch.ones_like(self.f) * inside.to(self.f).view(-1, *[1] * (self.f.ndim - 1))
        back, places = self._back(half, True), {}
        for name, possible in options.items():
            fits = [at for at in possible if N == 1 or not bool(back[name][:, at[~inside]].any())]
            if not fits:
                raise CoupledSamples(
                    f"the outputs of one sample depend on layer {name!r} in another, or its places belong to no one sample each; use "
                    "Objective(..., mode='eval') where batch normalization is in training mode, or sharing='expand' of kfac"
                )
            places[name] = fits[0]
        return places

    def _options(self, name: str) -> list[Tensor]:
        layer, calls = self.layers[name].layer, self.calls[name]
        each = [list(arrangements(layer.lead(c.delta), self.f.shape[0])) for c in calls]
        offsets = [0, *accumulate(layer.rows(c.delta).shape[0] for c in calls)]
        return [
            torch.cat([at + offset for at, offset in zip(parts, offsets, strict=False)], 1).to(self.f.device)
            for parts in zip(*each, strict=False)
        ]

    def _back(self, cotangent: Tensor, again: bool) -> dict[str, Tensor]:
        """What of a cotangent of the outputs comes back to each layer, (groups, places, rows)."""
        again = again or self.keep
        found = differentiable(
            lambda: torch.autograd.grad(
                self.f, self._deltas, cotangent, retain_graph=again, allow_unused=True, materialize_grads=True
            )
        )
        by_call, out = iter(found), {}
        for name, known in self.layers.items():
            rows = widened(_joined([known.layer.rows(next(by_call)) for _ in self.calls[name]], 0))
            out[name] = rows.view(len(rows), known.layer.groups, -1).transpose(0, 1)
        return out


class _Passes:
    """Passes over the data, as often as asked, of which those that fit are kept.

    Args:
        separate: whether the places of samples will be asked for.
        keep: bytes to keep.
    """

    def __init__(
        self,
        caller: str,
        objective: Objective,
        layers: dict[str, _Known],
        fisher: Factors,
        separate: bool,
        samples: int,
        seed: int,
        keep: float = 0,
    ):
        self.caller, self.objective, self.layers, self.fisher, self.separate = caller, objective, layers, fisher, separate
        self.samples, self.seed, self._room = samples, seed, keep
        self._kept: dict[int, _Pass] = {}

    def __iter__(self) -> Iterator[_Pass]:
        for index in range(len(self.objective.batches)):
            if index in self._kept:
                yield self._kept[index]
            else:
                with self.objective.measuring(index):
                    found = self._made(index)
                    if self._room >= found.bytes:
                        self._room -= found.bytes
                        found.keep, self._kept[index] = True, found
                    yield found

    def _made(self, index: int) -> _Pass:
        o = self.objective
        with ExitStack() as stack:
            calls = {name: stack.enter_context(known.layer.perturbed()) for name, known in self.layers.items()}
            at = o.evaluate(index)
        for name, seen in calls.items():
            if not seen:
                raise ValueError(
                    f"{self.caller}: layer {name!r} was not called as a module in the forward pass, so its inputs are not known; leave "
                    "its parameters out of the objective's params"
                )
        batch = Batch(index, o.weights[index], o.sizes[index], o.total)
        V = None if self.fisher == "inputs" else slopes(at, batch, self.fisher, self.samples, self.seed, self.caller)
        found = _Pass(self.layers, calls, at, V, o.mode == "eval")
        if self.separate:
            found.arranged(next(iter(self.layers)))  # before a graph is used up
        return found


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _layers(caller: str, objective: Objective, fisher: str, sharing: str, samples: int) -> dict[str, _Known]:
    checked(caller, fisher, samples, ("exact", "sampled", "empirical", "inputs"))
    checks.one_of(caller, "sharing", sharing, ["expand", "reduce"])
    position = {id(p): i for i, p in enumerate(objective.params)}
    twins = objective.standing_for
    found: dict[str, _Known] = {}
    owner: dict[int, str] = {}
    for name, module in objective.model.named_modules():
        if not Layer.is_one(module):
            continue
        at = [
            None if p is None else position.get(id(twins(p)))
            for p in (module._parameters.get("weight"), module._parameters.get("bias"))
        ]
        if at == [None, None]:
            continue
        for i in at:
            if i is not None and owner.setdefault(i, name) != name:
                raise ValueError(
                    f"{caller}: parameter {objective.names[i]!r} belongs to the layers {owner[i]!r} and {name!r}, whose inputs differ; leave "
                    "it out of the objective's params, or take gauss_newton(objective)"
                )
        layer = Layer(objective.model, name, caller)
        layout = layer.tap.layout(layer.tap.weights[0], Request("covariance"))
        found[name] = _Known(layer, Place(at[0], at[1], layout))
    without = [objective.names[i] for i in range(len(objective.params)) if i not in owner]
    if without:
        raise ValueError(
            f"{caller}: {', '.join(map(repr, without))} belong to no linear layer or convolution; name the others in "
            "Objective(..., params=[...])"
        )
    return found


def _like(objective: Objective) -> Any:
    return tuple(p.detach() for p in objective.params)


def _add(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    if name in sums:
        sums[name] += x
    else:
        sums[name] = x
