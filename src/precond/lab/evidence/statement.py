"""A statement, what was measured of it, and the chapters that hold statements in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Relation = Literal["=", "≤", "≥"]
Verdict = Literal["holds", "holds as corrected", "holds in part", "fails"]


@dataclass(frozen=True)
class Line:
    """Points of a plot, joined by a line or, with ``points``, not."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    points: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines over two axes; ``log`` names the logarithmic ones (``""``, ``"x"``, ``"y"``, ``"xy"``)."""

    x: str
    y: str
    lines: tuple[Line, ...]
    log: str = ""


@dataclass(frozen=True)
class Bars:
    """Named positive numbers, drawn from 1 on a logarithmic axis: condition numbers."""

    x: str
    values: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Finding:
    """What a measurement found.

    Attributes:
        quantity: what ``measured`` is, in words.
        expected: the number of the statement.
        measured: the number that was found.
        tolerance: how far ``measured`` may be off, beyond ``expected`` where this is a bound.
        relation: of ``measured`` to ``expected``.
        printed: the same number, measured of the statement as the paper prints it; None: what was measured is what is printed.
        on: data and model.
        figure: what the page shows.
    """

    quantity: str
    expected: float
    measured: float
    tolerance: float = 0.0
    relation: Relation = "="
    printed: float | None = None
    on: str = ""
    figure: Plot | Bars | None = None

    def accepts(self, number: float) -> bool:
        """Whether a number stands in the relation to what is expected, within the tolerance; NaN never does.

        Example:
            >>> Finding("κ", 10.0, 9.0, relation="≤").accepts(9.0), Finding("κ", 10.0, 9.0, 0.5).accepts(9.0)
            (True, False)
        """
        if math.isnan(number):
            return False
        over = number - self.expected
        off = {"=": abs(over), "≤": over, "≥": -over}[self.relation]
        return off <= self.tolerance


@dataclass(frozen=True)
class Statement:
    """A statement with its measurement.

    Attributes:
        name: short, for ``--only``.
        where: in the paper.
        claim: in words.
        finding: what was measured, with the first seed.
        correction: what is wrong in the paper's form and what is right; empty where it is printed rightly.
        seconds: that the measurements took.
        others: what was measured with further seeds.
    """

    name: str
    where: str
    claim: str
    finding: Finding
    correction: str = ""
    seconds: float = field(default=0.0, compare=False)
    others: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all seeds."""
        return (self.finding, *self.others)

    @property
    def held(self) -> int:
        """With how many seeds the statement holds, as corrected where it is."""
        return sum(finding.accepts(finding.measured) for finding in self.findings)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest number measured; NaN where one is."""
        numbers = [finding.measured for finding in self.findings]
        return (math.nan, math.nan) if any(map(math.isnan, numbers)) else (min(numbers), max(numbers))

    @property
    def verdict(self) -> Verdict:
        """A correction counts only where some measurement also rejects the printed form, if that can be measured."""
        if self.held < len(self.findings):
            return "holds in part" if self.held else "fails"
        if not self.correction:
            return "holds"
        refuted = any(finding.printed is None or not finding.accepts(finding.printed) for finding in self.findings)
        return "holds as corrected" if refuted else "fails"


Measurement = Callable[[], Finding]


@dataclass(frozen=True)
class Entry:
    """A statement that is yet to be measured."""

    name: str
    where: str
    claim: str
    correction: str
    measure: Measurement


@dataclass(frozen=True)
class Chapter:
    """Statements in the order in which they are written down."""

    title: str
    entries: list[Entry] = field(default_factory=list)

    def statement(self, name: str, where: str, claim: str, correction: str = "") -> Callable[[Measurement], Measurement]:
        """Decorator: the function measures this statement."""

        def register(measure: Measurement) -> Measurement:
            if any(entry.name == name for entry in self.entries):
                raise ValueError(f"chapter {self.title!r} has a statement {name!r} already; give this one another name")
            self.entries.append(Entry(name, where, claim, correction, measure))
            return measure

        return register

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)
