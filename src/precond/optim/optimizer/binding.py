"""What parameter groups come to: leaves, the strategies of each group, and cells with their state."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from precond.optim.blocks import Leaf, whole_numbers
from precond.optim.engine import plan
from precond.optim.engine.adoption import named
from precond.optim.engine.cells import Cell, Choice
from precond.optim.engine.shared_state import Ownership
from precond.optim.engine.sharing import Shared
from precond.optim.momentum import LENGTHS
from precond.optim.optimizer.averaging import COUNT, MEAN
from precond.optim.optimizer.joint import Joint
from precond.optim.optimizer.models import Location
from precond.optim.optimizer.naming import Naming
from precond.optim.optimizer.readings import PARAMETERS, SHAPE, Kinds, hold_tensors, read_kinds, read_options, structure

OF_VALUES = ("residual", MEAN, COUNT)
"""State of a parameter's values, which is kept whether it is stepped or not."""

_SPARE = frozenset(("m", *LENGTHS, *OF_VALUES))


def is_spare(key: str) -> bool:
    """Whether a state may hold what has this name where nothing keeps it, as with another momentum, and goes on without it."""
    return not _SPARE.isdisjoint(key.split("."))


Following = Literal["same", "renumbered", "broken"]
"""Of the groups since a binding was made: nothing has changed; numbers have; parameters or strategies have."""


@dataclass
class Binding:
    """Derived from groups and state, and made again when these change in kind.

    Attributes:
        entries: (leaf, key, tensor) of all state.
        options: the groups' options when it was made.
        locations: of the modules that own the leaves.
        shapes: of all leaves, as they were then.
        kinds: of all leaves, as they were then.
        joint: what is stepped jointly, and what of it is absent, having no gradient.
        asleep: the cells of layers whose observed weights are absent, which ask for what these receive; None: not made yet.
        owners: which rank owns a parameter's block.
        owned: of whose state one rank keeps what others do not have, also of what is frozen.
    """

    leaves: list[Leaf] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    entries: list[tuple[Leaf, str, Tensor]] = field(default_factory=list)
    options: list[tuple[Any, ...]] = field(default_factory=list)
    locations: list[Location] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    kinds: Kinds = ([], [], [])
    joint: Joint = field(default_factory=Joint)
    asleep: list[Cell] | None = None
    owners: dict[Tensor, int] = field(default_factory=dict)
    owned: Ownership = field(default_factory=dict)

    @property
    def divided(self) -> bool:
        """Whether members of a stack have come apart: some have a gradient now, or have made more steps, and others not."""
        for cell in self.stacks:
            m = len(cell.block.leaves)
            has = {any(leaf.param.grad is not None for leaf in cell.leaves[i : i + m]) for i in range(0, len(cell.index), m)}
            if len(has) > 1 or (steps := whole_numbers(cell.state["step"])) != steps[:m] * len(cell.members):
                return True
        return False

    @cached_property
    def stacks(self) -> list[Cell]:
        """The cells of several blocks."""
        return [cell for cell in self.blocks if len(cell.members) > 1]

    @cached_property
    def blocks(self) -> list[Cell]:
        """The cells that step blocks, also those of other ranks."""
        return [each for cell in self.cells for each in cell.cells]

    @cached_property
    def here(self) -> list[Cell]:
        """What this process steps by itself, where nothing looks at all of a step."""
        return [each for cell in self.cells for each in cell.here]

    @cached_property
    def in_place(self) -> list[Shared]:
        """The cells that ranks share, and whose owners step parameters in place."""
        return [cell for cell in self.shared if cell.in_place]

    @cached_property
    def shared(self) -> list[Shared]:
        """The cells that ranks step for each other."""
        return [cell for cell in self.cells if isinstance(cell, Shared)]

    @cached_property
    def sharded(self) -> list[Leaf]:
        """The leaves that are divided among processes."""
        return [leaf for leaf in self.leaves if leaf.shard is not None]

    def read_counts(self) -> None:
        """Let the host know of the steps that devices have counted."""
        for cell in self.cells:
            for ours, theirs in zip(cell.state["step"], cell.state.get("clock", ()), strict=False):
                ours.copy_(theirs)

    @property
    def waiting(self) -> set[Tensor]:
        """The parameters that are not stepped, and whose state waits: those that are frozen or absent."""
        return self.frozen | self.joint.absent

    @property
    def frozen(self) -> set[Tensor]:
        """The parameters that wanted no gradients."""
        return {leaf.param for leaf, wants in zip(self.leaves, self.kinds[0], strict=True) if not wants}

    def converted(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether parameters were frozen, thawed, converted or moved since, or others put in their places in the groups."""
        params = groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]
        same = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        return not same or self.kinds != read_kinds(params) or not self.modules_in_place

    def is_optional(self, key: str) -> bool:
        """Whether a state goes on without what has this name."""
        return is_spare(key) or not self._optional.isdisjoint(key.split("."))

    @cached_property
    def _optional(self) -> frozenset[str]:
        return frozenset().union(*(named(cell.preconditioner, "optional") for cell in self.blocks))

    def steps_same_tensors_as(self, other: Binding) -> bool:
        """Whether both are of the same parameters, of which none was converted or moved; some may have been frozen or thawed."""
        same = len(self._params) == len(other._params) and all(map(operator.is_, self._params, other._params))
        return same and self.kinds[1:] == other.kinds[1:]

    @cached_property
    def on_meta(self) -> bool:
        """Whether some parameters have no data, and wait for others to come."""
        return any(p.is_meta for p in self._params)

    @property
    def modules_in_place(self) -> bool:
        """Whether the model's modules are where they were."""
        children, names, modules = self._locations
        return list(map(dict.get, children, names)) == modules

    @cached_property
    def _locations(self) -> tuple[list[dict[str, Any]], list[str], list[Any]]:
        """``locations`` by columns: asked for in each step."""
        return (
            [c for c, _, _ in self.locations],
            [name for _, name, _ in self.locations],
            [module for _, _, module in self.locations],
        )

    def replaced(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Parameter → the one that stands in its place in the groups, as a trainer that shards the model puts it there."""
        return {leaf.param: p for leaf, p in zip(self.leaves, params, strict=False) if leaf.param is not p}

    @cached_property
    def _params(self) -> list[Tensor]:
        return [leaf.param for leaf in self.leaves]

    @property
    def params_in_place(self) -> bool:
        """Whether modules hold the parameters that were theirs: :func:`~precond.optim.optimizer.models.in_place` of all leaves."""
        modules, names, params = self._param_locations
        return all(map(operator.is_, map(dict.get, map(PARAMETERS, modules), names), params))

    @cached_property
    def _param_locations(self) -> tuple[list[nn.Module], list[str], list[Tensor]]:
        """Modules, what they call their parameters, and these, by columns: asked for in each step."""
        found = [
            (m, leaf.attribute, leaf.param) for leaf in self.leaves if (m := leaf.module) is not None and leaf.shard is None
        ]
        return [m for m, _, _ in found], [name for _, name, _ in found], [p for _, _, p in found]

    def follow(self, groups: Sequence[Mapping[str, Any]], naming: Naming) -> Following:
        """Take over numbers that have changed in the groups.

        Raises:
            TypeError, ValueError: for numbers that cannot be.
            RuntimeError: where a parameter has another shape.
        """
        naming.check_numbers(groups)
        if list(map(SHAPE, self._params)) != self.shapes:  # a kernel would write beyond its state
            leaf, before = next((leaf, s) for leaf, s in zip(self.leaves, self.shapes, strict=True) if leaf.param.shape != s)
            raise RuntimeError(
                f"{naming.name}: {leaf.name!r} has the shape {tuple(leaf.param.shape)}, and had {tuple(before)} when the optimizer was made, "
                "which its state fits: make the optimizer after such changes"
            )
        options = read_options(groups, naming)
        if self.converted(groups) or not self.params_in_place:
            return "broken"
        if options == self.options:
            return "same"
        choices = choices_of(groups, naming)
        live = sorted(i for cell in self.blocks for i in cell.index)
        of = {unit.index: unit for unit in plan.units(self.leaves, live, choices)}
        if of.keys() != {index for cell in self.blocks for index in cell.members}:
            return "broken"
        if structure(options) != structure(self.options) and not self._stays(choices, of, groups):
            return "broken"
        same = not hold_tensors(options) and plan.unchanged(self.blocks, of, choices, self.choices)
        self.choices, self.options = choices, options
        if same:
            return "same"
        for cell in self.blocks:
            first, *others = (of[index] for index in cell.members)
            if any(u.preconditioner != first.preconditioner or u.momentum != first.momentum for u in others):
                return "broken"
            cell.preconditioner, cell.momentum = first.preconditioner, first.momentum
        for shared in self.shared:
            shared.renumber()
        return "renumbered"

    def _stays(self, choices: Sequence[Choice], units: Mapping[Any, plan.Unit], groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether choices that say something else come to the same for every block, and the host counts."""
        counted = any(g.get("capturable") for g in groups) or any("clock" in cell.state for cell in self.blocks)
        return not counted and plan.unchanged(self.blocks, units, choices, self.choices)


def choices_of(groups: Iterable[Mapping[str, Any]], naming: Naming) -> list[Choice]:
    """The strategies of groups.

    Raises:
        ValueError: for numbers out of range, and where groups differ in what a penalty is, not in its weight alone.
    """
    choices = naming.choices(list(groups))
    for choice in choices[1:]:
        for r, first in zip(choice.regularizers, choices[0].regularizers, strict=True):
            for f in fields(r):  # type: ignore[arg-type]
                if f.name not in r.scalars and getattr(r, f.name) != getattr(first, f.name):
                    scalars = " and ".join(r.scalars) or "nothing"
                    left_out = f"{r.scalars[0]}=0" if r.scalars else "where="
                    raise ValueError(
                        f"{naming.name}: groups may differ in {scalars} of {type(r).__name__}, not in {f.name}; give all groups one "
                        f"value, or leave parameters out by {left_out}"
                    )
    return choices
