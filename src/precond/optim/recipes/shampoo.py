"""Shampoo: roots of the factors of a matrix's sides."""

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
from precond.optim.preconditioners import Preconditioner, Shampoo
from precond.optim.preconditioners.kronecker import Sides
from precond.optim.recipes.making import after, make, recipe
from precond.optim.regularizers import L2, Regularizer


@dataclass(frozen=True)
class _Shampoo:
    sides: Sides
    power: float | None
    method: Literal["eigh", "newton", "qr"]
    graft: Literal["none", "sgd", "adagrad", "rms"]
    inputs: Preconditioner | None

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        beta1, beta2 = group["betas"]
        P = Shampoo(
            self.power,
            None if group["shampoo_beta"] < 0 else group["shampoo_beta"],
            group["initial"],
            group["matrix_eps"],
            group["precondition_frequency"],
            self.method,
            self.sides,
            group["max_precond_dim"],
            group["block_size"],
            self.graft,
            beta2,
            group["eps"],
        )
        return Choice(after(self.inputs, P, group), Momentum(beta1), (L2(group["weight_decay"] / 2, space="z"),))


@recipe
def shampoo(
    params: Params,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    shampoo_beta: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    block_size: int = 1024,
    max_precond_dim: int = 8192,
    *,
    initial: float = 0.0,
    matrix_eps: float = 1e-6,
    power: float | None = None,
    graft: Literal["none", "sgd", "adagrad", "rms"] = "rms",
    method: Literal["eigh", "newton", "qr"] = "eigh",
    sides: Sides = "both",
    inputs: Preconditioner | None = None,
    maximize: bool = False,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """Inverse roots of both sides' second moments, with steps as long as Adam's (Gupta et al., 2018; Anil et al., 2020).

    Algorithm 1 of Gupta et al. is ``betas=(0, …), shampoo_beta=-1, graft="none", precondition_frequency=1, matrix_eps=0,
    initial=ε, weight_decay=0``.

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, weight_decay: as in :func:`adamw`.
        betas, eps: of the momentum, and of the diagonal that grafting and vectors take.
        shampoo_beta: decay of the factors; negative: sums.
        precondition_frequency: steps between roots.
        block_size, max_precond_dim, initial, matrix_eps, power, graft, method, sides: see :class:`~precond.Shampoo`.
        inputs: ``BNP()`` or ``Whitening()``: everything in the coordinates of layer inputs.
        maximize, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = precond.shampoo(
        ...     [W], 1.0, (0.0, 0.9), -1, weight_decay=0.0, precondition_frequency=1, matrix_eps=0.0, graft="none")
        >>> W.grad = torch.tensor([[16.0, 0.0], [0.0, -1.0]]); _ = optimizer.step()
        >>> expected = torch.diag(torch.tensor([-1.0, 1.0]))  # −L^(−1/4) G R^(−1/4), which is −UVᵀ of a first gradient
        >>> torch.testing.assert_close(W.data, expected, atol=1e-4, rtol=0)
    """
    checks.fraction("shampoo", **{"betas[0]": betas[0], "betas[1]": betas[1]})
    checks.non_negative("shampoo", weight_decay=weight_decay, matrix_eps=matrix_eps)
    checks.positive("shampoo", eps=eps)
    if shampoo_beta >= 0:
        checks.fraction("shampoo", shampoo_beta=shampoo_beta)
    sizes = {"precondition_frequency": precondition_frequency, "block_size": block_size, "max_precond_dim": max_precond_dim}
    checks.whole("shampoo", **sizes)
    defaults = {
        "betas": betas,
        "shampoo_beta": shampoo_beta,
        "eps": eps,
        "weight_decay": weight_decay,
        **sizes,
        "initial": initial,
        "matrix_eps": matrix_eps,
        "maximize": maximize,
        **numbers(inputs),
    }
    state = {"m": "exp_avg", "r": "exp_avg_sq"}
    build = _Shampoo(sides, power, method, graft, inputs)
    return make("shampoo", params, lr, build, defaults, state, {}, regularizers, options)
