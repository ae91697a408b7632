"""What the last step did, for logging."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from precond.optim.engine.verdict import Verdict
    from precond.optim.optimizer.stepping import Stepping


class Record:
    """The last step; numbers that cost a pass over the parameters are computed when they are first read.

    Read them before ``zero_grad``: they use the gradients and the state as the step left them. Where parameters are divided
    among processes (FSDP2), each of them must read: the numbers are sums over all.

    Attributes:
        loss: the clean loss that the closure returned, or None.
        gradients: how many gradients were evaluated for the step.
    """

    def __init__(
        self,
        optimizer: Stepping,
        loss: Any = None,
        gradients: int = 1,
        skipped: bool | Verdict = False,
        scale: float | Tensor | None = None,
        length: Callable[[], Tensor] | None = None,
    ):
        self.loss, self.gradients, self._skipped = loss, gradients, skipped
        self._optimizer, self._scale, self._length = weakref.ref(optimizer), scale, length
        self._known: dict[str, float] = {}

    def _get(self, name: str) -> float:
        if name not in self._known:
            optimizer = self._optimizer()
            if optimizer is None or optimizer.last is not self:
                return float("nan")
            self._known[name] = float(optimizer.measure(name, self._scale, self._length))
        return self._known[name]

    @property
    def skipped(self) -> bool:
        """Whether the step was skipped because of inf or NaN; where a device decided that, asking waits for it."""
        return self._skipped if isinstance(self._skipped, bool) else self._skipped.against

    @property
    def grad_norm(self) -> float:
        """‖g‖₂ of the gradient in ``.grad``: the clean one (SAM with ``nonfinite="propagate"`` leaves the one at p + δ)."""
        return self._get("grad_norm")

    @property
    def preconditioned_grad_norm(self) -> float:
        """‖Pᵀg‖₂ = √(gᵀMg), the length of the same gradient in z."""
        return self._get("preconditioned_grad_norm")

    @property
    def penalty(self) -> float:
        """Σ λR over the regularizers, at the parameters after the step; NaN where one of them does not say its ``value``.

        Raises:
            ValueError, RuntimeError: in z, where P has no root or no inverse that its value needs.
        """
        return self._get("penalty")

    @property
    def update_ratio(self) -> float:
        """‖Δp‖/‖p‖, Δp without proximal steps, p after the step.

        Made again from what the step left: by the map that was renewed after it, and with the terms of penalties at p after it. Where a
        root or a basis was renewed it is not the step's own (2.7 of it in SOAP's first step), nor where p is moved besides, ahead of an
        average (:class:`~precond.EMANesterov`) or back to a sphere (:class:`~precond.Hyperball`): :class:`precond.Monitor` compares p itself.
        NaN where a fused kernel without momentum descended a second gradient, which leaves nothing of Δp; ``engine="loop"`` keeps it.
        """
        return self._get("update_ratio")

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, for a logger; NaN where asking for one raises."""
        loss = float(self.loss.detach() if isinstance(self.loss, Tensor) else self.loss) if self.loss is not None else None
        costly = ("grad_norm", "preconditioned_grad_norm", "penalty", "update_ratio")
        plain = {"loss": loss, "gradients": self.gradients, "skipped": self.skipped}
        return {**plain, **{name: self._number_or_nan(name) for name in costly}}

    def _number_or_nan(self, name: str) -> float:
        try:
            return getattr(self, name)
        except (ValueError, RuntimeError):
            return float("nan")

    def __repr__(self) -> str:
        return f"Record({', '.join(f'{k}={v!r}' for k, v in self.as_dict().items())})"
