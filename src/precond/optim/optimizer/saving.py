"""State dicts, copies and pickles."""

from __future__ import annotations

from typing import Any

from precond.optim.optimizer import serialization
from precond.optim.optimizer.interrupts import Uninterrupted
from precond.optim.optimizer.models import Models
from precond.optim.optimizer.stepping import Stepping


class Saving(Stepping):
    """As of torch.optim, with the state of all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; torch-named recipes use torch's names, and torch's class of that name loads it.

        Where ranks step parameters for each other (docs/distributed.md) every rank must call it, since owners send their state; or
        :meth:`consolidate_state_dict` before.

        Raises:
            RuntimeError: where ranks own state and the others do not come.
        """
        self._check_settled("state_dict")
        if self._consolidated is not None:
            return self._consolidated
        serialization.meet_owners(self)
        self.follow_model()
        return serialization.started(serialization.whole(super().state_dict(), self), self)

    def consolidate_state_dict(self) -> None:
        """Put the state of all owners together, so that until the next step a rank may call :meth:`state_dict` alone; every rank calls this.

        What is for a single process, or has no owners, needs it not. (The name is that of torch's ZeroRedundancyOptimizer.)
        """
        if self._owned:
            self._consolidated = None
            self._consolidated = self.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state dict, or torch's of the recipe's name; all or nothing. State keeps its dtype.

        Raises:
            ValueError: where it does not fit; the message names the parameter. Parameters are matched by name where both
                sides know names (a warning says what did not match), else by position.
        """
        serialization.check_mapping(state_dict)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.restore()
        self.follow_model()
        with Uninterrupted():
            serialization.load(self, state_dict)
            self._model_hooks.again(self.asking)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._check_settled("copying or pickling the optimizer")
        self.follow_model()
        # An LR scheduler puts a `step` on the instance that calls this very optimizer's.
        derived = {
            "step", "last", "_bound", "_stepped", "_versions", "_averaged", "_evaluating", "_kernels_of", "_pending", "_spare", "_clearings",
            "_closing", "_model_hooks", "_warned", "_consolidated",
        }  # fmt: skip
        state = {k: v for k, v in self.__dict__.items() if k not in derived and "hook" not in k}
        return {**state, "models": Models(known=self.models.leaves(self.param_groups))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        if not self._requests and not self._owners:
            self._bind()
