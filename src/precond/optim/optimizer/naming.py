"""How an optimizer's numbers and tensors are called in its parameter groups and state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precond.algebra import checks
from precond.algebra.schedules import numbers, replaced
from precond.algebra.warning import warn
from precond.optim.checking.arguments import flag, number, shown
from precond.optim.engine.cells import Choice

_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_RATES = {"learning_rate", "learningrate", "learning-rate", "lr_rate", "step_size"}
_NEAR = 0.8
"""Letters in common, as a ratio, from which on a key is taken for a misspelling: "weight_dacay" has 0.92, "base_momentum" 0.76."""


@dataclass(frozen=True)
class Generic:
    """Groups hold a configuration's numbers under their own names, ``"rms.decay"``, ``"l2.lam"``."""

    choice: Choice

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        """The strategies of a group."""
        return replaced(self.choice, group)


@dataclass(frozen=True)
class Naming:
    """The name table between a configuration and the outside.

    Attributes:
        name: of the optimizer, for messages.
        defaults: the options of a parameter group with their defaults (``lr`` and ``maximize`` come on top).
        build: from a group's options to its strategies: the groups are the single truth.
        state: our names of state tensors → theirs (``r`` → ``exp_avg_sq``).
        only_started: leave the tensors of parameters that made no step out of the state dict.
        settle: what a recipe decides by what the first steps have shown: from an optimizer, after each step, to options that its
            groups take; None: nothing more.
    """

    name: str
    defaults: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], Choice]
    state: Mapping[str, str] = field(default_factory=dict)
    only_started: bool = False
    settle: Callable[[Any], Mapping[str, Any] | None] | None = None

    @classmethod
    def generic(cls, choice: Choice) -> Naming:
        """Our own names throughout."""
        return cls("PreconditionedGD", numbers(choice), Generic(choice))

    def cycle(self, group: dict[str, Any]) -> None:
        """Where a scheduler (OneCycleLR, CyclicLR) cycles a group's momentum, all of its averages take the value.

        Such a scheduler leaves ``max_momentum`` in the group, and writes the one number of those that it knows, β₁ or ``momentum``.
        """
        if "max_momentum" in group:
            beta = group["betas"][0] if "betas" in self.defaults else group["momentum"]
            for key in self.defaults:
                if key == "momentum" or re.fullmatch(r"momentum(_\d+)?\.beta", key):
                    group[key] = beta

    def check_keys(self, group: Mapping[str, Any]) -> None:
        """Warn of keys of a group that are nearly an option's; others are a user's own."""
        known = ["params", "param_names", "lr", "maximize", "name", *self.defaults]
        for key in group:
            if not isinstance(key, str) or key in known or key in _OF_SCHEDULERS:
                continue
            meant = "; did you mean 'lr'?" if key.lower() in _RATES else checks.nearest(key.lower(), known, cutoff=_NEAR)
            if meant:
                warn(
                    f"{self.name}: a parameter group has the key {key!r}, which is none of its options and does nothing{meant}"
                )

    def choices(self, groups: Sequence[Mapping[str, Any]]) -> list[Choice]:
        """The strategies of groups.

        Raises:
            TypeError, ValueError: naming a group's key and value that cannot be.
        """
        self.check_numbers(groups)
        return [self._choice(k, group) for k, group in enumerate(groups)]

    def _choice(self, k: int, group: Mapping[str, Any]) -> Choice:
        try:
            return self.build(group)
        except (KeyError, TypeError, ValueError) as error:
            if missing := [key for key in self.defaults if key not in group]:
                raise ValueError(f"{self.name}: parameter group {k} lacks {missing[0]!r}; put it back") from error
            wrong = next(filter(lambda key: self._mends(group, key), self.defaults), None)
            if wrong is None or str(error).startswith(f"{self.name}:"):
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self.name}: {wrong!r} of parameter group {k} cannot be {shown(group[wrong])} ({error})") from error

    def _mends(self, group: Mapping[str, Any], key: str) -> bool:
        """Whether a group would do with the usual value of an option."""
        try:
            self.build({**group, key: self.defaults[key]})
        except (KeyError, TypeError, ValueError):
            return False
        return True

    def check_numbers(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise TypeError or ValueError where what every optimizer has in its groups is not of its type."""
        for k, group in enumerate(groups):
            lr = group["lr"]
            if type(lr) is not float or lr != lr:
                number(self.name, f"lr of parameter group {k}", lr)
            if group["maximize"] is not False:
                flag(self.name, f"maximize of parameter group {k}", group["maximize"])

    def outside(self, key: str) -> str:
        """The name of a state tensor in a state dict."""
        return self.state.get(key, key)

    def inside(self, key: str) -> str:
        """The inverse of :meth:`outside`."""
        return next((ours for ours, theirs in self.state.items() if theirs == key), key)
