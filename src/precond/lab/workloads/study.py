"""What is compared with what: tasks, and who contends in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from precond.lab.workloads.entrant import Entrant
from precond.lab.workloads.problem import Metric, Workload
from precond.lab.workloads.search import LogUniform, Search
from precond.lab.workloads.training import Plan

LrFrom = Literal["given", "own", "searched", "default"]


@dataclass(frozen=True)
class Contender:
    """An entrant, what it trains, and where its learning rate comes from.

    Args:
        entrant: makes the optimizer; its own learning rate goes before.
        workload: makes what is trained; what it raises is reported as the entrant's failure.
        lr: a range that is searched, a number, or None for the recipe's default.
    """

    entrant: Entrant
    workload: Callable[[], Workload]
    lr: LogUniform | float | None = None

    @property
    def label(self) -> str:
        """Its entrant's."""
        return self.entrant.label

    @property
    def lr_from(self) -> LrFrom:
        """Where its learning rate comes from."""
        if self.entrant.lr is not None:
            return "own"
        if isinstance(self.lr, LogUniform):
            return "searched"
        return "default" if self.lr is None else "given"


@dataclass(frozen=True)
class Task:
    """Contenders on the same data for the same number of steps.

    Args:
        name: part of titles and file names.
        contenders: in order.
        plan: what all trainings share; learning rate and seed are replaced.
        seeds: of the trainings that are reported.
        search: the budget of each contender.
        search_seed: of the trials' initialization and order of data.
        metric: what is reported beside the loss.
        facts: what is said of data and model.
        reference: label of the contender that sets the target; None: the first that finishes.
        target: the loss to be reached, where it is given.
        target_part: the part of the data on which the loss is to be reached.
        allowance: by so much of itself the target lies above the reference's best loss.
        timings: seconds of reported trainings that take less than five are medians of so many rounds through all of these.
        numbers: of the contenders, by which files are named; None: 0, 1, 2, …
        family: with whose tasks its results are averaged; None: with all.
        skipped: who does not take part, and why.
    """

    name: str
    contenders: tuple[Contender, ...]
    plan: Plan
    seeds: tuple[int, ...]
    search: Search
    search_seed: int = 1000
    metric: Metric | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    allowance: float = 0.1
    target: float | None = None
    target_part: Literal["validation", "train"] = "validation"
    timings: int = 1
    numbers: tuple[int, ...] | None = None
    family: str | None = None
    skipped: tuple[str, ...] = ()

    @property
    def numbered(self) -> tuple[tuple[int, Contender], ...]:
        """The contenders with their numbers."""
        return tuple(enumerate(self.contenders) if self.numbers is None else zip(self.numbers, self.contenders, strict=True))

    def only(self, wanted: Callable[[str], bool]) -> Task:
        """The same with those contenders alone whose labels are wanted, and the reference; they keep their numbers."""
        kept = [(n, c) for n, c in self.numbered if c.label == self.reference or wanted(c.label)]
        return replace(self, contenders=tuple(c for _, c in kept), numbers=tuple(n for n, _ in kept))

    @property
    def amount(self) -> int:
        """Number of trainings, at most."""
        searched = sum(c.lr_from == "searched" for c in self.contenders)
        return searched * self.search.most + len(self.contenders) * len(self.seeds)
