"""torch's own kernels of what acts entry by entry, on whatever device torch has them for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.maps import Identity
from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import State
from precond.optim.engine.cells import Cell
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import RMS, AdaGrad, Fixed, Preconditioner

Kernel = Callable[..., None]
"""(cell, parameters, gradients, lr, maximize): one step of the cell, whose count of steps is the step's own already.

On accelerators also ``found_inf``, a tensor that is 1 where the step is not taken, or None.
"""

_FOREVER = 1e9  # a step count at which 1 − βᵗ is exactly 1


@dataclass(frozen=True)
class Decay:
    """The L2 terms of a configuration as torch's ``weight_decay``: before M and momentum, or past them."""

    coupled: float = 0.0
    decoupled: float = 0.0


def entrywise(P: Preconditioner, momentum: Momentum | None, decay: Decay) -> Kernel | None:
    """The kernel of a preconditioner that acts entry by entry, or None."""
    match P, momentum:
        case RMS(start="zero", bias_correction=True, centered=False), Momentum(kind="ema", start="zero", of="cotangent"):
            if P.eps > 0 and momentum.corrected and not (decay.coupled and decay.decoupled):
                return Adam(P, momentum, decay)
        case RMS(start="zero", bias_correction=False, centered=False, amsgrad=False), None:
            if P.eps > 0 and not decay.decoupled:
                return RMSprop(P, decay)
        case AdaGrad(), None:
            if P.eps > 0 and not decay.decoupled:
                return Adagrad(P, decay)
        case Fixed(map_=Identity()), None:
            return SGD(0.0, False, Decay(coupled=decay.coupled + decay.decoupled))
        case Fixed(map_=Identity()), Momentum(kind="heavy_ball" | "nesterov", of="cotangent", dampening=0.0):
            return SGD(momentum.beta, momentum.kind == "nesterov", decay)
    return None


def _counts(cell: Cell, p: Tensors) -> list[Tensor]:
    """The number of the step in progress for each tensor, where the tensor is."""
    if (clock := cell.state.get("clock")) is not None:
        return list(clock)
    steps = cell.state["step"]
    if p[0].device.type == "cpu":
        return list(steps)
    of: dict[tuple[float, torch.device], Tensor] = {}
    keys = [(t.item(), x.device) for t, x in zip(steps, p, strict=True)]
    for t, device in keys:
        if (t, device) not in of:
            of[t, device] = torch.full((), t, dtype=torch.float32, device=device)
    return [of[key] for key in keys]


@dataclass(frozen=True)
class Adam:
    """RMS with an average from zero, both corrected."""

    P: RMS
    momentum: Momentum
    decay: Decay

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool, found_inf: Tensor | None = None) -> None:
        adam = torch._fused_adam_ if self.decay.coupled else torch._fused_adamw_
        state = cell.state
        adam(
            p,
            g,
            cell.average["m"],
            state["r"],
            state["r_max"] if self.P.amsgrad else [],
            _counts(cell, p),
            lr=lr,
            beta1=self.momentum.beta,
            beta2=self.P.decay,
            weight_decay=self.decay.coupled or self.decay.decoupled,
            eps=self.P.eps,
            amsgrad=self.P.amsgrad,
            maximize=maximize,
            found_inf=found_inf,
        )

    def descend(self, y: Tensors, m: Tensors, state: State, steps: list[Tensor], maximize: bool) -> None:
        """y ← −m̂/(√r̂ + ε), in place."""
        # As its own parameter that decays to nothing, y becomes the step without another buffer.
        torch._fused_adamw_(
            y,
            y,
            m,
            state["r"],
            state["r_max"] if self.P.amsgrad else [],
            steps,
            lr=1.0,
            beta1=self.momentum.beta,
            beta2=self.P.decay,
            weight_decay=1.0,
            eps=self.P.eps,
            amsgrad=self.P.amsgrad,
            maximize=maximize,
        )


@dataclass(frozen=True)
class RMSprop:
    """Adam's kernel with β₁ = 0 and bias corrections that have died out; it runs in half the time of torch's RMSprop."""

    P: RMS
    decay: Decay

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool, found_inf: Tensor | None = None) -> None:
        state = cell.state
        never = torch.full((), _FOREVER, device=p[0].device)
        if self.decay.coupled or maximize:
            # The kernel writes the decayed gradient where the momentum of Adam would be.
            scratch = p[0].new_empty(max(t.numel() for t in p))
            for pi, gi, ri in zip(p, g, state["r"], strict=True):
                self._run([pi], [gi], [scratch[: pi.numel()].zero_().view(pi.shape)], [ri], [never], lr, maximize, found_inf)
        else:
            # With β₁ = 0 "m" becomes the gradient itself: writing it onto the gradient changes nothing.
            self._run(p, g, g, state["r"], [never] * len(p), lr, maximize, found_inf)

    def _run(self, p, g, m, r, step, lr: Scalar, maximize: bool, found_inf: Tensor | None) -> None:
        torch._fused_adam_(
            p,
            g,
            m,
            r,
            [],
            step,
            lr=lr,
            beta1=0.0,
            beta2=self.P.decay,
            weight_decay=self.decay.coupled,
            eps=self.P.eps,
            amsgrad=False,
            maximize=maximize,
            found_inf=found_inf,
        )


@dataclass(frozen=True)
class Adagrad:
    """Sums of squares."""

    P: AdaGrad
    decay: Decay

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool, found_inf: Tensor | None = None) -> None:
        state = cell.state
        torch._fused_adagrad_(
            p,
            g,
            state["r"],
            _counts(cell, p),
            lr=lr,
            lr_decay=self.P.lr_decay,
            weight_decay=self.decay.coupled,
            eps=self.P.eps,
            maximize=maximize,
            found_inf=found_inf,
        )


@dataclass(frozen=True)
class SGD:
    """The gradient itself, or its momentum."""

    beta: float
    nesterov: bool
    decay: Decay

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool, found_inf: Tensor | None = None) -> None:
        if self.decay.decoupled:
            torch._foreach_mul_(p, 1 - lr * self.decay.decoupled * (1.0 if found_inf is None else 1 - found_inf.double()))
        torch._fused_sgd_(
            p,
            g,
            list(cell.average["m"]) if self.beta else [],
            weight_decay=self.decay.coupled,
            momentum=self.beta,
            lr=lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=maximize,
            is_first_step=False,
            found_inf=found_inf,
        )
