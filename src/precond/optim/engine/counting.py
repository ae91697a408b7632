"""Counts of steps, of a cell or of many, on the host and on devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from precond.algebra.vec import Vec
from precond.optim.blocks import Counts, State
from precond.optim.engine.verdict import Verdict

if TYPE_CHECKING:
    from precond.optim.engine.cells import Cell


def as_count(known: Any) -> Tensor:
    """A count of steps, from one that is known; None: 0."""
    # On the host, as torch keeps it: reading it never waits for a device. In float32, as torch has it, 2²⁴ + 1 would be 2²⁴.
    return torch.as_tensor(0.0 if known is None else known, device="cpu", dtype=torch.float64)


def count_together(states: Sequence[State], there: torch.device | None) -> None:
    """Put the counts of a cell's leaves into one tensor, of which they are entries, and into one of a device, which is to count them.

    The first of the states has all of them.
    """
    own = states[0]["step"]
    base, known = torch.stack(own), {id(t): k for k, t in enumerate(own)}
    # float32, as torch's fused kernels read it.
    clock = None if there is None else base.to(there, torch.float32).unbind()
    steps = Counts(base.unbind())
    for state in states:
        _put(state, known, steps, clock)


def _put(state: State, known: dict[int, int], steps: Counts, clock: Vec | None) -> None:
    index = [known[id(t)] for t in state["step"]]
    for value in state.values():
        if isinstance(value, State):
            _put(value, known, steps, clock)
    state["step"] = steps if index == list(range(len(steps))) else Counts(steps[k] for k in index)
    if clock is not None:
        state["clock"] = tuple(clock[k] for k in index)


def count_step(states: Sequence[State], verdict: Verdict | None = None, by: float = 1.0) -> None:
    """Count a step of each leaf of some cells, in place, or by −1 take it back; on devices only if it is taken."""
    count_on_host(states, by)
    clocks: dict[torch.device, list[Vec]] = {}
    for state in states:
        if (clock := state.get("clock")) is not None:
            clocks.setdefault(clock[0].device, []).append(clock)
    for device, of in clocks.items():
        _add(of, by if verdict is None else by * verdict.taken(device))


def count_on_host(states: Sequence[State], by: float = 1.0) -> None:
    """The host's part of counting."""
    _add([state["step"] for state in states], by)


@contextmanager
def uncounted(cells: Sequence[Cell]) -> Iterator[None]:
    """What the host counts inside is forgotten at the end: a step that is captured has not happened."""
    counts = [t for cell in cells for t in cell.state["step"]]
    before = [t.clone() for t in counts]
    try:
        yield
    finally:
        torch._foreach_copy_(counts, before)
        increment_version(counts)


def _add(counts: Sequence[Vec], number: float | Tensor) -> None:
    together: list[Tensor] = []
    for of in counts:
        base = of[0]._base
        together += [base] if base is not None and base.shape == (len(of),) else of
    if isinstance(number, Tensor):
        for count in together:  # one by one: captured, the operation on many at once goes on with the number of its first run
            count.add_(number)
    elif together:
        torch._foreach_add_(together, number)
        # By versions it is known that counts have changed, and below a dispatch mode multi-tensor operations leave them as they are.
        increment_version(together)
