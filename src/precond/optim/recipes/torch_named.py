"""SGD, AdaGrad and RMSProp, with the arguments and state dicts of torch.optim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from precond.algebra import checks
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import RMS, AdaGrad, Fixed
from precond.optim.recipes.making import implementations, make, recipe
from precond.optim.regularizers import L2, Regularizer


def _sgd(group: Mapping[str, Any]) -> Choice:
    if group["nesterov"] and group["dampening"]:
        raise ValueError(f"sgd: nesterov=True needs dampening=0, got {group['dampening']!r}")
    kind: Literal["nesterov", "heavy_ball"] = "nesterov" if group["nesterov"] else "heavy_ball"
    momentum = Momentum(group["momentum"], kind, start="first_gradient", dampening=group["dampening"])
    return Choice(Fixed(), momentum, (L2(group["weight_decay"] / 2, space="p"),))


@recipe
def sgd(
    params: Params,
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """P = I: ``torch.optim.SGD``.

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        foreach, fused: accepted and ignored; ``engine`` decides. What torch refuses of them is refused.
        differentiable: raises.
        regularizers: further penalties.
        options: of :class:`~precond.PreconditionedGD`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Raises:
        ValueError: for Nesterov's momentum without momentum or with dampening, and for numbers out of range.

    Example:
        >>> import torch, precond
        >>> p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        >>> for x, optimizer in ((p, precond.sgd([p], lr=0.01, momentum=0.9)), (q, torch.optim.SGD([q], lr=0.01, momentum=0.9))):
        ...     for _ in range(3):
        ...         optimizer.zero_grad(); (x**4).sum().backward(); _ = optimizer.step()
        >>> torch.testing.assert_close(p, q)

    References:
        Ye, eq. (1); Polyak (1964) and Nesterov (1983) for momentum; Sutskever et al. (2013) for its form.
    """
    implementations("sgd", foreach, fused, differentiable)
    checks.fraction("sgd", momentum=momentum)
    checks.non_negative("sgd", dampening=dampening, weight_decay=weight_decay)
    if nesterov and momentum <= 0:
        raise ValueError(f"sgd: nesterov=True needs momentum > 0, got {momentum!r}")
    defaults = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    options.setdefault("statistics_from", "loss")  # P is not made of gradients
    return make(
        "sgd", params, lr, _sgd, defaults, {"m": "momentum_buffer"}, {"differentiable": differentiable},
        regularizers, options, only_started=True,
    )  # fmt: skip


def _adagrad(group: Mapping[str, Any]) -> Choice:
    P = AdaGrad(group["eps"], group["initial_accumulator_value"], group["lr_decay"])
    return Choice(P, None, (L2(group["weight_decay"] / 2, space="p"),))


@recipe
def adagrad(
    params: Params,
    lr: float | Tensor = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """P = diag((√Σg² + ε)^(−1/2)): ``torch.optim.Adagrad``.

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in torch; ``weight_decay`` is λ‖p‖² with λ = weight_decay/2.
        foreach, fused, differentiable, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Example:
        >>> import torch, precond
        >>> p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        >>> for x, optimizer in ((p, precond.adagrad([p], lr=0.1)), (q, torch.optim.Adagrad([q], lr=0.1))):
        ...     for _ in range(3):
        ...         optimizer.zero_grad(); (x**4).sum().backward(); _ = optimizer.step()
        >>> torch.testing.assert_close(p, q)

    References:
        Duchi, Hazan & Singer (2011); Ye, "Understanding Adaptive Learning Rate".
    """
    implementations("adagrad", foreach, fused, differentiable)
    checks.non_negative(
        "adagrad", lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value, eps=eps
    )
    defaults = {
        "lr_decay": lr_decay,
        "eps": eps,
        "weight_decay": weight_decay,
        "initial_accumulator_value": initial_accumulator_value,
        "maximize": maximize,
    }
    return make(
        "adagrad", params, lr, _adagrad, defaults, {"r": "sum"}, {"differentiable": differentiable}, regularizers, options
    )


def _rmsprop(group: Mapping[str, Any]) -> Choice:
    P = RMS(group["alpha"], group["eps"], bias_correction=False, centered=group["centered"])
    # torch averages the preconditioned gradient here, and only here.
    momentum = Momentum(group["momentum"], "heavy_ball", of="tangent")
    return Choice(P, momentum, (L2(group["weight_decay"] / 2, space="p"),))


@recipe
def rmsprop(
    params: Params,
    lr: float | Tensor = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    maximize: bool = False,
    differentiable: bool = False,
    *,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """P = diag((√r + ε)^(−1/2)), r ← αr + (1−α)g² from zero: ``torch.optim.RMSprop``.

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, alpha, eps, weight_decay, momentum, centered, maximize: as in torch; ``weight_decay`` is λ‖p‖² with λ = weight_decay/2, momentum one
            of tangents.
        capturable: see :class:`~precond.PreconditionedGD`.
        foreach: accepted and ignored.
        differentiable, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = precond.rmsprop([p], lr=0.1, alpha=0.75)
        >>> p.grad = torch.tensor([4.0, -0.1]); _ = optimizer.step()
        >>> [round(x, 4) for x in p.tolist()]  # each moved by 0.1 |g|/√(g²/4)
        [0.8, -1.8]

    References:
        Tieleman & Hinton (2012); Ye, eq. (6).
    """
    checks.fraction("rmsprop", alpha=alpha, momentum=momentum)
    checks.non_negative("rmsprop", eps=eps, weight_decay=weight_decay)
    defaults = {
        "momentum": momentum,
        "alpha": alpha,
        "eps": eps,
        "centered": centered,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    state = {"r": "square_avg", "mean": "grad_avg", "m": "momentum_buffer"}
    options["capturable"] = capturable
    return make("rmsprop", params, lr, _rmsprop, defaults, state, {"differentiable": differentiable}, regularizers, options)
