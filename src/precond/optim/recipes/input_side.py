"""Descent in the coordinates of layer inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from precond.algebra import checks
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import BNP, Preconditioner, Whitening
from precond.optim.recipes.adam import adamw
from precond.optim.recipes.making import make, recipe
from precond.optim.regularizers import L2, Regularizer


def _bnp(group: Mapping[str, Any]) -> Choice:
    P = BNP(group["decay"], group["damping"], group["conv"], group["width_scaling"])
    momentum = Momentum(group["momentum"], "heavy_ball", start="first_gradient")
    return Choice(P, momentum, (L2(group["weight_decay"] / 2, space="z"),))


@recipe
def bnp(
    params: Params,
    lr: float | Tensor = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay: float = 0.99,
    damping: float = 0.01,
    conv: Literal["channel", "patch"] = "channel",
    width_scaling: bool = False,
    *,
    maximize: bool = False,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """Gradient descent in the coordinates of standardized layer inputs (Lange, Helfrich & Ye, 2022; Ye, eqs. 25–27).

    Raw features want standardizing all the same: the first outputs are as large as they are, and gradients of such a loss far too long for
    the default rate.

    Args:
        params: the model, whose inputs are observed.
        lr, momentum: as in :func:`sgd`.
        weight_decay: decoupled: λ‖z‖² with λ = weight_decay/2.
        decay, damping, conv, width_scaling: see :class:`~precond.BNP`.
        regularizers, options: as in :func:`sgd`.
        maximize: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Raises:
        TypeError: where parameters are given instead of a module, whose inputs can be observed.

    Example:
        >>> import torch, precond
        >>> x = torch.tensor([[-1.0, -100.0], [1.0, -100.0], [-1.0, 100.0], [1.0, 100.0]])
        >>> y = x @ torch.tensor([[2.0], [0.5]]) + 3  # least squares with inputs that are badly scaled, but not correlated
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = precond.bnp(model, lr=1.0, damping=0.0)
        >>> (0.5 * (model(x) - y).square().mean()).backward(); _ = optimizer.step()  # one step: M = H⁻¹
        >>> [round(v, 2) for v in (*model.weight[0].tolist(), model.bias.item())]
        [2.0, 0.5, 3.0]
    """
    checks.fraction("bnp", momentum=momentum, decay=decay)
    checks.non_negative("bnp", damping=damping, weight_decay=weight_decay)
    of_map = {"decay": decay, "damping": damping, "conv": conv, "width_scaling": width_scaling}
    defaults = {"momentum": momentum, "weight_decay": weight_decay, **of_map, "maximize": maximize}
    options.setdefault("statistics_from", "loss")  # P is not made of gradients
    return make("bnp", params, lr, _bnp, defaults, {}, {}, regularizers, options)


@partial(recipe, of=adamw)
def whitening(
    params: Params,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    inputs: Preconditioner | None = None,
    **options: Any,
) -> PreconditionedGD:
    """AdamW in the coordinates of whitened layer inputs: ``adamw(..., inputs=Whitening())``.

    Where a layer's first outputs are large, as with raw features, its steps are in proportion (:class:`~precond.RelativeRMS`).

    Args:
        params: the model, whose inputs are observed.
        inputs: the whitening; None: ``Whitening()``.
        lr, betas, eps, weight_decay, options: as in :func:`adamw`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Raises:
        TypeError: where parameters are given instead of a module, whose inputs can be observed.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        >>> optimizer = precond.whitening(model, lr=1e-3)
        >>> [row.preconditioner.split("(")[0] for row in optimizer.explain().rows if row.name.endswith("weight")]
        ['Whitening', 'RMS']

    References:
        Desjardins et al. (2015); Loshchilov & Hutter (2019); Ye, Theorem 3.
    """
    return adamw(params, lr, betas, eps, weight_decay, inputs=Whitening() if inputs is None else inputs, **options)
