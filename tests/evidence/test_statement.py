"""Verdicts, the choice of statements, and that a wrong library piece is noticed."""

import math

import pytest

from precond.analysis.curvature import Indefinite
from precond.lab.evidence import CHAPTERS, Chapter, Entry, Finding, Statement, as_expected, chosen, measured, sections


@pytest.mark.parametrize(
    ("relation", "number", "accepted"),
    [
        ("=", 1.0, True), ("=", 1.1, True), ("=", 0.9, True), ("=", 1.2, False), ("=", 0.8, False),
        ("≤", -5.0, True), ("≤", 1.1, True), ("≤", 1.2, False), ("≤", math.inf, False),
        ("≥", 5.0, True), ("≥", 0.9, True), ("≥", 0.8, False), ("≥", math.nan, False), ("=", math.nan, False),
    ],
)  # fmt: skip
def test_a_number_stands_in_its_relation(relation, number, accepted):
    assert Finding("x", 1.0, 0.0, 0.11, relation).accepts(number) is accepted


@pytest.mark.parametrize(
    ("measured_number", "printed", "correction", "verdict"),
    [
        (0.0, None, "", "holds"),
        (1.0, None, "", "fails"),
        (0.0, 1.0, "c", "holds as corrected"),
        (0.0, None, "c", "holds as corrected"),
        (0.0, 0.0, "c", "fails"),  # the printed form holds, so there is nothing to correct
        (1.0, 1.0, "c", "fails"),
    ],
)
def test_verdicts(measured_number, printed, correction, verdict):
    finding = Finding("x", 0.0, measured_number, 0.1, printed=printed)
    assert Statement("s", "(1)", "claim", finding, correction).verdict == verdict


@pytest.mark.parametrize(
    ("numbers", "printed", "correction", "verdict", "held"),
    [
        ((0.0, 0.1), (None, None), "", "holds", 2),
        ((0.0, 0.2), (None, None), "", "holds in part", 1),
        ((0.2, 0.0), (None, None), "", "holds in part", 1),
        ((0.2, math.nan), (None, None), "", "fails", 0),
        ((0.0, 0.0), (0.0, 1.0), "c", "holds as corrected", 2),  # printed, it holds with one seed by luck
        ((0.0, 0.0), (0.0, 0.0), "c", "fails", 2),
        ((0.0, 1.0), (1.0, 1.0), "c", "holds in part", 1),
    ],
)
def test_verdicts_of_several_seeds(numbers, printed, correction, verdict, held):
    first, *others = (Finding("x", 0.0, n, 0.1, printed=p) for n, p in zip(numbers, printed, strict=True))
    statement = Statement("s", "(1)", "claim", first, correction, others=tuple(others))
    assert (statement.verdict, statement.held) == (verdict, held)
    assert as_expected(sections([(CHAPTERS[0], statement)])) == (verdict in ("holds", "holds as corrected"))


def test_names_are_unique_and_patterns_choose():
    names = [entry.name for _, entry in chosen()]
    assert len(names) == len(set(names)) > 60
    assert [e.name for _, e in chosen(["sam-*", "rate"])] == ["rate", "sam-p", "sam-z", "sam-difference"]
    with pytest.raises(ValueError, match=r"no statement is called 'sma'.*sam-p"):
        chosen(["sma"])


def test_a_name_is_given_once():
    chapter = Chapter("c")
    chapter.statement("a", "(1)", "claim")(lambda: Finding("x", 0.0, 0.0))
    with pytest.raises(ValueError, match="'a' already"):
        chapter.statement("a", "(2)", "claim")(lambda: Finding("x", 0.0, 0.0))


def test_a_refused_number_fails_with_its_reason():
    def refuse():
        raise Indefinite("κ is not defined")

    statement = measured(Entry("a", "(1)", "claim", "", refuse))
    assert statement.verdict == "fails"
    assert "κ is not defined" in statement.finding.quantity
    assert not as_expected(sections([(CHAPTERS[0], statement)]))
