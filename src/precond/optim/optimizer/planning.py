"""From groups and state to a binding: all of it, or what is concerned where gradients come and go."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from precond.optim.averages import WeightAverage
from precond.optim.blocks import Leaf, by_layer
from precond.optim.engine import plan
from precond.optim.engine.cells import Cell, Choice
from precond.optim.engine.loop import Rules
from precond.optim.engine.plan import Entries
from precond.optim.optimizer import averaging
from precond.optim.optimizer.binding import OF_VALUES, Binding, choices_of
from precond.optim.optimizer.entries import with_data
from precond.optim.optimizer.fusing import fusible
from precond.optim.optimizer.joint import Joint
from precond.optim.optimizer.models import Models
from precond.optim.optimizer.naming import Naming
from precond.optim.optimizer.readings import read_kinds, read_options


@dataclass(frozen=True)
class Setup:
    """What an optimizer was made with.

    Attributes:
        average: of the weights.
        observes: whether it observes the inputs of layers.
        second: the number of the regularizer that wants a second gradient, or None.
        owners: which rank owns which parameters' blocks, where ranks share them; a copy, completed by a plan.
        counting: the device that counts a leaf's steps; None: the host does.
    """

    models: Models
    naming: Naming
    rules: Rules
    rounding: str
    average: WeightAverage | None
    observes: bool
    second: int | None
    owners: dict[Tensor, int]
    counting: Callable[[Leaf], torch.device | None]

    def planned(
        self,
        leaves: Sequence[Leaf],
        live: Iterable[int],
        choices: Sequence[Choice],
        existing: Mapping[Tensor, dict[str, Any]],
        apart: bool = False,
    ) -> tuple[list[Cell], Entries]:
        """Cells and entries of some leaves.

        Args:
            apart: every block alone.
        """
        reference, clean = self.rules.reference or apart, self.rules.statistics_from == "loss"
        of = leaves, sorted(live), choices, existing, self.naming.outside
        return plan.build(*of, reference, clean, self.owners, self.counting, fusible(choices, self.rules, self.second))


def bind(
    setup: Setup,
    groups: Sequence[Mapping[str, Any]],
    existing: Mapping[Tensor, dict[str, Any]],
    frozen: Container[Tensor] | None,
    absent: frozenset[Tensor],
) -> Binding:
    """Cells for the parameters that want gradients; state that ``existing`` holds is taken over, in the parameters' dtype and place.

    Args:
        frozen: the parameters that want no gradients; None: those that require none now.
        absent: those that had none in the last step, where others had that they are stepped jointly with.
    """
    existing = with_data(existing)
    leaves, choices = setup.models.leaves(groups, setup.observes), choices_of(groups, setup.naming)
    params = [leaf.param for leaf in leaves]
    frozen = {p for p in params if not p.requires_grad} if frozen is None else frozen
    wanting = [i for i, p in enumerate(params) if p not in frozen]
    absent = absent.intersection(params[i] for i in wanting)
    cells, entries = setup.planned(leaves, [i for i in wanting if params[i] not in absent], choices, existing)
    if setup.rounding == "kahan":
        entries += _residuals([leaves[i] for i in wanting], existing)
    entries += averaging.entries(setup.average, [leaves[i] for i in wanting], existing)
    if absent:
        units = [unit.index for unit in plan.units(leaves, wanting, choices) if not unit.preconditioner.entrywise]
    else:
        units = [i for held in cells for cell in held.cells if not cell.preconditioner.entrywise for i in cell.members]
    layers = [tuple(wanting[k] for k in index) for index in by_layer([leaves[i] for i in wanting])]
    joint = Joint(params, [unit for unit in units if len(unit) > 1], layers, absent)
    _, dtypes, devices = read_kinds(params)
    kinds = [p not in frozen for p in params], dtypes, devices
    locations, shapes = setup.models.locations(leaves), [p.shape for p in params]
    options = read_options(groups, setup.naming)
    of = leaves, choices, _in_order(cells), entries, options, locations, shapes, kinds, joint
    return Binding(*of, owners=setup.owners)


def rebind(setup: Setup, bound: Binding, existing: Mapping[Tensor, dict[str, Any]], absent: frozenset[Tensor]) -> Binding:
    """The same where others are absent: what is not concerned keeps its cells."""
    leaves, choices = bound.leaves, bound.choices
    if setup.owners:  # what ranks share they exchange together
        concerned = {i for i, wants in enumerate(bound.kinds[0]) if wants}
    else:
        concerned = bound.joint.concerned(absent, [cell.index for cell in bound.cells])
    known = _of(existing, [leaves[i] for i in concerned])
    cells, entries = setup.planned(leaves, [i for i in concerned if leaves[i].param not in absent], choices, known)
    return replace(
        bound,
        cells=_in_order([cell for cell in bound.cells if concerned.isdisjoint(cell.index)] + cells),
        entries=[e for e in bound.entries if e[0].param not in known or e[1] in OF_VALUES] + entries,
        joint=replace(bound.joint, absent=absent),
        asleep=None,
        owners=setup.owners,
    )


def _in_order(cells: Iterable[Cell]) -> list[Cell]:
    """In the order of leaves, however they were planned: norms over all are sums in that order."""
    return sorted(cells, key=lambda cell: cell.index)


def asleep(setup: Setup, bound: Binding, existing: Mapping[Tensor, dict[str, Any]]) -> list[Cell]:
    """The cells of units whose observed weights are absent, as they will be stepped when these have gradients again."""
    leaves, joint = bound.leaves, bound.joint
    weights = {s.weight for leaf in leaves if leaf.param in joint.absent for s in leaf.sites} & joint.absent
    of = [i for unit in joint.units if any(leaves[i].param in weights for i in unit) for i in unit]
    return setup.planned(leaves, of, bound.choices, _of(existing, [leaves[i] for i in of]), apart=True)[0] if of else []


def _of(existing: Mapping[Tensor, dict[str, Any]], leaves: Iterable[Leaf]) -> dict[Tensor, dict[str, Any]]:
    return with_data({leaf.param: existing.get(leaf.param, {}) for leaf in leaves})


def _residuals(leaves: Sequence[Leaf], existing: Mapping[Tensor, dict[str, Any]]) -> list[tuple[Leaf, str, Tensor]]:
    """State entries of the Kahan compensation of 16-bit parameters."""
    narrow = [p for p in leaves if p.param.dtype in (torch.bfloat16, torch.float16)]
    known = [existing.get(leaf.param, {}).get("residual") for leaf in narrow]
    return [
        (
            leaf,
            "residual",
            torch.zeros_like(leaf.param, requires_grad=False) if r is None else r.to(leaf.param.device, leaf.param.dtype),
        )
        for leaf, r in zip(narrow, known, strict=True)
    ]
