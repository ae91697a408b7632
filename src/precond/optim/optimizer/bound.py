"""An optimizer's parameters with their strategies, state and hooks, as the model and its groups change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from precond.algebra import checks
from precond.algebra.vec import Scalar
from precond.optim.averages import WeightAverage
from precond.optim.blocks import Leaf
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.entrywise import Kernel
from precond.optim.engine.loop import Rules
from precond.optim.engine.shared_state import Ownership
from precond.optim.engine.sharing import Shared
from precond.optim.inputs import Request
from precond.optim.inputs.observer import Observer
from precond.optim.optimizer import entries, handover
from precond.optim.optimizer.averaging import Averaged
from precond.optim.optimizer.binding import Binding, Setup, bind, choices_of, transfer_state
from precond.optim.optimizer.closures import Clearings
from precond.optim.optimizer.compatibility import check_precision
from precond.optim.optimizer.graphs import out_of_graphs
from precond.optim.optimizer.interrupts import Uninterrupted
from precond.optim.optimizer.model_hooks import ModelHooks
from precond.optim.optimizer.models import Models, in_place
from precond.optim.optimizer.naming import Naming
from precond.optim.optimizer.parameters import to_groups
from precond.optim.optimizer.probing import Probe


class Bound(torch.optim.Optimizer):
    """Its groups, strategies, state and hooks: bound when it is made, and again where model or groups have changed."""

    naming: Naming
    rules: Rules
    rounding: str
    nonfinite: str
    engine: str
    average: WeightAverage | None
    models: Models
    _bound: Binding  # what the groups came to when they were last read
    _model_hooks: ModelHooks  # the hooks on the model, and what layers received
    _clearings: Clearings  # how often gradients were cleared
    _averaged: Averaged | None  # the average of the weights, as it stands
    _kernels_of: tuple[list[Kernel | None] | None] | None  # those of the cells; None: not chosen yet
    _pending: Probe | None  # what is under way between the first gradient and the step
    _consolidated: dict[str, Any] | None  # the state dict of all ranks, until the next step
    _spare: dict[Tensor, Tensor]  # memory for parameters while they are at a probed point
    _owners: dict[Tensor, int]  # which rank owns a parameter's block
    _owned: Ownership  # of whose state one rank keeps what others do not have, also of what is frozen
    _requests: frozenset[Request]  # the statistics of inputs that preconditioners ask for
    _timeless: bool  # whether the number of a step decides nothing about its work
    _gradient_based: int | None  # which regularizer wants a second gradient, or a product with the Hessian
    _probing: bool  # whether it wants a gradient at another point
    _closing: bool  # within a closure
    _evaluating: bool  # within ``averaged()``
    _scaled: bool  # whether a scaler has handed over what it found
    _warned: bool  # that a second pass sees no model

    def _bind(self) -> None:
        """Make cells and state for the parameters that want gradients, keeping the state that exists."""
        self.adopt(self.bound_to(self.param_groups, self.state), self.state)

    @property
    def cells(self) -> Sequence[Cell]:
        """What is stepped jointly, with the strategies in force and their state."""
        return self._bound.cells

    @property
    def frozen(self) -> set[Tensor]:
        """The parameters that wanted no gradients in the last step."""
        return self._bound.frozen

    @property
    def shared(self) -> list[Shared]:
        """What ranks step for each other."""
        return self._bound.shared

    def bound_to(
        self, groups: Sequence[Mapping[str, Any]], existing: Mapping[Tensor, dict[str, Any]], frozen: set[Tensor] | None = None
    ) -> Binding:
        """What groups come to, with the state that exists; nothing of the optimizer's own changes."""

        def counting(leaf: Leaf) -> torch.device | None:
            device, asked = leaf.param.device, groups[leaf.group].get("capturable") or self._may_skip_on_device
            return device if asked and device.type not in ("cpu", "meta") else None

        setup = Setup(self.models, self.naming, self.rules, self.rounding, self.average, self.observes, self._gradient_based)
        return bind(setup, groups, existing, frozen, self._owners, counting)

    @property
    def _may_skip_on_device(self) -> bool:
        """Whether a step may be skipped without the host's knowing: accelerators count their steps then.

        Where the number of a step decides what it does, and where it takes statistics of inputs, whose samples the host counts, second
        gradients, an average of the weights, or where ranks step for each other, the host must know.
        """
        skips = self.nonfinite == "skip" or (self._scaled and self.nonfinite == "propagate")
        return (
            skips
            and self._timeless
            and self._gradient_based is None
            and not self._requests
            and self.average is None
            and not self._owners
        )

    def adopt(self, bound: Binding, state: defaultdict[Tensor, Any]) -> None:
        """Take a binding and its state as the optimizer's own; where ranks step for each other now what they did not, all of them must."""
        entries.forget(state, bound.entries)
        self._owned = handover.receive(bound, self._owned, state, self.naming.outside)
        self.state = state if isinstance(state, entries.States) else entries.States(given=state)
        for leaf, key, tensor in bound.entries:
            self.state[leaf.param][self.naming.outside(key)] = tensor
        entries.follow(self.state)
        self._bound, self._kernels_of, self._pending, self._consolidated = bound, None, None, None
        self._averaged = None if self.average is None else Averaged.of(self.average, bound.entries)

    def _follow_groups(self) -> None:
        """Follow groups and model: numbers may have changed, parameters been frozen, thawed, converted, moved, or replaced."""
        for group in self.param_groups:
            self.naming.cycle(group)
        match "broken" if entries.changed(self.state) else self._bound.follow(self.param_groups, self.naming):
            case "broken":
                self.restore()
                with Uninterrupted():
                    before = self._bound
                    given = before.replaced([p for group in self.param_groups for p in group["params"]])
                    moved = bool(given) or not before.modules_in_place or not all(map(in_place, before.leaves))
                    if moved:
                        self._follow_model(given)
                    bound = self.bound_to(self.param_groups, self.state)
                    check_precision(bound.leaves, bound.choices[0], self.rounding)
                    self.adopt(bound, self.state)
                    self._spare.clear()
                    if moved:
                        self._listen()
                    self._model_hooks.follow(self._bound.cells)
                    handover.drop(before.entries, self._bound.entries, self.state, self.naming.outside)
                    entries.follow(self.state)
            case "renumbered":
                self._kernels_of = None
        self._settle()

    def _settle(self) -> None:
        """Bind anew where members of a stack must part. What is probed keeps its plan, made of the gradients that were there first."""
        if self._pending is None and self._bound.divided:
            self._bind()

    def _follow_model(self, given: Mapping[Tensor, Tensor]) -> None:
        """Parameters that stand in the place of others take over their state.

        Args:
            given: those that a trainer has put into the groups, by what was there.
        """
        new = self.models.moved([leaf for leaf in self._bound.leaves if leaf.param not in given])
        for group in self.param_groups:
            group["params"] = [new.get(p, p) for p in group["params"]]
        new = {**given, **new}
        transfer_state(self.state, new)
        for owners in (self._owners, self._owned):
            handover.rename(owners, new, self.state)

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
        super().add_param_group(group)
        if "momentum" not in self.naming.defaults:
            group.pop("momentum", None)  # of the defaults, for schedulers alone
        try:
            check_precision(self.models.leaves([group]), choices_of(self.param_groups, self.naming)[-1], self.rounding)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.models.add(modules[known:])
        self._bind()
        self._listen()

    def _lr(self, leaf: Leaf) -> Scalar:
        lr = self.param_groups[leaf.group]["lr"]
        scale = self._bound.choices[leaf.group].preconditioner.lr_scale(leaf)
        return lr if scale == 1 else lr * scale

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
        self._model_hooks.begin(self.models, recorded, self._bound.cells, self._before_forward)

    def _before_forward(self) -> Observer | None:
        """What has changed between steps is followed before inputs are observed, as after a resume; returns who observes them."""
        self._follow_replaced()
        return self._model_hooks.observer

    def _follow_replaced(self) -> None:
        """Follow the groups where parameters were frozen, thawed, converted, or others put in their places."""
        if self._pending is None and self._bound.converted(self.param_groups):
            self._follow_groups()

    def watch(self, model: nn.Module) -> None:
        """Observe a model again, whose parameters these are: after the optimizer was copied or unpickled.

        Raises:
            ValueError: where a parameter of the optimizer is not one of the model's.
        """
        theirs = set(model.parameters())
        if alien := [leaf.name for leaf in self.models.leaves(self.param_groups) if leaf.param not in theirs]:
            raise ValueError(f"watch: {alien[0]!r} is not a parameter of this model; copy model and optimizer together")
        self.models = Models([model])
        self._bind()
        self._listen()

    def watches(self, model: nn.Module) -> bool:
        """Whether this very module is what it observes."""
        return any(model is module for module in self.models.alive())

    @out_of_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. What layers received in forwards whose gradients are cleared does not count."""
        if not self._closing:
            self._model_hooks.begin_clearing()
        super().zero_grad(set_to_none)
        if not self._closing:
            self._model_hooks.end_clearing()
        self._clearings.count += 1

    @property
    def observes(self) -> bool:
        """Whether it observes the inputs of layers."""
        return bool(self._requests)

    def unobserved(self) -> AbstractContextManager[None]:
        """Forwards inside are another optimizer's: this one neither observes layer inputs there nor notes the random state.

        A generator's loss runs through the discriminator, and the discriminator's data come from the generator. Without this,
        each optimizer's statistics are of both.

        Example:
            >>> import torch, precond
            >>> G, D = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
            >>> of_G, of_D = precond.bnp(G), precond.bnp(D)
            >>> z, real = torch.randn(8, 2), torch.randn(8, 2)
            >>> for _ in range(2):
            ...     of_D.zero_grad()
            ...     with of_G.unobserved():
            ...         fake = G(z).detach()
            ...     (D(fake) - D(real)).mean().backward()
            ...     of_D.step()
            ...     of_G.zero_grad()
            ...     with of_D.unobserved():
            ...         (-D(G(z))).mean().backward()
            ...     of_G.step()
            >>> of_D.state[D.weight]["count"].item(), of_G.state[G.weight]["count"].item()
            (32.0, 16.0)
        """
        return self._model_hooks.away()

    def close(self) -> None:
        """Remove the hooks on the model: before ``torch.jit.script``, or ``torch.compile(fullgraph=True)`` of training forwards.

        :meth:`watch` puts them on again: a recipe that observes inputs needs that before its next step. The optimizer's end
        removes them too.
        """
        self._model_hooks.close()

    @property
    def _devices(self) -> set[torch.device]:
        return {leaf.param.device for leaf in self._bound.leaves}

    def _check_training(self, what: str) -> None:
        if self._evaluating:
            raise RuntimeError(f"{what}: the parameters stand at their average; leave `with optimizer.averaged():` first")
