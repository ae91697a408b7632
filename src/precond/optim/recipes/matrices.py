"""Matrix preconditioners: one map for the weight matrices, Adam's for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from precond.algebra import checks
from precond.algebra.schedules import numbers, replaced
from precond.optim.blocks import Rule, is_hidden
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import RMS, SOAP, Muon, Orthogonalized, Preconditioner, Route, Schatten
from precond.optim.preconditioners.kronecker import Sides
from precond.optim.preconditioners.muon import Scale
from precond.optim.preconditioners.newton_schulz import JORDAN
from precond.optim.recipes.making import after, make, recipe
from precond.optim.regularizers import L2, Regularizer


@dataclass(frozen=True)
class _Muon:
    where: Rule
    root: Literal["newton-schulz", "eigh"]
    arithmetic: Literal["bfloat16", "full"]
    inputs: Preconditioner | None
    after: Preconditioner | None

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        polar = self._of(group)
        matrices = polar if self.after is None else Orthogonalized(replaced(self.after, group), polar, None)
        others = RMS(group["betas"][1], group["adam_eps"])
        P = Route([(self.where, matrices), ("*", others, group["adam_lr_scale"])])
        return Choice(after(self.inputs, P, group), Momentum(group["betas"][0]), (L2(group["weight_decay"] / 2, space="z"),))

    def _of(self, group: Mapping[str, Any]) -> Muon | Schatten:
        beta = group["momentum"]
        scale: Scale = group["adjust_lr_fn"] or "original"
        average = Momentum(beta, "nesterov" if group["nesterov"] else "heavy_ball", dampening=beta)
        if group["power"]:
            return Schatten(group["power"], group["eps"], scale, average)
        return Muon(
            self.root,
            group["ns_steps"],
            tuple(group["ns_coefficients"]),
            group["eps"],
            scale,
            self.arithmetic,
            average,
        )


@recipe
def muon(
    params: Params,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = JORDAN,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral"] | None = "match_rms_adamw",
    *,
    where: Rule = is_hidden,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    adam_lr_scale: float = 1.0,
    root: Literal["newton-schulz", "eigh"] = "newton-schulz",
    arithmetic: Literal["bfloat16", "full"] = "bfloat16",
    inputs: Preconditioner | None = None,
    after: Preconditioner | None = None,
    power: float = 0.0,
    maximize: bool = False,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """Orthogonalized momentum for hidden matrices, AdamW for the rest, in one optimizer: ``torch.optim.Muon`` and Adam beside it.

    Args:
        params: best the model: names and layers then tell embeddings and outputs from hidden matrices.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps: as in torch.optim.Muon. Its learning rate of 1e-3 is slow in
            short trainings of small models, slower than AdamW; begin a search at 1e-2.
        adjust_lr_fn: γ, see :class:`~precond.Muon`; None is ``"original"``, as in torch. With ``"match_rms_adamw"`` steps are as
            long as AdamW's and one learning rate serves all; with ``"original"`` Adam wants ``adam_lr_scale`` of about 0.02.
        where: which parameters are orthogonalized.
        betas, adam_eps, adam_lr_scale: of Adam for the rest, and what its learning rate is multiplied by.
        root, arithmetic: see :class:`~precond.Muon`.
        inputs: ``BNP()`` or ``Whitening()``: everything in the coordinates of layer inputs.
        after: ``SOAP()``, ``Whitening(power=0.5)``, ``RMS()``, …: the polar factor is that of its step in place of the momentum's
            (:class:`~precond.Orthogonalized`).
        power: s in [0, 1] of U Σˢ Vᵀ in place of U Vᵀ (:class:`~precond.Schatten`); 0 is Muon.
        maximize, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4))
        >>> for row in precond.muon(model, lr=1e-3).explain().rows:
        ...     print(row.name, row.preconditioner.split("(")[0])
        0.weight RMS
        1.weight Muon
        1.bias RMS

    References:
        Jordan et al. (2024), Muon; Liu et al. (2025), Muon is scalable for LLM training, for ``"match_rms_adamw"``.
    """
    checks.fraction("muon", momentum=momentum, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    checks.non_negative("muon", weight_decay=weight_decay, adam_eps=adam_eps)
    checks.positive("muon", eps=eps, adam_lr_scale=adam_lr_scale)
    checks.whole("muon", ns_steps=ns_steps)
    defaults = {
        "weight_decay": weight_decay,
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_coefficients": ns_coefficients,
        "eps": eps,
        "ns_steps": ns_steps,
        "adjust_lr_fn": adjust_lr_fn,
        "betas": betas,
        "adam_eps": adam_eps,
        "adam_lr_scale": adam_lr_scale,
        "power": power,
        "maximize": maximize,
        **numbers(inputs),
        **numbers(after),
    }
    state = {"m": "momentum_buffer", "r": "exp_avg_sq"}
    return make("muon", params, lr, _Muon(where, root, arithmetic, inputs, after), defaults, state, {}, regularizers, options)


@dataclass(frozen=True)
class _SOAP:
    sides: Sides
    drift: float | None
    rank: int | None
    inputs: Preconditioner | None

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        beta1, beta2 = group["betas"]
        P = SOAP(
            beta2,
            group["eps"],
            None if group["shampoo_beta"] < 0 else group["shampoo_beta"],
            group["precondition_frequency"],
            self.drift,
            group["factor_frequency"],
            self.sides,
            group["max_precond_dim"],
            self.rank,
        )
        return Choice(after(self.inputs, P, group), Momentum(beta1), (L2(group["weight_decay"] / 2, space="z"),))


@recipe
def soap(
    params: Params,
    lr: float | Tensor = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float = -1,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    *,
    factor_frequency: int = 1,
    sides: Sides = "both",
    drift: float | None = None,
    rank: int | None = None,
    inputs: Preconditioner | None = None,
    maximize: bool = False,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """AdamW in the eigenbases of Shampoo's factors, with the argument names of its authors (Vyas et al., 2025).

    The step is theirs, weight by weight, from any state. With the first gradient, which they let pass, goes a short step along it.

    Args:
        params: see :class:`~precond.PreconditionedGD`.
        lr, betas, eps, weight_decay: as in :func:`adamw`.
        shampoo_beta: decay of the factors; negative: ``betas[1]``.
        precondition_frequency, factor_frequency: steps between refreshes of the bases, and between updates of the factors.
        max_precond_dim: longer sides are not rotated.
        sides, drift, rank: see :class:`~precond.SOAP`.
        inputs: ``BNP()`` or ``Whitening()``: everything in the coordinates of layer inputs.
        maximize, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = precond.soap([W], lr=1.0)
        >>> W.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]]); _ = optimizer.step()
        >>> torch.testing.assert_close(W.data, -torch.diag(torch.tensor([0.6, 0.8])))  # −G/‖G‖: a first step, before there are bases
    """
    checks.fraction("soap", **{"betas[0]": betas[0], "betas[1]": betas[1]})
    checks.non_negative("soap", eps=eps, weight_decay=weight_decay)
    if shampoo_beta >= 0:
        checks.fraction("soap", shampoo_beta=shampoo_beta)
    every = {"precondition_frequency": precondition_frequency, "factor_frequency": factor_frequency}
    checks.whole("soap", **every, max_precond_dim=max_precond_dim)
    defaults = {
        "betas": betas,
        "shampoo_beta": shampoo_beta,
        "eps": eps,
        "weight_decay": weight_decay,
        **every,
        "max_precond_dim": max_precond_dim,
        "maximize": maximize,
        **numbers(inputs),
    }
    state = {"m": "exp_avg", "r": "exp_avg_sq"}
    return make("soap", params, lr, _SOAP(sides, drift, rank, inputs), defaults, state, {}, regularizers, options)
