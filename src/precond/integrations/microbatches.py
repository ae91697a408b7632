"""The micro-batches that one step is made of, repeated for its second gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.passes import Random, random_state, restore_random_state


class MicroBatches:
    """Runs backward passes and, where the optimizer wants second gradients, runs all of a step's again.

    With K micro-batches a step, SAM's second gradient is that of all K at p + δ, each with the random numbers (dropout masks) of
    its first pass. They are kept until :meth:`repeat`, and not at all where the optimizer wants no second gradient.

    Args:
        optimizer: a :class:`~precond.PreconditionedGD`, or a trainer's wrapper with one in ``.optimizer``.
        scaler: the GradScaler of the losses, or None.

    Raises:
        TypeError: for an optimizer of another library.

    Example:
        >>> import torch, precond
        >>> from precond.integrations import MicroBatches
        >>> p = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = precond.sgd([("p", p)], lr=0.1, regularizers=[precond.SAM(0.5, eta=0)])
        >>> def backward(a):
        ...     (a * p**2 / 2).sum().backward()
        >>> micro = MicroBatches(optimizer)
        >>> for a in (1.0, 3.0):
        ...     micro.backward(backward, a)
        >>> micro.repeat(); _ = optimizer.step(); p.item()  # 2 − 0.1(1 + 3)(2 + 0.5)
        1.0
    """

    def __init__(self, optimizer: Any, scaler: torch.amp.GradScaler | None = None):
        found = inside(optimizer)
        if found is None:
            raise TypeError(
                f"MicroBatches: pass an optimizer of precond, or a wrapper around one, got {type(optimizer).__name__}"
            )
        self.optimizer, self.scaler = found, scaler
        self._parts: list[tuple[Random, Callable[[], Any]]] = []

    def add(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Remember a pass that is about to run: ``f(*args, **kwargs)`` goes forward and backward."""
        if self.optimizer.probes:
            devices = {p.device for group in self.optimizer.param_groups for p in group["params"]}
            self._parts.append((random_state(devices), partial(f, *args, **kwargs)))

    def backward(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``f(*args, **kwargs)``, forward and backward, and remember it; what it returns.

        Pass the batch as arguments: a variable that ``f`` takes from a loop has another value when it runs again.
        """
        self.add(f, *args, **kwargs)
        try:
            return f(*args, **kwargs)
        except BaseException:  # no step will be made of this
            self._parts.clear()
            raise

    def repeat(self) -> None:
        """Take the second gradients that the optimizer wants: after a step's last backward, before clipping and the step."""
        parts, self._parts = self._parts, []
        if not parts:
            return
        after = random_state(parts[0][0])
        try:
            while self.optimizer.probe(None if self.scaler is None else self.scaler.get_scale()):
                for random, run in parts:
                    restore_random_state(random)
                    run()
        except BaseException:
            self.optimizer.restore()
            raise
        finally:
            restore_random_state(after)


def inside(optimizer: Any) -> PreconditionedGD | None:
    """The optimizer of this library in a trainer's wrappers, or None."""
    while optimizer is not None and not isinstance(optimizer, PreconditionedGD):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def check_clipping(optimizer: PreconditionedGD, clips: bool, how: str) -> None:
    """Raise where a trainer would clip a gradient that is a part of a difference.

    Raises:
        ValueError: ``how`` says what to set.
    """
    if clips and optimizer.probes and not optimizer.replaces_gradient:
        raise ValueError(
            f"pass max_norm to the optimizer and {how}: the trainer would clip the second gradient alone, whose difference from "
            "the first one is the penalty's"
        )
