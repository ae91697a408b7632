r"""Theorem 3 for the neurons of a layer of any model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precond.analysis.curvature.neurons.curvatures import chain_curvatures
from precond.analysis.curvature.neurons.form import LayerInputs, NeuronHessian
from precond.analysis.curvature.neurons.layer import Layer
from precond.analysis.curvature.neurons.passes import Slopes, opened
from precond.analysis.curvature.objective import Objective

_FEW = 8  # up to so many units, a double backprop each is faster than the recursion through all layers behind


def neuron_hessian(objective: Objective, layer: str, unit: int) -> NeuronHessian:
    r"""∇²_ŵ L = H_e S H_eᵀ of one neuron's weights ŵ = [b; w], exactly.

    H_e has the extended inputs ĥ_j = [1; h_j] as columns; S holds the second derivatives of the loss by the neuron's pre-activations
    a_j = ŵᵀĥ_j (with the 1/N of the mean): a diagonal where the layer is applied once per sample, one block of positions per sample for
    convolutions, sequences and layers that are called several times.

    Args:
        objective: the mean loss; its mode matters (batch statistics of BatchNorm couple the samples).
        layer: name of an ``nn.Linear`` or of a (transposed) convolution, such as ``"0"`` or ``"features.3"``.
        unit: which of its output features or channels, from 0.

    Raises:
        ValueError: for a layer or unit that does not exist, or a layer that the forward pass does not call.
        CoupledSamples: where the loss of a sample depends on another sample behind the layer.
        CurvatureError: where the layer is applied to its own outputs, or its weight or bias acts on the loss elsewhere as well.

    Example:
        Linear regression: S = I/N.

        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> loss = lambda out, y: 0.5 * (out - y).square().mean()
        >>> neuron = neuron_hessian(Objective(model, loss, [(x, torch.zeros(2, 1))]), "", 0)
        >>> neuron.s, neuron.to_dense()
        (tensor([0.5000, 0.5000]), tensor([[1., 1.],
                [1., 2.]]))

    References:
        Ye, Theorem 3 (eqs. 16–17).
    """
    return neuron_hessians(objective, layer, [unit])[0]


def neuron_hessians(objective: Objective, layer: str, units: Sequence[int] | None = None) -> tuple[NeuronHessian, ...]:
    """:func:`neuron_hessian` of several neurons of a layer, or of all, in as few passes as they need.

    Args:
        objective: the mean loss.
        layer: name of the layer.
        units: which neurons; None: all.

    Returns:
        A :class:`NeuronHessian` for each, in the order of ``units``.

    Raises:
        ValueError: for a layer or unit that does not exist, or batches in which the layer has different numbers of positions.
        CoupledSamples: where the loss of a sample depends on another sample behind the layer.
        CurvatureError: where the layer is applied to its own outputs, or its weight or bias acts on the loss elsewhere as well.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 3)
        >>> objective = Objective(model, torch.nn.MSELoss(), [(torch.ones(2, 1), torch.zeros(2, 3))])
        >>> [neuron.unit for neuron in neuron_hessians(objective, "")], neuron_hessians(objective, "", [2])[0].s  # 2/(3N)
        ([0, 1, 2], tensor([0.3333, 0.3333]))

    References:
        Ye, Theorem 3 (eqs. 16–17).
    """
    caller = "neuron_hessian"
    at = Layer(objective.model, layer, caller)
    chosen = [at.checked(unit, caller) for unit in (range(at.units) if units is None else units)]
    inputs: list[list[Tensor]] = [[] for _ in range(at.groups)]
    S: list[Tensor] = []
    for index in range(len(objective.batches)):
        with opened(objective, index, at) as slopes:
            slopes.check_params()
            if S and S[0].shape[2] != slopes.places.shape[1]:
                raise ValueError(
                    f"{caller}: layer {layer!r} is applied at {S[0].shape[2]} positions per sample in batch 0, at {slopes.places.shape[1]} in "
                    f"batch {index}; give an objective over batches of one length"
                )
            for group, h in enumerate(slopes.inputs):
                inputs[group].append(h[slopes.places.flatten()])
            S.append(_blocks(objective, index, slopes, chosen))
    bias = at.module.bias is not None
    H_e = [LayerInputs(extended(torch.cat(h), bias), bias) for h in inputs]
    s = torch.cat(S, dim=1)
    s = s[..., 0, 0] if s.shape[2] == 1 else s
    return tuple(NeuronHessian(layer, unit, H_e[at.group(unit)], one) for unit, one in zip(chosen, s, strict=True))


def _blocks(objective: Objective, index: int, slopes: Slopes, units: Sequence[int]) -> Tensor:
    """S of some units, (units, N, T, T)."""
    layer = slopes.layer
    if len(units) > _FEW and slopes.places.shape[1] == 1:
        found = chain_curvatures(objective, index, [layer.name]).get(layer.name)
        if found is not None:
            return found.T[list(units), :, None, None]
    return slopes.blocks(units)


def extended(rows: Tensor, bias: bool) -> Tensor:
    """H_e from inputs as rows."""
    h = rows.T
    return torch.cat([torch.ones_like(h[:1]), h]) if bias else h
