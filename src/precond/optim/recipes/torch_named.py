"""SGD, AdaGrad, RMSProp and Adam with torch.optim's signatures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from precond.algebra import checks
from precond.algebra.schedules import numbers
from precond.optim.checking.arguments import checked
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import RMS, AdaGrad, Fixed, Preconditioner
from precond.optim.recipes.making import after, implementations, make
from precond.optim.regularizers import L2, Regularizer

_ADAM_STATE = {"m": "exp_avg", "r": "exp_avg_sq", "r_max": "max_exp_avg_sq"}


def _sgd(group: Mapping[str, Any]) -> Choice:
    kind: Literal["nesterov", "heavy_ball"] = "nesterov" if group["nesterov"] else "heavy_ball"
    momentum = Momentum(group["momentum"], kind, start="first_gradient", dampening=group["dampening"])
    return Choice(Fixed(), momentum, (L2(group["weight_decay"] / 2, space="p"),))


@checked
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
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("sgd: nesterov=True needs momentum > 0 and dampening=0")
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


@checked
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


@checked
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
        >>> p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        >>> for x, optimizer in ((p, precond.rmsprop([p], lr=0.1)), (q, torch.optim.RMSprop([q], lr=0.1))):
        ...     for _ in range(3):
        ...         optimizer.zero_grad(); (x**4).sum().backward(); _ = optimizer.step()
        >>> torch.testing.assert_close(p, q)

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


@dataclass(frozen=True)
class _Adam:
    decoupled: bool
    inputs: Preconditioner | None = None

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        if bool(group["decoupled_weight_decay"]) != self.decoupled:
            mine, other = ("adamw", "adam") if self.decoupled else ("adam", "adamw")
            raise ValueError(
                f"{mine}: a group or state dict with decoupled_weight_decay={group['decoupled_weight_decay']!r} is another "
                f"recipe's; use precond.{other} for it"
            )
        beta1, beta2 = group["betas"]
        P = RMS(beta2, group["eps"], amsgrad=group["amsgrad"])
        space: Literal["z", "p"] = "z" if self.decoupled else "p"
        return Choice(after(self.inputs, P, group), Momentum(beta1), (L2(group["weight_decay"] / 2, space=space),))


@checked
def adam(
    params: Params,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    decoupled_weight_decay: bool = False,
    inputs: Preconditioner | None = None,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """RMSProp's P with bias correction, and momentum of cotangents: ``torch.optim.Adam``.

    With ``inputs=BNP()`` (or ``Whitening()``) it is Adam in the coordinates of the layers' standardized inputs, P₁P₂ with P₂
    adapting to P₁ᵀg: params must then be the model.

    ``weight_decay`` is λ‖p‖² with λ = weight_decay/2, which enters the statistics as in torch. With SAM or GradientNorm the statistics are
    those of the regularized gradient, as when a SAM wrapper steps Adam; in z the penalty is then taken with the P before the step
    (``statistics_from="lagged"``).

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.
        decoupled_weight_decay: as in torch: λ‖z‖² in place of λ‖p‖², which makes it :func:`adamw`.
        inputs: ``BNP()`` or ``Whitening()``: everything in the coordinates of layer inputs.
        capturable: see :class:`~precond.PreconditionedGD`.
        foreach, fused, differentiable, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Raises:
        ValueError: for one of ``betas`` as a tensor and the other as a number, and for numbers out of range.

    Example:
        >>> import torch, precond
        >>> p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        >>> for x, optimizer in ((p, precond.adam([p], lr=0.1, weight_decay=0.1)), (q, torch.optim.Adam([q], lr=0.1, weight_decay=0.1))):
        ...     for _ in range(3):
        ...         optimizer.zero_grad(); (x**4).sum().backward(); _ = optimizer.step()
        >>> torch.testing.assert_close(p, q)

    References:
        Kingma & Ba (2015); Ye, eqs. (6)–(8), (10).
    """
    name = "adamw" if decoupled_weight_decay else "adam"
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"{name}: betas must be two numbers or two tensors, got {betas!r}")
    implementations(name, foreach, fused, differentiable, **({} if capturable else {"lr": lr, "betas": betas[0]}))
    checks.fraction(name, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    checks.non_negative(name, eps=eps, weight_decay=weight_decay)
    defaults = {
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay,
        **numbers(inputs),
    }
    options["capturable"] = capturable
    unsupported = {"differentiable": differentiable}
    state = _ADAM_STATE if inputs is None else {"m": "exp_avg", "inner.r": "exp_avg_sq", "inner.r_max": "max_exp_avg_sq"}
    return make(name, params, lr, _Adam(decoupled_weight_decay, inputs), defaults, state, unsupported, regularizers, options)


@checked
def adamw(
    params: Params,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    inputs: Preconditioner | None = None,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """Adam with λ‖z‖², λ = weight_decay/2, which is decoupled weight decay: ``torch.optim.AdamW``.

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.
        inputs: ``BNP()`` or ``Whitening()``: everything in the coordinates of layer inputs.
        capturable: see :class:`~precond.PreconditionedGD`.
        foreach, fused, differentiable, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Example:
        >>> import torch, precond
        >>> p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
        >>> for x, optimizer in ((p, precond.adamw([p], lr=0.1, weight_decay=0.1)), (q, torch.optim.AdamW([q], lr=0.1, weight_decay=0.1))):
        ...     for _ in range(3):
        ...         optimizer.zero_grad(); (x**4).sum().backward(); _ = optimizer.step()
        >>> torch.testing.assert_close(p, q)

    References:
        Loshchilov & Hutter (2019); Ye, eq. (9).
    """
    return adam(
        params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
        differentiable=differentiable, fused=fused, decoupled_weight_decay=True, inputs=inputs, regularizers=regularizers, **options,
    )  # fmt: skip
