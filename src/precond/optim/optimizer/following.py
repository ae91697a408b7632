"""An optimizer follows what is done to its model, its groups, its state and the gradients between steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from precond.algebra import checks
from precond.optim.inputs.observer import Observer
from precond.optim.optimizer import entries, handover
from precond.optim.optimizer.binding import choices_of
from precond.optim.optimizer.bound import Bound
from precond.optim.optimizer.compatibility import check_precision
from precond.optim.optimizer.fusing import kernels_of
from precond.optim.optimizer.interrupts import Uninterrupted
from precond.optim.optimizer.models import Models, in_place
from precond.optim.optimizer.parameters import to_groups
from precond.optim.optimizer.planning import rebind


class Following(Bound):
    """Bound again, in all or in part, where something has changed."""

    def follow_model(self, besides: Collection[Tensor] = ()) -> None:
        """Follow the model where its parameters were frozen, thawed, converted, moved or replaced: before anything is bound anew, or asked
        about its parameters. Not within a forward, for whose time modules may hold others.

        Args:
            besides: parameters that come to the optimizer otherwise, and take no other's place.
        """
        bound = self._bound
        if bound.leaves and self._pending is None and (bound.converted(self.param_groups) or not bound.params_in_place):
            self._follow_groups(besides)  # a copy is bound when it watches a model

    def _follow_groups(self, besides: Collection[Tensor] = ()) -> None:
        """Follow groups and model: numbers may have changed, parameters been frozen, thawed, converted, moved, or replaced.

        State follows at once where parameters are others or elsewhere, and else with the next step.
        """
        for group in self.param_groups:
            self.naming.cycle(group)
        written = self._bound is not self._stepped and self._versions != entries.versions(self.state)
        match "broken" if written or entries.changed(self.state) else self._bound.follow(self.param_groups, self.naming):
            case "broken":
                self.restore()
                with Uninterrupted():
                    before = self._bound
                    given = before.replaced([p for group in self.param_groups for p in group["params"]])
                    moved = bool(given) or not before.modules_in_place or not all(map(in_place, before.leaves))
                    if moved:
                        self._take_over(given, besides)
                    bound = self.bound_to(self.param_groups, self.state)
                    check_precision(bound.leaves, bound.choices[0], self.rounding)
                    self._go_by(bound)
                    if not bound.steps_same_tensors_as(self._stepped):
                        self._commit()
                    self._spare.clear()
                    if moved:
                        self._listen()
                    self._model_hooks.follow(self.asking)
            case "renumbered":
                self._kernels_of = None
        self._settle()

    def _settle(self) -> None:
        """Bind anew where members of a stack must part. What is probed keeps its plan, made of the gradients that were there first."""
        if self._pending is None and self._bound.divided:
            self._go_by(self.bound_to(self.param_groups, self.state, absent=self._bound.joint.absent))

    def _take_over(self, given: Mapping[Tensor, Tensor], besides: Collection[Tensor]) -> None:
        """Parameters that stand in the place of others take over their state.

        Args:
            given: those that a trainer has put into the groups, by what was there.
            besides: those that take no other's place.
        """
        new = self.models.moved([leaf for leaf in self._bound.leaves if leaf.param not in given], besides)
        for group in self.param_groups:
            group["params"] = [new.get(p, p) for p in group["params"]]
        new = {**given, **new}
        handover.transfer_state(self.state, new)
        self._absent = frozenset(new.get(p, p) for p in self._absent)
        for owners in (self._owners, self._owned):
            handover.rename(owners, new, self.state)

    def _follow_for_step(self) -> None:
        """Follow what gradients there are, by which a step is taken."""
        self._follow_gradients()
        self._settle()
        self._commit()

    def _follow_gradients(self) -> None:
        """Leave out what has no gradient where others have one that it is stepped with, and take in what has one again."""
        if (absent := self._bound.joint.now()) == self._bound.joint.absent:
            return
        with Uninterrupted():
            before, kernels = self._bound, self._kernels_of
            self._go_by(rebind(self._setup(self.param_groups), before, self.state, absent))
            if kernels is not None and kernels[0] is not None:
                known = {id(cell): kernel for cell, kernel in zip(before.here, kernels[0], strict=True)}
                new = [cell for cell in self._bound.here if id(cell) not in known]
                made = kernels_of(new, self._bound.choices, self.rules, self._gradient_based) or ()
                known |= {id(cell): kernel for cell, kernel in zip(new, made, strict=True)}
                self._kernels_of = ([known[id(cell)] for cell in self._bound.here],)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``"params"`` may be a module. What the model holds has the model's names. State is made at once."""
        if not isinstance(param_group, dict):
            raise TypeError(f"add_param_group: expected a dict with 'params', got {type(param_group).__name__}")
        checks.learning_rate(self.naming.name, param_group.get("lr", 0.0))
        self.naming.check_keys(param_group)
        if not self._bound.leaves:  # called by torch.optim.Optimizer's constructor, on groups that are parsed already
            super().add_param_group(param_group)
            return
        if self._pending is not None:
            raise RuntimeError("add_param_group: a probe is under way; take its step, or give it up by restore(), before")
        modules = self.models.alive()
        known = len(modules)
        (group,) = to_groups([param_group], modules, self.param_groups, self.models)
        self.follow_model([p[1] if isinstance(p, tuple) else p for p in group["params"]])
        super().add_param_group(group)
        if "momentum" not in self.naming.defaults:
            group.pop("momentum", None)  # of the defaults, for schedulers alone
        try:
            check_precision(self.models.leaves([group]), choices_of(self.param_groups, self.naming)[-1], self.rounding)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.models.add(modules[known:])
        self._frozen = self.frozen | {p for p in group["params"] if not p.requires_grad}
        self._bind()
        self._listen()

    def restore(self) -> None:
        """Forget a probe that was not followed by its step (after an exception, say): parameters, gradients, random state."""
        if self._pending is not None:
            with Uninterrupted():
                pending, self._pending = self._pending, None
                pending.cancel()
                self._model_hooks.resume()

    def _listen(self) -> None:
        """Put the hooks on the model that second passes and input statistics need."""
        recorded = self._devices if self._probing else None
        self._model_hooks.begin(self.models, recorded, self.asking, self._before_forward)

    def _before_forward(self) -> Observer | None:
        """What has changed between steps is followed before inputs are observed, as after a resume; returns who observes them.

        What modules hold now may be lent for this forward alone, and is followed by the step; parameters without data wait for others to come.
        """
        bound = self._bound
        if bound.on_meta:
            self.follow_model()
        elif bound.converted(self.param_groups):
            with self.models.at_home():
                self.follow_model()
        return self._model_hooks.observer

    def watch(self, model: nn.Module) -> None:
        """Observe a model again, whose parameters these are: after the optimizer was copied or unpickled.

        Raises:
            ValueError: where a parameter of the optimizer is not one of the model's.
        """
        self.restore()
        self.follow_model()
        theirs = set(model.parameters())
        if alien := [leaf.name for leaf in self.models.leaves(self.param_groups) if leaf.param not in theirs]:
            raise ValueError(f"watch: {alien[0]!r} is not a parameter of this model; copy model and optimizer together")
        self.models = Models([model])
        self._bind()
        self._listen()

    def watches(self, model: nn.Module) -> bool:
        """Whether this very module is what it observes."""
        return any(model is module for module in self.models.alive())
