"""All statements, measured in order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from precond.analysis.curvature import CurvatureError
from precond.lab.evidence import (
    adaptive,
    adaptive_methods,
    batchnorm,
    descent,
    gradient_regularization,
    normalization,
    persample,
    persample_conditioning,
    preconditioned_descent,
    recurrent,
    regularization,
)
from precond.lab.evidence.problems import drawn
from precond.lab.evidence.statement import Chapter, Entry, Finding, Statement

CHAPTERS: tuple[Chapter, ...] = tuple(
    module.CHAPTER
    for module in (
        descent,
        preconditioned_descent,
        adaptive,
        adaptive_methods,
        regularization,
        gradient_regularization,
        normalization,
        batchnorm,
        persample,
        persample_conditioning,
        recurrent,
    )
)
"""A statement more is one function more in one of these; those of one title stand together."""


@dataclass(frozen=True)
class Section:
    """The measured statements of a chapter."""

    title: str
    statements: tuple[Statement, ...]


def chosen(only: Sequence[str] = ()) -> list[tuple[Chapter, Entry]]:
    """Statements by names or patterns of names; all where none are given.

    Raises:
        ValueError: for a pattern that fits no statement.

    Example:
        >>> [entry.name for _, entry in chosen(["l2-*"])]
        ['l2-z', 'l2-z-adamw', 'l2-other', 'l2-p', 'l2-gd']
    """
    entries = [(chapter, entry) for chapter in CHAPTERS for entry in chapter]
    for pattern in only:
        if not any(fnmatchcase(entry.name, pattern) for _, entry in entries):
            names = ", ".join(entry.name for _, entry in entries)
            raise ValueError(f"no statement is called {pattern!r}; there are {names}")
    return [pair for pair in entries if not only or any(fnmatchcase(pair[1].name, pattern) for pattern in only)]


def measured(entry: Entry, seeds: Iterable[int] = (0,)) -> Statement:
    """Measure one statement, with each seed. Where the library refuses a number, the statement fails, with the reason."""
    start = time.perf_counter()
    findings = [_found(entry, seed) for seed in seeds]
    seconds = time.perf_counter() - start
    return Statement(entry.name, entry.where, entry.claim, findings[0], entry.correction, seconds, tuple(findings[1:]))


def _found(entry: Entry, seed: int) -> Finding:
    try:
        with drawn(seed):
            return entry.measure()
    except CurvatureError as error:
        return Finding(f"refused: {error}", 0.0, float("nan"))


def sections(statements: Iterator[tuple[Chapter, Statement]] | Sequence[tuple[Chapter, Statement]]) -> list[Section]:
    """Statements by chapter, in order."""
    found: dict[str, list[Statement]] = {}
    for chapter, statement in statements:
        found.setdefault(chapter.title, []).append(statement)
    return [Section(title, tuple(some)) for title, some in found.items()]


def as_expected(some: Sequence[Section]) -> bool:
    """Whether every statement holds, with every seed."""
    return all(statement.verdict in ("holds", "holds as corrected") for section in some for statement in section.statements)
