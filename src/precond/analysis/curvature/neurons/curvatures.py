r"""L''(a) of all neurons of all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from precond.analysis.curvature import batches
from precond.analysis.curvature.neurons.chain import Linear, chain, diagonals
from precond.analysis.curvature.neurons.layer import Layer
from precond.analysis.curvature.neurons.loss import loss_curvature
from precond.analysis.curvature.neurons.passes import NotCalled, opened
from precond.analysis.curvature.neurons.record import Record
from precond.analysis.curvature.objective import Objective


def unit_curvatures(objective: Objective, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    r"""∂²L/∂a_ji², exactly, for every unit i of linear layers that are applied once per sample j: the diagonals of S of all neurons.

    For a chain of linear layers, elementwise activations and BatchNorm at inference, however it is coded, a closed recursion from the outputs
    down costs a few gradients, whatever the number of units; C columns go down for C outputs, and n more from each curved layer of n units
    with another one below the next weight. In any other model it takes one double backprop per unit.

    Args:
        objective: the mean loss.
        layers: names of ``nn.Linear``; None: all that are called, once per sample.

    Returns:
        By name, (N, units), in the order of the samples, with the 1/N of the mean: ``result[layer][:, unit]`` is ``NeuronHessian.s``.

    Raises:
        ValueError: for a layer that does not exist, or is applied several times per sample (take ``neuron_hessians``).
        CoupledSamples: where the loss of a sample depends on another sample.

    Example:
        Logistic regression: ŷ(1 − ŷ)/N.

        >>> model = nn.Linear(1, 1).requires_grad_(False)
        >>> _ = nn.init.zeros_(model.weight), nn.init.zeros_(model.bias), model.requires_grad_()
        >>> loss = nn.BCEWithLogitsLoss()
        >>> unit_curvatures(Objective(model, loss, [(torch.ones(2, 1), torch.ones(2, 1))]))
        {'': tensor([[0.1250],
                [0.1250]])}

    References:
        Ye, Theorem 3.
    """
    model = objective.model
    if layers is None:
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    else:
        names = [Layer(model, name, "unit_curvatures").name for name in layers]
    parts: dict[str, list[Tensor]] = {}
    for index in range(len(objective.batches)):
        found = chain_curvatures(objective, index, names)
        for name in names:
            s = found.get(name)
            if s is None:
                s = _by_passes(objective, index, Layer(model, name, "unit_curvatures"), required=layers is not None)
            if s is not None:
                parts.setdefault(name, []).append(s)
    return {name: torch.cat(s) for name, s in parts.items()}


def chain_curvatures(objective: Objective, index: int, wanted: Sequence[str]) -> dict[str, Tensor]:
    """What the recursion gives in batch ``index``: the layers of the chain at the end of the model."""
    with objective.measuring(index), torch.no_grad():
        with Record() as record:
            at = objective.evaluate(index)
        if not isinstance(at.outputs, Tensor) or at.outputs.ndim != 2:
            return {}
        names = {id(m.weight): name for name, m in objective.model.named_modules() if type(m) is nn.Linear}
        steps = chain(record, at.outputs, names)
        if not any(isinstance(step, Linear) and step.name in wanted for step in steps):
            return {}
        with torch.enable_grad():
            loss = loss_curvature(at, objective.weights[index], batches.size((at.inputs, at.targets), index))
        return {} if loss is None else diagonals(steps, loss, wanted)


def _by_passes(objective: Objective, index: int, layer: Layer, required: bool) -> Tensor | None:
    """The same by one double backprop per unit; None for a layer that is not applied once per sample, unless it is required."""
    try:
        with opened(objective, index, layer) as slopes:
            positions = slopes.places.shape[1]
            if positions == 1:
                return slopes.blocks(range(layer.units))[:, :, 0, 0].T
    except NotCalled:
        if required:
            raise
        return None
    if required:
        raise ValueError(
            f"unit_curvatures: layer {layer.name!r} is applied at {positions} positions per sample, which have a block of second derivatives; "
            "take neuron_hessians(objective, layer)"
        )
    return None
