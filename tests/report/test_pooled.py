"""Pairs of entrants over tasks and seeds, against enumeration; and the tables of many tasks, on curves made by hand."""

import itertools
import math
from dataclasses import replace

import pytest

from precond.lab.report import Entry, Results, TaskResults, default_target
from precond.lab.report.page import render
from precond.lab.report.pairs import has_part, interval, log_ratios, pairs, retargeted
from precond.lab.report.pooled import pooled
from precond.lab.workloads import Curve, Outcome, Trial


def run(reached: int | None, seed: int, validation: int | None = None) -> Outcome:
    """Ten evaluations, each after 10 steps of a second; losses fall from 5 to 1 after so many of them."""

    def losses(at: int | None) -> list[float]:
        return [5.0 if at is None or i < at else 1.0 for i in range(11)]

    steps = [10 * i for i in range(11)]
    seconds, nothing = [float(s) for s in steps], [math.nan] * 11
    return Outcome(
        seed, 0.01, Curve(steps, steps, seconds, seconds, losses(reached), nothing, losses(validation or reached), nothing)
    )


def entry(label: str, *runs: Outcome, losses: tuple[float, ...] = (2.0, 1.0, 1.05), lr: float = 0.02) -> Entry:
    trials = tuple(Trial(0.01 * 2**i, loss) for i, loss in enumerate(losses))
    return Entry(label, "searched", tuple(replace(r, lr=lr) for r in runs), trials, (0.007, 0.057))


def task(name: str, family: str | None, *entries: Entry) -> TaskResults:
    return TaskResults(
        name, None, {"data": "hand"}, default_target(entries, "ref", 0.0, "train"), entries, "ref", "training", "steps", family
    )


def results(*tasks: TaskResults) -> Results:
    return Results("pool", "precond bench pool", "today", "cpu_seconds", {}, {}, {}, tasks)


ONE = task(
    "one",
    "nets",
    entry("ref", run(8, 0, 4), run(8, 1, 4), run(8, 2, 4)),
    entry("fast", run(4, 0, 8), run(2, 1, 8), run(None, 2, 8)),
)
TWO = task(
    "two",
    "trees",
    entry("ref", run(8, 0), run(8, 1)),
    entry("fast", run(2, 0), run(4, 1), losses=(3.0, math.nan, 2.0), lr=0.04),
)


def test_ratios_are_seed_by_seed_and_a_miss_costs_a_whole_training() -> None:
    assert log_ratios(ONE, "fast", "ref", "step") == pytest.approx([math.log(1 / 2), math.log(1 / 4), math.log(10 / 8)])
    assert log_ratios(ONE, "ref", "fast", "step") == pytest.approx([math.log(2), math.log(4), math.log(8 / 10)])
    # Pairs are those of the same seed, in whatever order.
    turned = replace(ONE, entries=(ONE.entries[0], replace(ONE.entries[1], runs=ONE.entries[1].runs[::-1])))
    assert log_ratios(turned, "fast", "ref", "step") == log_ratios(ONE, "fast", "ref", "step")
    assert log_ratios(ONE, "fast", "nobody", "step") == []
    # One that diverged counts at its pace, up to the end.
    short = Curve(*([column[:3] for column in ONE.entries[0].runs[0].curve.columns().values()]))
    cut = replace(ONE, entries=(ONE.entries[0], Entry("cut", "given", (Outcome(0, 0.1, short, "diverged"),))))
    assert log_ratios(cut, "cut", "ref", "cpu_seconds") == pytest.approx([math.log(100 / 80)])


def test_a_pair_over_tasks() -> None:
    (pair,) = pairs(results(ONE, TWO), "train", "step")
    assert (pair.label, pair.rival, pair.tasks, pair.faster, pair.slower) == ("fast", "ref", 2, 2, 0)
    means = [math.log(10 / 64) / 3, math.log(1 / 8) / 2]
    assert pair.ratio == pytest.approx(math.exp(sum(means) / 2))
    assert pair.low < pair.ratio < pair.high
    assert pair.sign == pytest.approx(0.5)
    (other,) = pairs(results(ONE, TWO), "validation", "step")
    assert (other.faster, other.slower) == (1, 1)


def test_of_many_entrants_only_pairs_with_the_reference() -> None:
    def of(n: int) -> list[tuple[str, str]]:
        entries = (entry("a", run(3, 0)), entry("ref", run(8, 0)), *(entry(str(i), run(4, 0)) for i in range(n - 2)))
        return [(pair.label, pair.rival) for pair in pairs(results(task("one", None, *entries)), "train", "step")]

    assert len(of(8)) == 28
    assert of(9) == [("a", "ref"), *((str(i), "ref") for i in range(7))]


def test_tests_are_those_of_enumeration() -> None:
    """All signs are alike under the hypothesis: p is the share of the 2ⁿ whose statistic is at least as far out."""
    at = [2, 3, 9, 1, 4, 5]
    tasks = [task(str(i), None, entry("ref", run(8, 0)), entry("fast", run(x, 0))) for i, x in enumerate(at)]
    (pair,) = pairs(results(*tasks), "train", "step")
    differ = [math.log(x / 8) for x in at]
    ranks = [1 + sum(abs(y) < abs(x) for y in differ) for x in differ]
    seen = sum(r for r, x in zip(ranks, differ, strict=True) if x > 0)
    middle = sum(ranks) / 2
    signs = list(itertools.product((0, 1), repeat=len(at)))
    far = sum(abs(sum(r * s for r, s in zip(ranks, chosen, strict=True)) - middle) >= abs(seen - middle) for chosen in signs)
    assert pair.wilcoxon == pytest.approx(far / len(signs))
    slower = sum(x > 0 for x in differ)
    more = sum(abs(sum(chosen) - len(at) / 2) >= abs(slower - len(at) / 2) for chosen in signs)
    assert pair.sign == pytest.approx(more / len(signs))
    same = task("same", None, entry("ref", run(8, 0)), entry("fast", run(8, 0)))
    (equal,) = pairs(results(same), "train", "step")
    assert math.isnan(equal.wilcoxon) and math.isnan(equal.sign) and (equal.low, equal.ratio, equal.high) == (1, 1, 1)


def test_intervals_are_quantiles_of_resampled_tasks_and_seeds() -> None:
    """Of one task with n seeds, 0 or 1: the mean is binomial. 2000 draws know a share of 2.5 % to 0.4 %."""
    n = 100
    low, high = interval([[0.0] * (n // 2) + [1.0] * (n // 2)])
    deviation = 1.96 * math.sqrt(1 / 4 / n)
    assert math.log(low) == pytest.approx(0.5 - deviation, abs=0.015)
    assert math.log(high) == pytest.approx(0.5 + deviation, abs=0.015)
    # Of many tasks with one seed each likewise, and seeds of equal tasks add nothing.
    tasks = [[float(i % 2)] * (1 + i % 3) for i in range(n)]
    low, high = interval(tasks)
    assert (math.log(low), math.log(high)) == (
        pytest.approx(0.5 - deviation, abs=0.015),
        pytest.approx(0.5 + deviation, abs=0.015),
    )
    # Two tasks, 0 and 1: both are drawn alike in a quarter each.
    assert interval([[0.0], [1.0]]) == pytest.approx((1.0, math.e))
    assert all(math.isnan(x) for x in interval([]))


def test_targets_on_both_parts() -> None:
    for part in ("train", "validation"):
        assert [task.target.part for task in retargeted(results(ONE, TWO), part).tasks] == [part, part]
    without = replace(ONE, reference=None)
    assert not has_part(results(without), "train") and has_part(results(ONE), "validation")


def test_tables() -> None:
    found = {table.heading: table for table in pooled(results(ONE, TWO))}
    rows = {heading.split(",")[0].split(":")[0]: {r[0]: list(r[1:]) for r in table.rows} for heading, table in found.items()}
    # Of three seeds 40, 20 and never: 40 of 80 steps. Of two, 20 and 40: 30.
    assert rows["Both targets"]["fast"][:3] == ["0.433", "0.433", "4 of 5"]
    assert rows["Both targets"]["ref"] == ["1", "1", "5 of 5"] * 2
    families = [table for heading, table in found.items() if heading.startswith("Families")]
    assert [list(table.rows[0]) for table in families] == [["nets (1)", "1 / 1", "0.5 / 0.5"], ["nets (1)", "1 / 1", "2 / 2"]]
    # Training: 80 and 40, 80 and 30; validation: 40 and 80, 80 and 30.
    profiles = [[list(row[1:]) for row in table.rows] for heading, table in found.items() if heading.startswith("Profiles")]
    assert profiles[0] == [["0 of 2"] * 3 + ["1 of 2", "2 of 2"], ["2 of 2"] * 5]
    assert profiles[1] == [["1 of 2"] * 4 + ["2 of 2"], ["1 of 2"] * 3 + ["2 of 2"] * 2]
    # Trials at 0.01, 0.02, 0.04: of ref 2, 1, 1.05; of fast in task two 3, diverged, 2.
    rates = rows["Learning rates"]
    assert rates["ref"] == ["1.05 (1.05), 2 of 2", "2 (2), 0 of 2", "1 (1), 2 of 2", "0.02 to 0.02"]
    assert rates["fast"] == ["1.05 (1.05), 1 of 1", "14.1 (51), 0 of 2", "1 (1), 2 of 2", "0.02 to 0.04"]
    page = render(results(ONE, TWO))
    for heading, table in found.items():
        assert heading in page
        assert len({line.count("|") for line in table.markdown().splitlines() if line.startswith("|")}) == 1
    assert "Validation target" in page
    assert pooled(results(ONE)) == [] and pooled(results(replace(ONE, reference=None), replace(TWO, reference=None))) == []


def test_steps_beside_the_best_rate_are_told_in_its_own_and_in_the_references() -> None:
    def found(trials: dict[str, tuple[Trial, ...]], lr: float = 0.02) -> TaskResults:
        made = {label: entry(label, run(8, 0), lr=lr if label == "fast" else 0.02) for label in trials}
        return task("one", None, *(replace(made[label], search=trials[label]) for label in trials))

    def trials(*steps: int | None) -> tuple[Trial, ...]:
        return tuple(Trial(0.01 * 2**i, 1.0, n) for i, n in enumerate(steps))

    # Trainings have 100 steps. In the second task the fast one's rate is the highest that was tried.
    one = found({"ref": trials(None, 80, None), "fast": trials(40, 20, None)})
    two = found({"ref": trials(None, 40, 60), "fast": trials(60, 40, 10)}, lr=0.04)
    (table,) = [t for t in pooled(results(one, replace(two, name="two"))) if t.heading.startswith("Steps beside")]
    rows = {row[0]: list(row[1:]) for row in table.rows}
    # 40/20 and 40/10; 100/20 at least. In units of 80 and 40 steps: 40 and 40, 20 and 10, 100 at least.
    assert rows["fast"] == ["2.83, 2 of 2", "> 5, 0 of 1", "0.707 / 0.25 / > 1.25"]
    # 100/80 and 100/40 at least; 100/80 at least and 60/40.
    assert rows["ref"] == ["> 1.77, 0 of 2", "> 1.37, 1 of 2", "> 1.77 / 1 / > 1.37"]
    # Of results whose reference has no steps, what is not known is left out.
    old = replace(one, entries=(entry("ref", run(8, 0)), one.entries[1]))
    (table,) = [t for t in pooled(results(old, replace(old, name="two"))) if t.heading.startswith("Steps beside")]
    assert list(table.rows[0])[1:] == ["–", "–", "–"] and list(table.rows[1])[1:] == [
        "2, 2 of 2",
        "> 5, 0 of 2",
        "–",
    ]
