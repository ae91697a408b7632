"""The page is whole, self-contained and escaped; the numbers survive their file."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from precond.lab.report import (
    Entry,
    Results,
    ResultsError,
    Target,
    TaskResults,
    default_target,
    load_results,
    render,
    save_results,
    table,
)
from precond.lab.report.style import log_axis, pen, svg, thousands
from precond.lab.report.summary import Spread, profile, work_to_target
from precond.lab.workloads import Curve, Outcome, Trial


def run(seed: int, losses: list[float], *, probes: int = 1, metric: float = 0.9) -> Outcome:
    n = len(losses)
    steps = [10 * i for i in range(n)]
    curve = Curve(
        steps,
        [probes * s for s in steps],
        [0.1 * i for i in range(n)],
        [0.05 * i for i in range(n)],
        losses,
        [metric] * n,
        [2 * x for x in losses],
        [metric] * n,
    )
    return Outcome(seed, 0.01, curve, test_loss=3 * losses[-1], test_metric=metric)


DIVERGED = replace(run(2, [1.0, 5.0]), status="diverged", diverged_at=13, test_loss=None, test_metric=None)
ENTRIES = (
    Entry(
        "sgd",
        "searched",
        (run(0, [1.0, 0.5, 0.25]), run(1, [1.0, 0.6, 0.2]), DIVERGED),
        (Trial(0.01, 0.5), Trial(1.0, math.nan)),
        (0.001, 3.0),
    ),
    Entry("adam + SAM(0.1, space='z')", "given", (run(0, [1.0, 0.2, 0.1], probes=2), run(1, [1.0, 0.3, 0.1], probes=2))),
    Entry("<b>&x</b>", "default", (DIVERGED,)),
)


def task(**changes: object) -> TaskResults:
    plain = TaskResults("digits", "accuracy", {"data": "digits <raw>"}, default_target(ENTRIES), ENTRIES)
    return replace(plain, **changes)  # type: ignore[arg-type]


def results(*tasks: TaskResults, clock: str = "cpu_seconds") -> Results:
    return Results(
        title="<script>alert(1)</script>",
        command="precond compare digits --recipes 'a & b'",
        created="2026-01-01 00:00",
        clock=clock,  # type: ignore[arg-type]
        settings={"epochs": 3.0, "widths": [64, 64], "target": None, "resume": True},
        versions={"python": "3", "torch": "2", "precond": "0"},
        machine={"processor": "x"},
        tasks=tasks or (task(),),
    )


class Loads(HTMLParser):
    """Everything that a browser would fetch, and every id and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data", "srcset", "poster", "action")]
        self.ids += [found["id"] or ""] if "id" in found else []


@pytest.mark.parametrize("metric", ["accuracy", "R²", None])
def test_page_is_self_contained_and_escaped(metric: str | None) -> None:
    page = render(results(task(metric=metric)))
    seen = Loads(page)
    assert all(load.startswith(("#", "data:")) for load in seen.loads)
    assert not re.search(r"url\((?!#)|@import", page)
    assert not {"script", "iframe", "object", "embed", "img", "b"} & set(seen.open)
    assert len(seen.ids) == len(set(seen.ids))
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;&amp;x&lt;/b&gt;" in page
    for words in (
        "precond compare digits --recipes &#39;a &amp; b&#39;",
        "digits &lt;raw&gt;",
        "diverged",
        "64, 64",
        "Test"[1:],
    ):
        assert words in page
    assert page.count("<svg") == (13 if metric else 7)


def test_a_page_without_validation_test_or_probes() -> None:
    bare = Outcome(0, 0.1, Curve([0, 5], [0, 5], [0.0, 1.0], [0.0, 1.0], [-1.0, -2.0], [math.nan] * 2))
    page = render(
        results(
            task(metric=None, entries=(Entry("sgd", "given", (bare,)),), target=default_target([Entry("x", "given", (bare,))]))
        )
    )
    assert "Training loss" in page
    assert "Validation loss" not in page
    assert page.count("<svg") == 2


def test_a_page_of_divergence_only() -> None:
    nothing = Outcome(0, 0.1, Curve(), "diverged", 0)
    page = render(results(task(entries=(Entry("sgd", "given", (nothing,)),), target=default_target([]))))
    assert "no entrant finished" in page


def test_numbers_survive(tmp_path: Path) -> None:
    before = results()
    save_results(tmp_path / "results.json", before, [[row.as_dict() for row in table(one)] for one in before.tasks])
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    after = load_results(tmp_path / "results.json")
    # NaN differs from itself.
    assert repr(asdict(after)) == repr(asdict(before))
    assert len(json.loads(text)["tasks"][0]["table"]) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no"), ("{", "is no JSON"), ("[]", "no results of layout"), ('{"schema": 1}', "no results of layout"),
     ('{"schema": 2}', "does not hold what results hold .it lacks title")],
)  # fmt: skip
def test_files_that_hold_no_results(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError, match=words):
        load_results(path)


def test_target_is_the_first_finished_entrants_and_work_is_the_first_evaluation_that_meets_it() -> None:
    target = default_target([ENTRIES[2], *ENTRIES])
    assert target == Target(
        pytest.approx(0.55), "validation", "the best validation loss of sgd (median over seeds) and 10% more"
    )
    assert work_to_target(ENTRIES[1].runs[0], target, "gradients") == 20
    assert work_to_target(ENTRIES[0].runs[0], target, "step") == 20
    assert math.isnan(work_to_target(DIVERGED, target, "step"))


def test_table() -> None:
    sgd, adam, none = table(task())
    assert (sgd.seeds, sgd.diverged, adam.diverged, none.train_loss) == (3, 1, 0, None)
    assert sgd.train_loss == Spread(0.225, 0.2, 0.25)
    assert adam.test_loss is not None
    assert adam.test_loss.median == pytest.approx(0.3)
    assert (sgd.to_target["step"].reached, sgd.to_target["step"].median) == (2, 20)
    assert math.isnan(none.to_target["step"].median)
    assert adam.to_target["step"].median == 15
    assert adam.to_target["gradients"].median == 30


def test_pens_repeat_only_after_thirty() -> None:
    assert len({(pen(i).color, str(pen(i).dashes)) for i in range(30)}) == 30


@pytest.mark.parametrize("low", [1.0, 1.05, 2.1, 0.55, 3e-6])
@pytest.mark.parametrize("ratio", [1.2, 1.9, 4.0, 7.0, 100.0, 1e6])
def test_a_logarithmic_axis_has_numbers_that_differ(low: float, ratio: float) -> None:
    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.set_ylim(low, ratio * low)
        log_axis(axes.yaxis)
        axes.xaxis.set_visible(False)

    labels = texts(svg(draw, "axis"))
    assert len(set(labels)) == len(labels) >= 2


def test_counts_are_whole() -> None:
    def draw(axes: Axes) -> None:
        axes.set_xlim(0, 20)
        thousands(axes)
        axes.yaxis.set_visible(False)

    assert texts(svg(draw, "counts")) == ["0", "5", "10", "15", "20"]


def texts(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)


def test_the_clock_is_said_and_used() -> None:
    for clock, words, most in (
        ("cpu_seconds", "CPU seconds of training", "0.10 s"),
        ("seconds", ">seconds of training", "0.20 s"),
    ):
        page = render(results(clock=clock))
        assert words in page
        assert most in page


def test_a_page_of_several_tasks() -> None:
    failed = replace(DIVERGED, status="failed", diverged_at=None, error="ValueError: <no>")
    other = task(
        name="<other>", entries=(ENTRIES[1], Entry("sgd", "given", (failed,))), target=Target(0.25, "validation", "it")
    )
    page = render(results(task(), other))
    seen = Loads(page)
    assert len(seen.ids) == len(set(seen.ids))
    assert seen.open.count("details") == 2
    for words in ("Performance profiles", "&lt;other&gt;", "ValueError: &lt;no&gt;", "1 of 1 diverged"):
        assert words in page


def test_profile_is_the_ratio_to_the_least_work_of_each_task() -> None:
    a, b = Entry("a", "given", (run(0, [1.0, 0.2, 0.1]),)), Entry("b", "given", (run(0, [1.0, 0.5, 0.1]),))
    never = Entry("c", "given", (run(0, [1.0, 1.0, 1.0]),))
    goal = Target(0.5, "validation", "")  # the validation loss is twice the training loss
    one = task(entries=(a, b, never), target=goal)
    unreached = task(entries=(never,), target=goal)
    found = profile(results(one, task(entries=(b, a), target=Target(0.2, "validation", "")), unreached), "step")
    assert found == {"a": [1.0, 1.0], "b": [1.0, 2.0], "c": [math.inf, math.inf]}


def test_targets_of_a_named_reference() -> None:
    assert default_target(ENTRIES, ENTRIES[1].label, 0.0).value == pytest.approx(0.2)
    assert default_target(ENTRIES, ENTRIES[2].label, 0.0).value == 0.5  # it did not finish: the first that did
