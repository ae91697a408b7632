"""Intervals: the line they are made by, what they hold of other tasks, and their words."""

from __future__ import annotations

import math
import random

import pytest

from precond.analysis.diagnostics.calibrated import UNKNOWN, Gain, Row, calibration, fit, summary


def planted(stuck, slope=0.5, noise=0.2, tasks=12, each=20):
    draw = random.Random(0)
    rows = []
    for task in range(tasks):
        for _ in range(each):
            x = draw.uniform(0, math.log(150))
            unit = 1.0 if stuck else x + math.log(2)
            y = (2.0 if stuck else 0.0) + slope * x + unit * draw.gauss(0, noise)
            rows.append(Row(f"task {task}", f"{task}", "bnp", stuck, math.exp(x), math.exp(y)))
    return rows


@pytest.mark.parametrize("stuck", [False, True])
def test_a_planted_line_is_found_and_its_intervals_hold_four_of_five(stuck):
    rows = planted(stuck)
    line = fit(rows)
    # 240 residuals of 0.2: the tenth and ninth tenth are known to about 0.2·1.7/√240 = 0.02, and so is the line.
    assert line.b == pytest.approx(0.5, abs=0.1) and line.a == pytest.approx(2.0 if stuck else 0.0, abs=0.15)
    assert line.high == pytest.approx(0.2 * 1.28, abs=0.08) and line.low == pytest.approx(-0.2 * 1.28, abs=0.08)
    found = summary(rows, 10**6)
    assert found["cells"] == found["judged"] == 240
    assert 0.72 <= found["held"] / 240 <= 0.88


def test_what_changes_nothing_gains_about_nothing():
    gain = fit(planted(False)).gain(1.0, 1e9, 150)
    assert 0.75 < gain.low < gain.likely < gain.high < 1.33 and not gain.worth
    assert gain.alone == 1e9


def test_no_interval_goes_beyond_the_training():
    gain = fit(planted(True)).gain(1e6, 1e9, 150)
    assert gain.high == 150.0


def test_cells_of_one_task_alone_are_not_judged():
    assert summary(planted(False, tasks=1), 150)["judged"] == 0


def test_the_order_of_remedies_is_judged_in_each_setting():
    def row(task, remedy, predicted, measured):
        return Row(f"task {task}", f"setting {task}", remedy, False, predicted, measured)

    rows = []
    for task in range(30):
        # bnp gains half of what is predicted, whitening nothing; in the last task it is the other way round.
        last = task == 29
        rows += [row(task, "bnp", 16.0, 1.0 if last else 4.0), row(task, "whitened", 16.0, 4.0 if last else 1.0)]
    found = summary(rows, 150)
    assert found["ordered"] == [29, 30] and found["best"] == [29, 30]
    rows[-1] = row(29, "whitened", 16.0, 1.1)  # no difference that counts
    assert summary(rows, 150)["ordered"] == [29, 29]


def test_what_is_not_predicted_is_no_number_and_compares_with_none():
    assert not UNKNOWN.known and not UNKNOWN.worth and UNKNOWN.as_dict() is None
    assert f"{UNKNOWN:.3g}" == "nan" and not UNKNOWN > 1 and not UNKNOWN < 1 and str(UNKNOWN) == "steps: not predicted"


def test_a_gain_is_compared_as_its_middle():
    small, large = Gain(1.0, 2.0, 3.0, 150, 2.0, 2.0), Gain(0.5, 4.0, 9.0, 150, 4.0, 4.0)
    assert small < large and small <= large and large >= small and large > small and small <= 2.0 <= small
    assert float(large) == 4.0 and sorted([large, small]) == [small, large]
    assert not UNKNOWN <= 1 and not UNKNOWN >= 1


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (2.0, 5.04, "steps: about 2 to 5 times fewer, if the other layers keep up"),
        (1.5, 48.0, "steps: fewer, from 1.5 to 48 times; trainings differed widely: try it"),
        (0.9, 12.4, "steps: as many, or up to 12 times fewer"),
        (0.5, 2.5, "steps: from 2 times more to 2.5 times fewer; try it"),
        (0.2, 1.05, "steps: no fewer"),
    ],
)
def test_words(low, high, words):
    assert str(Gain(low, (low + high) / 2, high, 150, 3.0, 100.0)) == words


def test_the_study_that_comes_along():
    found = calibration()
    assert found.cells >= 40 and found.judged >= 40
    assert {name for name, _ in found.lines} == {"standardize", "bnp", "whitened"}
    assert f"{found.held} of {found.judged}" in found.sentence and f"{found.held} of {found.judged}" in found.short
    assert len(f"{found.short} More: docs/diagnostics.md, Gains.") <= 2 * 80
