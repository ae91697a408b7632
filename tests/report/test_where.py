"""Predictions beside measurements, and best rates over widths, on curves made by hand."""

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from precond.lab.report import Entry, Results, TaskResults, default_target
from precond.lab.report.signs import probabilities
from precond.lab.report.transfer import rates, searches, shared_rate, spread, transfer_figure, transfer_markdown
from precond.lab.report.where import ADVISED, agreements, outcomes, where_figure, where_markdown
from precond.lab.workloads import Curve, Outcome, Trial
from precond.lab.workloads.measured import Measured
from precond.lab.workloads.transfer import shape_name
from precond.lab.workloads.where import Prediction


def entry(label: str, reached: int | None) -> Entry:
    """Of ten evaluations the one at which the loss falls."""
    steps = [10 * i for i in range(11)]
    losses, nothing = [1.0 if reached is not None and i >= reached else 5.0 for i in range(11)], [math.nan] * 11
    run = Outcome(
        0, 0.1, Curve(steps, steps, [float(s) for s in steps], [float(s) for s in steps], losses, nothing, losses, nothing)
    )
    return Entry(label, "searched", (run,), (Trial(0.1, 1.0),), (0.05, 0.2))


def task(name: str, bnp: int | None, whitening: int | None) -> TaskResults:
    entries = (entry("base", 8), entry("bnp", bnp), entry("whitening", whitening))
    return TaskResults(name, None, {}, default_target(entries, "base", 0.0, "train"), entries, "base", "training", "steps")


def results(*tasks: TaskResults) -> Results:
    return Results("where", "precond bench where", "today", "cpu_seconds", {}, {}, {}, tasks)


RESULTS = results(task("one", 4, 2), task("two", 8, None))
PREDICTIONS = [
    Prediction("one", "bnp", 3.0, 2),
    Prediction("one", "whitening", 1.0, 2),
    Prediction("two", "bnp", 1.1, 2),
    Prediction("two", "whitening", 1e9, 2),
]


def test_a_sign_is_right_where_a_gain_was_predicted_and_there_or_neither() -> None:
    found = outcomes(RESULTS, [*PREDICTIONS, Prediction("three", "bnp", 2.0, 1), Prediction("one", "bnp", math.nan, 2)])
    assert [(one.measured, one.bound) for one in found] == [
        (2.0, False),
        (4.0, False),
        (1.0, False),
        (pytest.approx(0.8), True),
    ]
    assert [(one.advised, one.gained, one.right) for one in found] == [
        (True, True, True), (False, True, False), (False, False, True), (True, False, False)
    ]  # fmt: skip
    # A bound above 1 is no gain: the loss was not reached.
    assert not replace(found[3], measured=2.0).gained and replace(found[0], predicted=ADVISED).advised
    text = where_markdown(RESULTS, PREDICTIONS)
    assert "| both | 4 | 2 of 4 (50 %) | 1 | 1 | 1 | 1 | 1.59 |" in text
    misses = text[text.index("## Misses") : text.index("## All")]
    assert "| one | whitening | 1 | 4 | wrong |" in misses and "| two | whitening | 1e+09 | < 0.8 | wrong |" in misses
    assert "| one | bnp |" not in misses and "| one | bnp | 3 | 2 | right |" in text


def test_seeds_that_contradict_each_other_are_counted() -> None:
    def seeds(label: str, *reached: int | None) -> Entry:
        runs = tuple(replace(entry(label, at).runs[0], seed=seed) for seed, at in enumerate(reached))
        return replace(entry(label, 1), runs=runs)

    assert agreements(RESULTS) == [] and "How often can" not in where_markdown(RESULTS, PREDICTIONS)  # one seed
    # With bnp seed 0 never reached the loss: what each of the seeds says, two others do not, for a median with it is a miss.
    cell = replace(task("one", 4, 2), entries=(seeds("base", 8, 8, 8), seeds("bnp", None, 4, 4), seeds("whitening", 2, 2, 2)))
    assert agreements(results(cell)) == [False, True] * 3
    assert "in 3 of 6 (50 %)" in where_markdown(results(cell), PREDICTIONS)


def test_a_rule_for_signs_learns_from_other_data_alone() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 2, generator=generator) * torch.tensor([1.0, 30.0])
    gained = (X[:, 0] + 0.5 * torch.randn(40, generator=generator) > 0.3).tolist()
    groups = ["a"] * 15 + ["b"] * 15 + ["c"] * 10
    found = probabilities(X.tolist(), gained, groups)
    X = X.double()
    Z = (X - X[15:].mean(0)) / X[15:].std(0, correction=0)  # units of the other groups
    others = linear_model.LogisticRegression(C=1.0, tol=1e-10).fit(Z[15:].numpy(), gained[15:])
    assert found[:15] == pytest.approx(others.predict_proba(Z[:15].numpy())[:, 1].tolist(), rel=1e-3)  # lbfgs stops early
    # What was measured on its own data changes nothing.
    assert probabilities(X.tolist(), [not g for g in gained[:15]] + gained[15:], groups)[:15] == pytest.approx(found[:15])
    assert probabilities([[1.0]], [True], ["a"]) == [0.5]


def test_both_rules_are_told_where_numbers_were_taken() -> None:
    text = where_markdown(RESULTS, PREDICTIONS)
    assert "right in" in text and "With what is measured besides" not in text
    numbers = [Measured(float(i), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0) for i in range(4)]
    told = [replace(p, measured=m) for p, m in zip(PREDICTIONS, numbers, strict=True)]
    assert [one.numbers for one in outcomes(RESULTS, told)] == numbers
    assert "With what is measured besides (kappa, gain, independent," in where_markdown(RESULTS, told)


def test_figures_are_files_of_their_own() -> None:
    for text in (
        where_figure(RESULTS, PREDICTIONS),
        transfer_figure(_transfer(), "width"),
        transfer_figure(_transfer(), "width, spectral head"),
        transfer_figure(_transfer(), "depth"),
    ):
        root = ET.fromstring(text.encode())
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox")


def _transfer() -> Results:
    def searched(name: str, lowest: float) -> TaskResults:
        trials = tuple(Trial(0.01 * 2**i, 1 + math.log(0.01 * 2**i / lowest) ** 2) for i in range(5))
        entries = (replace(entry("one", 4), search=trials),)
        return replace(task(name, 1, 1), name=name, entries=entries, reference=None)

    seeds = [
        searched(f"{shape_name(width, 2)}, seed {seed}", lowest)
        for width, lowest in ((64, 0.02), (1024, 0.06))
        for seed in (0, 1)
    ]
    return results(
        *seeds, searched(f"{shape_name(128, 8)}, seed 0", 0.04), searched(f"{shape_name(64, 2, True)}, seed 0", 0.01)
    )


def test_best_rates_and_by_how_much_they_move() -> None:
    found = _transfer()
    assert rates(found, "width") == {"one": {64: pytest.approx(0.02), 1024: pytest.approx(0.06)}}
    assert rates(found, "depth") == {"one": {8: pytest.approx(0.04)}}
    assert rates(found, "width, spectral head") == {"one": {64: pytest.approx(0.01)}}
    assert spread([0.02, math.nan, 0.06]) == pytest.approx(3) and math.isnan(spread([]))
    text = transfer_markdown(found)
    # At 0.04 the losses are 1 + ln(2)² and 1 + ln(1.5)²; the least that were tried are 1, at 0.02, and 1 + ln(4/3)², at 0.08.
    shared = math.sqrt((1 + math.log(2) ** 2) * (1 + math.log(1.5) ** 2) / (1 + math.log(4 / 3) ** 2))
    assert shared_rate([searches(found, shape_name(w, 2), "one") for w in (64, 1024)]) == (0.04, pytest.approx(shared))
    assert f"| one | 0.02 | 0.06 | 3 | 0.04 | {shared:.3g} |" in text and "| one | 0.04 | 1 | 0.04 | 1 |" in text
    assert all(math.isnan(x) for x in shared_rate([]))
