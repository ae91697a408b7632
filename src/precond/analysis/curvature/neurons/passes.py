r"""S of any model: blocks of ∂²L/∂a∂aᵀ by double backprop through the pre-activations a of one layer, all samples at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from precond.analysis.curvature import batches
from precond.analysis.curvature.errors import CoupledSamples, CurvatureError, NoSecondDerivative
from precond.analysis.curvature.graph import size_of
from precond.analysis.curvature.neurons.layer import Call, Layer, arrangements
from precond.analysis.curvature.neurons.loss import loss_curvature
from precond.analysis.curvature.neurons.piecewise import piecewise_linear, pulled_back
from precond.analysis.curvature.neurons.record import Record
from precond.analysis.curvature.objective import Evaluation, Objective

_CHECKED = 1e-3  # relative difference up to which two float32 computations of one gradient count as equal


@contextmanager
def opened(objective: Objective, index: int, layer: Layer) -> Iterator[Slopes]:
    """A layer in batch ``index``, ready to be differentiated by its pre-activations.

    Raises:
        NotCalled: where the forward pass does not call it.
        CoupledSamples, CurvatureError: where S has no block per sample, or its inputs depend on its outputs.
    """
    with objective.measuring(index):
        with layer.perturbed() as calls, Record() as record:
            at = objective.evaluate(index)
        if not calls:
            raise NotCalled(
                f"layer {layer.name!r} was not called as a module in the forward pass (nn.MultiheadAttention applies out_proj itself, and "
                "F.linear(x, layer.weight) passes by the module); choose a layer that is called"
            )
        _refuse_recurrence(layer, calls)
        yield Slopes(objective, index, layer, calls, at, record)


class NotCalled(ValueError):
    """The forward pass does not call a layer."""


class Slopes:
    """∂L/∂a of all calls of a layer, whose own derivatives by a are taken row by row of H.

    Attributes:
        places: of each sample, (N, T): numbers of rows of all calls.
        inputs: what the weight meets at all of them, (groups, places, n).
    """

    def __init__(self, objective: Objective, index: int, layer: Layer, calls: Sequence[Call], at: Evaluation, record: Record):
        self.layer, self.calls, self.model = layer, calls, objective.model
        self.at, self.record, self.weight = at, record, objective.weights[index]
        self.deltas = tuple(c.delta for c in calls)
        self.loss = at.loss * self.weight
        if not torch.isfinite(self.loss):
            raise ValueError(
                f"the loss of batch {index} is {at.loss.item()}; curvature needs finite losses, look for divergence or bad data"
            )
        g = torch.autograd.grad(self.loss, self.deltas, create_graph=True, allow_unused=True) if self.loss.requires_grad else ()
        self.g = tuple(
            torch.zeros_like(d) if t is None else t for t, d in zip(g or [None] * len(calls), self.deltas, strict=True)
        )
        self.curved = tuple(t for t in self.g if t.requires_grad)
        self.size = size_of((self.loss, *self.g))
        self.places = self._arranged(batches.size((at.inputs, at.targets), index)).to(self.loss.device)
        self.inputs = torch.cat([layer.inputs(call) for call in calls], dim=1)

    @property
    def rows(self) -> Tensor:
        """g as (places of all calls, units)."""
        return torch.cat([self.layer.rows(t) for t in self.g])

    def products(self, rows: Tensor, batched: bool = False) -> Tensor:
        """H V for V given as rows, (places, units), or several of them."""
        counts = [self.layer.rows(d).shape[0] for d in self.deltas]
        v = [self.layer.back(r, d) for r, d in zip(rows.split(counts, dim=-2), self.deltas, strict=True)]
        chosen = [x for x, t in zip(v, self.g, strict=True) if t.requires_grad]
        if not self.curved:
            return torch.zeros_like(rows)
        try:
            found = torch.autograd.grad(
                self.curved, self.deltas, chosen, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        except (RuntimeError, NotImplementedError) as error:
            if not batched and ("derivative" in str(error) or "backward" in str(error)):
                raise NoSecondDerivative(f"no second derivative: {str(error).splitlines()[0]}") from error
            raise
        parts = [torch.zeros_like(x) if t is None else t for t, x in zip(found, v, strict=True)]
        if not batched:
            return torch.cat([self.layer.rows(t) for t in parts])
        return torch.stack([torch.cat([self.layer.rows(t) for t in one]) for one in zip(*parts, strict=True)])

    def check_params(self) -> None:
        """Raise where the Hessian is not H_e S H_eᵀ: where L depends on the weight or the bias otherwise than by a, which is Wh + b.

        Of a the gradients are Σ g hᵀ and Σ g; elsewhere there is none, nor a second derivative, as of a penalty at 0.
        """
        own = {name: p for name, p in self.layer.params.items() if p.requires_grad}
        if not own or not self.loss.requires_grad:
            return
        twins = [self.calls[0].params[name] for name in own]
        elsewhere = torch.autograd.grad(self.loss, list(own.values()), create_graph=True, allow_unused=True)
        here = torch.autograd.grad(self.loss, twins, retain_graph=True, materialize_grads=True)
        rows = self.rows.detach().to(self.inputs.dtype)
        g = rows.reshape(len(rows), self.layer.groups, -1).permute(1, 2, 0)
        for name, other, found in zip(own, elsewhere, here, strict=True):
            if name == "weight":
                h, actual = self.inputs, self.layer.view(found)
            else:
                h, actual = torch.ones_like(g.mT[..., :1]), found.view_as(g[..., :1])
            off = torch.linalg.vector_norm(actual.to(h) - g @ h) > _CHECKED * torch.linalg.vector_norm(g.abs() @ h.abs())
            if off or (other is not None and _depends(other, own[name])):
                raise CurvatureError(
                    f"the {name} of layer {self.layer.name!r} acts on the loss outside the layer as well (a tied layer, or a penalty in the "
                    "loss), so its Hessian is not H_e S H_eᵀ alone; leave the penalty out of the loss and add its second derivative, or take "
                    "hessian(objective)"
                )

    def _arranged(self, samples: int) -> Tensor:
        """The places of each sample, (samples, positions).

        Raises:
            CoupledSamples: where ∂L/∂a of one sample changes with a of another.
        """
        possible: list[list[Tensor]] = [list(arrangements(self.layer.lead(d), samples)) for d in self.deltas]
        offsets = torch.tensor([0, *(self.layer.rows(d).shape[0] for d in self.deltas)]).cumsum(0).tolist()
        options = [
            torch.cat([at + offset for at, offset in zip(ats, offsets, strict=False)], dim=1)
            for ats in zip(*possible, strict=False)
        ]
        if not options:
            raise ValueError(
                f"layer {self.layer.name!r} has pre-activations of shape {tuple(self.deltas[0].shape)} for {samples} samples, which do not "
                "belong to one sample each in any regular order; give batches of one sample"
            )
        for places in options:
            if samples == 1 or self._separate(places):
                return places
        statistics = [
            name
            for name, m in self.model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
        ]
        remedy = (
            f"batch normalization {statistics[0]!r} uses the batch's statistics: use Objective(..., mode='eval')"
            if statistics
            else "is it computed within the batch (a contrastive loss, a normalization over samples)? hessian(objective) covers such losses"
        )
        raise CoupledSamples(
            f"the loss of one sample depends on the pre-activations of layer {self.layer.name!r} for another, so S has no block per "
            f"sample; {remedy}"
        )

    def _separate(self, places: Tensor) -> bool:
        """Whether H maps vectors on a random half of the samples into that half (exactly: the rest is computed from zeros)."""
        generator = torch.Generator().manual_seed(0)
        inside = torch.randperm(len(places), generator=generator) < len(places) // 2
        like = self.rows
        v = torch.zeros_like(like)
        own = places[inside].flatten().to(v.device)
        v[own] = torch.rand(len(own), v.shape[1], generator=generator).to(v) + 0.5
        other = places[~inside].flatten().to(v.device)
        return not bool(self.products(v)[other].any())

    def blocks(self, units: Sequence[int]) -> Tensor:
        """S of each unit, (units, N, T, T)."""
        found = self._blocks_of_outputs(units)
        return self._blocks_by_products(units) if found is None else found

    def _blocks_of_outputs(self, units: Sequence[int]) -> Tensor | None:
        """Jᵀ(∇²_f ℓ)J where all behind the layer is piecewise linear and there are fewer outputs than units and positions; else None."""
        f, (samples, positions) = self.at.outputs, self.places.shape
        if not isinstance(f, Tensor) or f.numel() >= samples * positions * len(units):
            return None
        if not piecewise_linear(self.record, self.deltas, f):
            return None
        loss = loss_curvature(self.at, self.weight, samples)
        if loss is None:
            return None
        rows, w = pulled_back(f, self.deltas, loss)
        J = torch.stack([torch.cat([self.layer.rows(t) for t in one])[self.places][..., list(units)] for one in rows])
        left = J if w is None else J * w[:, :, None, None]
        return torch.einsum("rntu,rnsu->unts", left, J)

    def _blocks_by_products(self, units: Sequence[int]) -> Tensor:
        """One product of H per unit and position."""
        rows, at = self.rows.detach(), self.places
        samples, positions = at.shape
        S = rows.new_empty(len(units), samples, positions, positions)
        wanted = [(k, unit, t) for k, unit in enumerate(units) for t in range(positions)]
        chunk = self.size.chunk if self.size.batchable and len(wanted) > 1 else 1
        for start in range(0, len(wanted), chunk):
            part = wanted[start : start + chunk]
            V = rows.new_zeros(len(part), *rows.shape)
            for i, (_, unit, t) in enumerate(part):
                V[i, at[:, t], unit] = 1
            for (k, unit, t), one in zip(part, self._block_product(V), strict=True):
                S[k, :, :, t] = one[at, unit]
        return (S + S.mT) / 2

    def _block_product(self, V: Tensor) -> Tensor | list[Tensor]:
        if len(V) > 1:
            try:
                return self.products(V, True)
            except (RuntimeError, NotImplementedError):
                pass  # an operation without a batching rule; if it is something else, it comes again
        return [self.products(v) for v in V]


def _refuse_recurrence(layer: Layer, calls: Sequence[Call]) -> None:
    """Raise where an input of a call depends on the outputs of an earlier one."""
    for i, call in enumerate(calls[1:], 1):
        x = call.input
        if x.requires_grad:
            earlier = torch.autograd.grad(
                x, [c.delta for c in calls[:i]], torch.zeros_like(x), retain_graph=True, allow_unused=True
            )
            if any(t is not None for t in earlier):
                raise CurvatureError(
                    f"layer {layer.name!r} is applied to its own outputs (call {i + 1} of {len(calls)}), so its inputs change with its weights "
                    "and ∇² is not of the form H_e S H_eᵀ; take hessian(Objective(..., params=[the weight, the bias])) instead"
                )


def _depends(gradient: Tensor, p: Tensor) -> bool:
    """Whether a gradient by p is not 0, or not in the neighbourhood of p: a penalty that is multiplied by 0 has none."""
    if gradient.any():
        return True
    if not gradient.requires_grad:
        return False
    weights = torch.linspace(1, 2, gradient.numel(), dtype=gradient.dtype, device=gradient.device).view_as(gradient)
    (second,) = torch.autograd.grad(gradient, p, weights, retain_graph=True, allow_unused=True)
    return second is not None and bool(second.any())
