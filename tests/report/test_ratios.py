"""Ratios of work to a reference's, on curves made by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from precond.lab.report import (
    Entry,
    Results,
    TaskResults,
    default_target,
    geometric_mean,
    load_results,
    markdown,
    overall,
    ratios,
)
from precond.lab.report.page import render
from precond.lab.report.ratios import Ratio, markdown_of_task
from precond.lab.report.saving import save
from precond.lab.workloads import Curve, Outcome, Trial


def run(losses: list[float], seconds_per_step: float, seed: int = 0) -> Outcome:
    """Evaluated every 10 steps."""
    steps = [10 * i for i in range(len(losses))]
    seconds = [seconds_per_step * s for s in steps]
    metrics = [0.5] * len(losses)
    return Outcome(
        seed, 0.01, Curve(steps, steps, seconds, seconds, losses, metrics, [9.0] * len(losses), metrics), test_metric=0.5
    )


def entry(label: str, *runs: Outcome) -> Entry:
    return Entry(label, "searched", runs, (Trial(0.01, 3.0), Trial(0.1, 4.0)), (1e-3, 1.0))


REFERENCE = entry("ref", *(run([5.0, 4.0, 3.0, last, 2.5], 1.0, seed) for seed, last in enumerate((2.0, 2.2, 2.1))))
FAST = entry("fast", *(run([5.0, 2.0, 1.0, 1.0, 1.0], 4.0, seed) for seed in range(3)))
CHEAP = entry("cheap", *(run([5.0, 4.5, 4.0, 3.5, 3.0], 0.5, seed) for seed in range(3)))
# Two of three seeds are there in time.
MOST = entry(
    "most", run([5.0, 3.0, 2.1, 2.0, 2.0], 1.0), run([5.0, 3.0, 3.0, 3.0, 3.0], 1.0), run([5.0, 3.0, 3.0, 3.0, 2.0], 1.0)
)
DIVERGED = entry("diverged", replace(run([5.0, 9.0], 2.0), status="diverged", diverged_at=13))
FAILED = entry("failed", Outcome(0, math.nan, Curve(), "failed", error="ValueError: no"))
ENTRIES = (REFERENCE, FAST, CHEAP, MOST, DIVERGED, FAILED)


def task(name: str = "one", entries: tuple[Entry, ...] = ENTRIES, reference: str | None = "ref") -> TaskResults:
    target = default_target(entries, reference, 0.0, "train")
    return TaskResults(name, "accuracy", {"data": "hand"}, target, entries, reference, "training")


def results(*tasks: TaskResults) -> Results:
    return Results("race", "precond bench race", "today", "cpu_seconds", {}, {"precond": "0"}, {}, tasks, ("Same for all.",))


def test_the_target_is_the_references_best_training_loss_and_it_meets_it() -> None:
    target = task().target
    assert (target.value, target.part, target.rule) == (2.1, "train", "the best training loss of ref (median over seeds)")
    # With an even number of seeds, too.
    even = task(entries=(entry("ref", *REFERENCE.runs[:2]), FAST))
    assert even.target.value == 2.2
    assert ratios(even, "step")["ref"] == Ratio(1.0, True)


def test_ratios_and_their_lower_bounds() -> None:
    # The reference is there at step 30 with the first and the last seed, never with the second; median 30.
    steps, seconds = ratios(task(), "step"), ratios(task(), "cpu_seconds")
    assert {label: (r.value, r.reached) for label, r in steps.items()} == {
        "ref": (1.0, True),
        "fast": (pytest.approx(10 / 30), True),
        "cheap": (pytest.approx(40 / 30), False),
        "most": (pytest.approx(40 / 30), True),
        "diverged": (pytest.approx(40 / 30), False),
        "failed": (pytest.approx(40 / 30), False),
    }
    assert {label: (r.value, r.reached) for label, r in seconds.items()} == {
        "ref": (1.0, True),
        "fast": (pytest.approx(40 / 30), True),
        "cheap": (pytest.approx(20 / 30), False),
        "most": (pytest.approx(40 / 30), True),
        "diverged": (pytest.approx(80 / 30), False),  # two seconds a step, up to the end
        "failed": (pytest.approx(40 / 30), False),  # the reference's
    }
    assert ratios(task(reference=None), "step") == {}
    assert ratios(task(entries=(FAILED, FAST), reference="failed"), "step") == {}


def test_means_over_tasks() -> None:
    assert geometric_mean([Ratio(0.5, True), Ratio(2.0, True)]) == Ratio(pytest.approx(1.0), True)
    assert geometric_mean([Ratio(0.0, True), Ratio(2.0, True)]).value == 0.0
    other = task("two", (REFERENCE, entry("fast", run([5.0, 3.0, 2.0, 1.0, 1.0], 1.0)), CHEAP))
    without = task("three", (FAST, CHEAP), None)
    found = {one.label: one for one in overall(results(task(), other, without))}
    assert list(found) == [e.label for e in ENTRIES]
    fast, cheap = found["fast"], found["cheap"]
    assert (fast.steps, fast.seconds) == (
        Ratio(pytest.approx(math.sqrt(1 / 3 * 2 / 3)), True),
        Ratio(pytest.approx(math.sqrt(4 / 3 * 2 / 3)), True),
    )
    assert (fast.tasks, fast.missed, cheap.tasks, cheap.missed) == (2, (), 2, ("one", "two"))
    assert cheap.steps == Ratio(pytest.approx(4 / 3), False)
    assert found["most"].tasks == 1
    assert overall(results(without)) == []


def test_markdown_and_page_say_what_was_not_reached(tmp_path: Path) -> None:
    several = results(task(), task("two"))
    lines = markdown(several).splitlines()
    assert lines[0] == "| entrant | steps | seconds | reached | one | two |"
    assert lines[3] == "| fast | 0.333 | 1.33 | 2 of 2 | 0.333 / 1.33 | 0.333 / 1.33 |"
    assert lines[4] == "| cheap | > 1.33 | > 0.667 | 0 of 2 | > 1.33 / > 0.667 | > 1.33 / > 0.667 |"
    assert save(tmp_path, several) == ["report.html", "results.json", "summary.md"]
    summary = (tmp_path / "summary.md").read_text()
    assert "| failed (failed: ValueError: no) | – | – | > 1.33 | – | > 1.33 | – | – | – |" in summary
    assert "Target: training loss 2.1, the best training loss of ref (median over seeds)." in summary
    page = (tmp_path / "report.html").read_text()
    for words in ("Work to target, times that of ref", "&gt; 1.33", "one; two", "Same for all.", "final training loss"):
        assert words in page
    found = json.loads((tmp_path / "results.json").read_text())["against"]
    assert found["tasks"]["one"]["step"]["cheap"] == {"value": pytest.approx(4 / 3), "reached": False}
    assert [one["label"] for one in found["geometric_mean"]] == [e.label for e in ENTRIES]
    assert repr(load_results(tmp_path / "results.json").tasks) == repr(several.tasks)
    assert save(tmp_path, results(task(reference=None))) == ["report.html", "results.json"]


def test_the_longer_list_makes_the_rows() -> None:
    page = render(results(task(), task("two")))
    assert '<th scope="col">one</th><th scope="col">two</th>' in page
    many = render(results(*(task(str(i), (REFERENCE, FAST)) for i in range(3))))
    assert '<th scope="col">ref</th><th scope="col">fast</th>' in many


def test_names_do_not_move_the_columns() -> None:
    """Of Markdown: a bar is escaped, a name is one line."""
    named = replace(task("a|b\nc"), entries=(replace(REFERENCE, label="ref"), replace(FAST, label="x|y")))
    for text in (markdown(results(named)), markdown_of_task(named, "seconds")):
        rows = text.splitlines()
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1 and "x\\|y" in text
    assert "a\\|b c" in markdown(results(named))
