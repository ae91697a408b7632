"""Matrix preconditioners: one map for the weight matrices, Adam's for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from precond import checks
from precond.blocks import Rule, is_hidden
from precond.engine.cells import Choice
from precond.momentum import Momentum
from precond.optimizer import PreconditionedGD
from precond.optimizer.parameters import Params
from precond.preconditioners import RMS, Muon, Preconditioner, Route
from precond.recipes.making import make
from precond.regularizers import L2, Regularizer
from precond.schedules import numbers, replaced

JORDAN = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class _Muon:
    where: Rule
    root: Literal["newton-schulz", "eigh"]
    arithmetic: Literal["bfloat16", "full"]
    inputs: Preconditioner | None

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        beta = group["momentum"]
        average = Momentum(beta, "nesterov" if group["nesterov"] else "heavy_ball", dampening=beta)
        matrices = Muon(
            self.root,
            group["ns_steps"],
            tuple(group["ns_coefficients"]),
            group["eps"],
            group["adjust_lr_fn"] or "original",
            self.arithmetic,
            average,
        )
        others = RMS(group["betas"][1], group["adam_eps"])
        P: Preconditioner = Route([(self.where, matrices), ("*", others, group["adam_lr_scale"])])
        if self.inputs is not None:
            P = replaced(self.inputs, group) @ P
        return Choice(P, Momentum(group["betas"][0]), (L2(group["weight_decay"] / 2, space="z"),))


def muon(
    params: Params,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = JORDAN,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = "match_rms_adamw",
    *,
    where: Rule = is_hidden,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    adam_lr_scale: float = 1.0,
    root: Literal["newton-schulz", "eigh"] = "newton-schulz",
    arithmetic: Literal["bfloat16", "full"] = "bfloat16",
    inputs: Preconditioner | None = None,
    maximize: bool = False,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """Orthogonalized momentum for hidden matrices, AdamW for the rest, in one optimizer: ``torch.optim.Muon`` and Adam beside it.

    Args:
        params: best the model: names and layers then tell embeddings and outputs from hidden matrices.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps: as in torch.optim.Muon.
        adjust_lr_fn: γ, see :class:`~precond.Muon`; None is ``"original"``, as in torch. With ``"match_rms_adamw"`` steps are as
            long as AdamW's and one learning rate serves all; with ``"original"`` Adam wants ``adam_lr_scale`` of about 0.02.
        where: which parameters are orthogonalized.
        betas, adam_eps, adam_lr_scale: of Adam for the rest, and what its learning rate is multiplied by.
        root, arithmetic: see :class:`~precond.Muon`.
        inputs: ``BNP()`` or ``Whitening()``: everything in the coordinates of layer inputs.
        maximize, regularizers, options: as in :func:`sgd`.
    """
    checks.fraction("muon", momentum=momentum, **{"betas[0]": betas[0], "betas[1]": betas[1]})
    checks.non_negative("muon", weight_decay=weight_decay, adam_eps=adam_eps)
    checks.positive("muon", eps=eps, ns_steps=ns_steps, adam_lr_scale=adam_lr_scale)
    checks.one_of("muon", "adjust_lr_fn", adjust_lr_fn, (None, "original", "match_rms_adamw"))
    defaults = {
        "weight_decay": weight_decay,
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_coefficients": tuple(ns_coefficients),
        "eps": eps,
        "ns_steps": ns_steps,
        "adjust_lr_fn": adjust_lr_fn,
        "betas": tuple(betas),
        "adam_eps": adam_eps,
        "adam_lr_scale": adam_lr_scale,
        "maximize": maximize,
        **({} if inputs is None else numbers(inputs)),
    }
    state = {"m": "momentum_buffer", "r": "exp_avg_sq"}
    return make("muon", params, lr, _Muon(where, root, arithmetic, inputs), defaults, state, {}, regularizers, options)
