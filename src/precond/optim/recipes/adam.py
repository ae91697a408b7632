"""Adam and AdamW, alone and in the coordinates of layer inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from precond.algebra import checks
from precond.algebra.schedules import numbers
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import RMS, Preconditioner
from precond.optim.recipes.making import after, implementations, make, recipe
from precond.optim.regularizers import L2, Regularizer

_ADAM_STATE = {"m": "exp_avg", "r": "exp_avg_sq", "r_max": "max_exp_avg_sq"}


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


@recipe
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
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> p.grad = torch.tensor([4.0, -0.1])
        >>> precond.adam([p], lr=0.1).step()
        >>> [round(x, 4) for x in p.tolist()]  # against the gradient's sign
        [0.9, -1.9]

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


@recipe
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
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> p.grad = torch.tensor([4.0, -0.1])
        >>> precond.adamw([p], lr=0.1, weight_decay=0.1).step()
        >>> [round(x, 4) for x in p.tolist()]  # a hundredth less, and 0.1 against the gradient's sign
        [0.89, -1.88]

    References:
        Loshchilov & Hutter (2019); Ye, eq. (9).
    """
    return adam(
        params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
        differentiable=differentiable, fused=fused, decoupled_weight_decay=True, inputs=inputs, regularizers=regularizers, **options,
    )  # fmt: skip
