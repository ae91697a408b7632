"""Steps of which the host does not know whether they are taken, or that a CUDA graph repeats."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from precond.algebra import vec
from precond.algebra.vec import Vec
from precond.optim.engine.counting import count_on_host
from precond.optim.engine.verdict import Verdict
from precond.optim.optimizer.following import Following
from precond.optim.ranks.replicas import largest


class Capturing(Following):
    """What devices decide, and what the host must not decide while a graph is captured."""

    def _check_capturable(self) -> None:
        """Refuse to promise what a CUDA graph cannot repeat."""
        whys = {
            "observes the inputs of layers": bool(self._requests),
            "asks for second gradients": self._gradient_based is not None,
            "keeps an average of the weights": self.average is not None,
            "looks at every gradient, nonfinite='raise'": self.nonfinite == "raise",
        }
        if why := next((what for what, found in whys.items() if found), None):
            raise ValueError(
                f"{self.naming.name}: capturable=True: it {why}, of which the host must know; leave capturable out"
            )

    def _check_capture(self) -> None:
        """Refuse what a CUDA graph would not repeat."""
        if missing := [leaf.name for leaf in self._bound.leaves if not self.param_groups[leaf.group].get("capturable")]:
            raise RuntimeError(
                f"{self.naming.name}: a CUDA graph of its step is captured, but the group of {missing[0]!r} is not capturable: make "
                "it with capturable=True"
            )
        if not all("clock" in cell.state for cell in self._bound.cells):
            raise RuntimeError(
                f"{self.naming.name}: a CUDA graph of its step is captured, but ranks step for each other, and the host counts their "
                "steps; leave the step out of the graph"
            )

    @property
    def program(self) -> Hashable:
        """What the number of the next step decides about it, as a key: steps of one program launch the same, and one CUDA graph serves them.

        None, always, where nothing is decided: ``sgd``, ``adam``, ``adamw``, ``rmsprop``, ``adagrad``, ``muon``. ``soap`` and
        ``shampoo`` have as many programs as their period has different steps, once the first period is over. Where a
        method says nothing of it, each step is a program of its own.
        """
        self._follow_groups()
        cells = [cell for cell in self._bound.cells if cell.handled and not cell.preconditioner.timeless]
        return tuple(cell.preconditioner.program(cell.block, cell.state.steps[0] + 1) for cell in cells) or None

    def replayed(self) -> None:
        """Tell the host that a CUDA graph has repeated a captured step: :attr:`program` is then that of the next one."""
        count_on_host([c.state for c in self._bound.cells if any(leaf.param.grad is not None for leaf in c.leaves)])

    def _skips_on_device(self) -> bool:
        """Whether inf and NaN are to decide about this step without the host's knowing."""
        asked = getattr(self, "found_inf", None) is not None or self.nonfinite == "skip"
        return asked and self._may_skip_on_device and all("clock" in cell.state for cell in self._bound.cells)

    def _verdict(self, gradients: Vec, loss: Any) -> Verdict:
        """Whether the step is taken, which no host reads: the scaler's finding, and that of the gradients and the loss given."""
        device = self._bound.leaves[0].param.device
        bad = vec.nonfinite(gradients).to(device) if gradients else torch.zeros((), device=device)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            bad = bad + found_inf.to(device)
        if self.nonfinite == "skip" and loss is not None:
            bad = bad + (1 - torch.as_tensor(loss, device=device).detach().isfinite().float().reshape(()))
        return Verdict(largest(bad))
