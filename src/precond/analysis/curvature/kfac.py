r"""K-FAC and EKFAC: a Gauss–Newton or Fisher matrix, layer by layer, as Kronecker products of what goes in and what comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precond.algebra import checks
from precond.analysis.curvature.graph import uses
from precond.analysis.curvature.graph_cache import Batch
from precond.analysis.curvature.kfac_passes import (
    Known,
    Pass,
    add_to,
    extended_moment,
    gram,
    in_basis,
    joined,
    squared_entries,
    tensor_like,
)
from precond.analysis.curvature.kronecker import Factor, InBasis, LayerwiseMap, Pair, Place
from precond.analysis.curvature.neurons.layer import Edge, Layer
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.analysis.curvature.outputs import checked, slopes
from precond.optim.inputs.moments import Request

Factors = Literal["exact", "sampled", "empirical", "inputs"]
Sharing = Literal["expand", "reduce"]
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
                h = [joined(h)[:, batch.arranged(name)].mean(2)[:, None]]  # (groups, N, T, n) over T
            add_to(A, name, extended_moment(h, layer.place))
            places[name] += sum(part.shape[1] * part.shape[2] for part in h)
        for back in batch.backward():
            for name in layers:
                d = back(name)
                if sharing == "reduce":
                    d = [joined(d)[:, batch.arranged(name)].sum(2)[:, None]]
                add_to(B, name, gram(d))
    for name, layer in layers.items():
        A[name] /= places[name]
        if name not in B:  # no backward pass at all
            groups, rows = layer.place.layout.groups, layer.layer.units // layer.place.layout.groups
            B[name] = torch.eye(rows, dtype=A[name].dtype, device=A[name].device).expand(groups, -1, -1)
    factors: dict[str, Factor] = {name: Pair(B[name], A[name]) for name in layers}
    return LayerwiseMap({name: layer.place for name, layer in layers.items()}, factors, tensor_like(objective))


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
        turned = {
            name: in_basis(joined(batch.inputs(name)), known.place, K.factors[name].basis[1]) for name, known in layers.items()
        }
        for back in batch.backward():
            for name in layers:
                d = joined(back(name)) @ K.factors[name].basis[0]
                add_to(S, name, squared_entries(d, turned[name], batch.arranged(name)))
    factors: dict[str, Factor] = {name: InBasis(*K.factors[name].basis, S[name]) for name in layers}
    return LayerwiseMap(K.places, factors, K.like)


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
        layers: dict[str, Known],
        fisher: Factors,
        separate: bool,
        samples: int,
        seed: int,
        keep: float = 0,
    ):
        self.caller, self.objective, self.layers, self.fisher, self.separate = caller, objective, layers, fisher, separate
        self.samples, self.seed, self._room = samples, seed, keep
        self._kept: dict[int, Pass] = {}

    def __iter__(self) -> Iterator[Pass]:
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

    def _used_by_layers_alone(self, at: Evaluation, calls: dict[str, list[Edge]]) -> None:
        """Refuse a weight that a function takes besides its layer, such as that of a tied autoencoder."""
        counts, graph = uses(tuple(t for t in tree_leaves(at.outputs) if isinstance(t, Tensor)))
        for name, known in self.layers.items():
            heard = sum(call.edge.node in graph for call in calls[name])
            for i in (known.place.weight, known.place.bias):
                if i is not None and counts[self.objective.standing_for(self.objective.params[i])] > heard:
                    _refuse_other_uses(self.caller, self.objective.names[i], "a function")

    def _made(self, index: int) -> Pass:
        o = self.objective
        with ExitStack() as stack:
            calls = {name: stack.enter_context(known.layer.watched()) for name, known in self.layers.items()}
            at = o.evaluate(index)
        for name, seen in calls.items():
            if not seen:
                raise ValueError(
                    f"{self.caller}: layer {name!r} was not called as a module in the forward pass, so its inputs are not known; leave "
                    "its parameters out of the objective's params"
                )
        self._used_by_layers_alone(at, calls)
        batch = Batch(index, o.weights[index], o.sizes[index], o.total)
        V = None if self.fisher == "inputs" else slopes(at, batch, self.fisher, self.samples, self.seed, self.caller)
        found = Pass(self.layers, calls, at, V, o.mode == "eval")
        if self.separate:
            found.arranged(next(iter(self.layers)))  # before a graph is used up
        return found


def _refuse_other_uses(caller: str, name: str, who: str) -> NoReturn:
    raise ValueError(
        f"{caller}: parameter {name!r} is used by {who} too, of which its layer does not know; leave it out of the objective's params, or "
        "take gauss_newton(objective)"
    )


def _layers(caller: str, objective: Objective, fisher: str, sharing: str, samples: int) -> dict[str, Known]:
    checked(caller, fisher, samples, ("exact", "sampled", "empirical", "inputs"))
    checks.one_of(caller, "sharing", sharing, ["expand", "reduce"])
    position = {id(p): i for i, p in enumerate(objective.params)}
    twins = objective.standing_for
    found: dict[str, Known] = {}
    owner: dict[int, str] = {}
    others: dict[int, str] = {}
    for name, module in objective.model.named_modules():
        if not Layer.is_one(module):
            others |= {
                position[id(q)]: name for p in module._parameters.values() if p is not None and id(q := twins(p)) in position
            }
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
        found[name] = Known(layer, Place(at[0], at[1], layout))
    for i in owner.keys() & others.keys():
        _refuse_other_uses(caller, objective.names[i], repr(others[i]))
    without = [objective.names[i] for i in range(len(objective.params)) if i not in owner]
    if without:
        raise ValueError(
            f"{caller}: {', '.join(map(repr, without))} belong to no linear layer or convolution; name the others in "
            "Objective(..., params=[...])"
        )
    return found
