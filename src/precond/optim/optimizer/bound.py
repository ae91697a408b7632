"""An optimizer's parameters with their strategies, state and hooks, as the model and its groups change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from precond.algebra.vec import Scalar
from precond.optim.averages import WeightAverage
from precond.optim.blocks import Leaf
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.entrywise import Kernel
from precond.optim.engine.loop import Rules
from precond.optim.engine.shared_state import Ownership
from precond.optim.engine.sharing import Shared
from precond.optim.inputs import Request
from precond.optim.optimizer import entries, handover
from precond.optim.optimizer.averaging import Averaged
from precond.optim.optimizer.binding import Binding
from precond.optim.optimizer.closures import Clearings
from precond.optim.optimizer.graphs import out_of_graphs
from precond.optim.optimizer.model_hooks import ModelHooks
from precond.optim.optimizer.models import Models
from precond.optim.optimizer.naming import Naming
from precond.optim.optimizer.planning import Setup, asleep, bind
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
    _stepped: Binding  # that by which the last step was taken, of which `state` is
    _versions: list[int]  # of the tensors of `state`, when the groups were last read
    _model_hooks: ModelHooks  # the hooks on the model, and what layers received
    _clearings: Clearings  # how often gradients were cleared
    _averaged: Averaged | None  # the average of the weights, as it stands
    _kernels_of: tuple[list[Kernel | None] | None] | None  # those of the cells; None: not chosen yet
    _pending: Probe | None  # what is under way between the first gradient and the step
    _consolidated: dict[str, Any] | None  # the state dict of all ranks, until the next step
    _spare: dict[Tensor, Tensor]  # memory for parameters while they are at a probed point
    _absent: frozenset[Tensor] = frozenset()  # what had no gradient in the last step, and others of its layer had
    _frozen: Set[Tensor] | None = None  # what wanted none in the last step; None: there is none yet
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
        """Make cells and state for the parameters that wanted gradients in the last step, or are new, keeping the state that exists."""
        self.adopt(self.bound_to(self.param_groups, self.state, self._frozen), self.state)

    @property
    def cells(self) -> Sequence[Cell]:
        """What is stepped jointly, with the strategies in force and their state."""
        return self._bound.cells

    @property
    def asking(self) -> list[Cell]:
        """The cells that ask for what layers receive before the next step: what is absent may have a gradient then."""
        bound = self._bound
        if bound.asleep is None:
            some = bound.joint.absent and self.observes
            bound.asleep = asleep(self._setup(self.param_groups), bound, self.state) if some else []
        for cell in bound.asleep:
            for leaf, count in zip(cell.leaves, cell.state["step"], strict=True):
                count.copy_(self.state[leaf.param]["step"])
        return [*bound.cells, *bound.asleep]

    @property
    def frozen(self) -> Set[Tensor]:
        """The parameters that wanted no gradients in the last step."""
        return self._frozen or frozenset()

    @property
    def absent(self) -> frozenset[Tensor]:
        """The parameters that had no gradient in the last step, while others had one that they are stepped jointly with."""
        return self._absent

    @property
    def shared(self) -> list[Shared]:
        """What ranks step for each other."""
        return self._bound.shared

    def bound_to(
        self,
        groups: Sequence[Mapping[str, Any]],
        existing: Mapping[Tensor, dict[str, Any]],
        frozen: Set[Tensor] | None = None,
        absent: frozenset[Tensor] | None = None,
    ) -> Binding:
        """What groups come to, with the state that exists; nothing of the optimizer's own changes."""
        return bind(self._setup(groups), groups, existing, frozen, self._absent if absent is None else absent)

    def _setup(self, groups: Sequence[Mapping[str, Any]]) -> Setup:
        second, owners = self._gradient_based, dict(self._owners)

        def counting(leaf: Leaf) -> torch.device | None:
            asked = groups[leaf.group].get("capturable") or (self._may_skip_on_device and not owners)
            device = leaf.param.device
            return device if asked and device.type not in ("cpu", "meta") else None

        return Setup(self.models, self.naming, self.rules, self.rounding, self.average, self.observes, second, owners, counting)

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
        """Take a binding and its state as the optimizer's own."""
        self.state = state
        self._go_by(bound)
        self._commit()

    def _go_by(self, bound: Binding) -> None:
        """Look at things by a binding; where ranks step for each other now what they did not, all of them must.

        What is kept stays that of the last step until another is taken: to freeze, to look and to thaw changes nothing.
        """
        bound.owned = handover.receive(bound, self._owned, self.state, self.naming.outside)
        self._bound, self._kernels_of, self._pending = bound, None, None
        self._averaged = None if self.average is None else Averaged.of(self.average, bound.entries)
        self._versions = entries.versions(self.state)

    def _commit(self) -> None:
        """Keep what a step is taken by, and no more what the one before was."""
        bound, before = self._bound, self._stepped
        if bound is before:
            return
        if not isinstance(self.state, entries.States):
            self.state = entries.States(given=self.state)
        handover.commit(before, bound, self.state, self.naming)
        entries.follow(self.state)
        self._stepped, self._consolidated = bound, None
        self._absent, self._frozen = bound.joint.absent, bound.frozen
        self._owners, self._owned = bound.owners, bound.owned

    def _lr(self, leaf: Leaf) -> Scalar:
        lr = self.param_groups[leaf.group]["lr"]
        scale = self._bound.choices[leaf.group].preconditioner.lr_scale(leaf)
        return lr if scale == 1 else lr * scale

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
