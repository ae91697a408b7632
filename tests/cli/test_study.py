"""Tasks × entrants: equal budgets, a test part that no search sees, failures that are results, resumption to the same bits."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precond.lab.cli import study
from precond.lab.cli.folder import Folder
from precond.lab.cli.launch import Where, launch
from precond.lab.cli.study import Job, Study
from precond.lab.report import load_results
from precond.lab.workloads import (
    Architecture,
    BuiltIn,
    Contender,
    LogUniform,
    Outcome,
    Peer,
    Plan,
    Search,
    Task,
    Trial,
    load_data,
    parse_entrants,
)
from precond.lab.workloads.factory import Factory

pytestmark = pytest.mark.usefixtures("without_figures")

READ: list[str] = []


class Part:
    """Batches that tell that they were read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(4)]

    def __iter__(self) -> Iterator[Any]:
        READ.append(self.name)
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def made() -> Any:
    return nn.Linear(4, 3), F.cross_entropy, {name: Part(name) for name in ("train", "validation", "test")}


def breaks(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    class Breaks(torch.optim.SGD):
        count = 0

        def step(self, closure: Any = None) -> Any:
            self.count += 1
            if self.count == 3:
                raise RuntimeError("the third step is too much\nfor me")
            return super().step(closure)

    return Breaks(model.parameters(), lr)


SPACE = LogUniform(1e-3, 1.0)
PLAN = Plan(None, 12, 0, "linear", 1, 3)


def tasks() -> tuple[Task, ...]:
    digits = load_data("digits", examples=200)

    def net(normalization: Any = "none", batch_size: int = 32) -> Any:
        return lambda: BuiltIn(digits, Architecture("mlp", (8,), normalization), batch_size)

    sgd, adam = parse_entrants("sgd, adam")
    batch = replace(sgd, label="SGD, BN layers")
    first = Task(
        "large", (Contender(sgd, net(), SPACE), Contender(batch, net("batch"), SPACE), Contender(adam, net(), SPACE)),
        PLAN, (0, 1), Search(3), metric="accuracy", facts={"data": "digits"}, reference="adam", allowance=0.0,
    )  # fmt: skip
    second = replace(
        first,
        name="one",
        contenders=(
            Contender(sgd, net(batch_size=1), SPACE),
            Contender(batch, net("batch", 1), SPACE),
            Contender(Peer("broken", breaks), net(), SPACE),
            Contender(parse_entrants("adam(lr=0.01)")[0], net()),
        ),
        reference=None,
        allowance=0.1,
    )
    return first, second


def run(out: Path) -> int:
    return launch("test", tasks(), {"a": 1}, Where(out, resume=True, checkpoint_seconds=0.02), ["test"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("study")
    assert run(out) == 0
    return out


def numbers(out: Path) -> Any:
    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if k not in ("seconds", "cpu_seconds", "created")}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return stripped(json.loads((out / "results.json").read_text()))


def test_every_entrant_has_the_same_trials_steps_and_seeds(whole: Path) -> None:
    first, second = load_results(whole / "results.json").tasks
    for task in (first, second):
        for entry in task.entries:
            assert [run.seed for run in entry.runs] == [0, 1]
            if entry.lr_from == "searched":
                assert (len(entry.search), entry.bounds) == (3, (1e-3, 1.0))
    assert second.entries[3].lr_from == "own"
    for file in whole.glob("trainings/*/*.json"):
        found = json.loads(file.read_text())
        assert found["curve"]["step"][-1] == 12
        # A trial is evaluated at its end alone, and not on the test part.
        is_trial = "search" in file.name
        assert (len(found["curve"]["step"]), found["test_loss"] is None) == ((2, True) if is_trial else (4, False))


def test_the_best_trial_is_what_is_trained(whole: Path) -> None:
    for entry in load_results(whole / "results.json").tasks[0].entries:
        lowest = min(entry.search, key=lambda t: t.loss)
        assert {run.lr for run in entry.runs} == {lowest.lr}


def test_the_reference_sets_the_target_of_its_task(whole: Path) -> None:
    first, second = load_results(whole / "results.json").tasks
    assert first.target.rule == "the best validation loss of adam (median over seeds)"
    assert second.target.rule == "the best validation loss of sgd (median over seeds) and 10% more"


def test_what_fails_is_reported_with_its_error_and_the_others_go_on(whole: Path) -> None:
    sgd, batch, broken, adam = load_results(whole / "results.json").tasks[1].entries
    assert batch.error == "ValueError: batch normalization needs at least 2 examples in a batch, got batch size 1"
    assert broken.error == "RuntimeError: the third step is too much"
    assert all(math.isnan(trial.loss) for trial in broken.search)
    assert {run.status for entry in (sgd, adam) for run in entry.runs} == {"finished"}
    page = (whole / "report.html").read_text()
    for words in (
        "<strong>broken failed</strong>: RuntimeError: the third step is too much",
        "Performance profiles",
        ">failed<",
    ):
        assert words in page


class Silent:
    """A watcher that notes which trainings are part of a search."""

    def started(self, job: Job) -> None:
        READ.append("search" if job.is_trial else "final")

    def skipped(self, trainings: int) -> None: ...

    def stepped(self, step: int, loss: object) -> bool:
        return False

    def finished(self, job: Job, outcome: Outcome, known: bool) -> None: ...
    def chosen(self, title: str, entrant: Any, trials: tuple[Trial, ...], lr: float) -> None: ...


def test_short_trainings_are_timed_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in turn, whoever was trained when; what takes five seconds or more is timed once, and what is timed is not timed again."""
    took = {(0.1, 0): [0.9, 0.5, 0.1, 0.2], (0.1, 1): [0.8, 0.3, 0.4, 0.6], (0.2, 0): [5.5], (0.2, 1): [0.7, 0.1, 0.1, 0.2]}
    order, train = [], study.train

    def timed(workload: Any, entrant: Any, plan: Plan, **more: Any) -> Any:
        outcome, model = train(workload, entrant, plan, **more)
        if plan.steps == PLAN.steps:  # not one that warms up
            order.append((plan.lr, plan.seed))
            outcome.curve.cpu_seconds[-1] = left[plan.lr, plan.seed].pop(0)
        return outcome, model

    monkeypatch.setattr(study, "train", timed)
    contenders = tuple(Contender(parse_entrants("sgd")[0], lambda: Factory("mine:made", made), lr) for lr in (0.1, 0.2))
    task = Task("mine", contenders, PLAN, (0, 1), Search(2), timings=3)
    for _ in range(2):
        left = {key: list(seconds) for key, seconds in took.items()}
        found = Study([task]).run(Folder(tmp_path, 1e9), Silent())
        seconds = [[run.curve.cpu_seconds[-1] for run in entry.runs] for entry in found[0].entries]
        assert seconds == [[0.2, 0.4], [5.5, 0.1]]
    assert order == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1), *[(0.1, 0), (0.1, 1), (0.2, 1)] * 3]


def test_the_search_does_not_read_the_test_part(tmp_path: Path) -> None:
    READ.clear()
    contender = Contender(parse_entrants("sgd")[0], lambda: Factory("mine:made", made), SPACE)
    Study([Task("mine", (contender,), PLAN, (0, 1), Search(3))]).run(Folder(tmp_path, 1e9), Silent())
    parts: dict[str, list[str]] = {}
    for word in READ:
        if word in ("search", "final"):
            mode = word
        else:
            parts.setdefault(mode, []).append(word)
    assert set(parts["search"]) == {"train", "validation"}
    assert parts["final"].count("test") == 2  # once per seed


def test_the_budget_is_said_before(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(whole) == 0
    shown = capsys.readouterr().out
    assert "large: 3 trials for each of 3 entrants and then 2 seeds for each of 3, 12 steps each" in shown
    assert "one: 3 trials for each of 3 entrants and then 2 seeds for each of 4, 12 steps each" in shown
    # What failed is tried again; nothing else is trained.
    assert "22 of 32 trainings were done before" in shown


def test_another_task_does_not_change_the_first(whole: Path, tmp_path: Path) -> None:
    assert launch("test", tasks()[:1], {"a": 1}, Where(tmp_path, True, 10.0), ["test"]) == 0
    assert numbers(tmp_path)["tasks"][0] == numbers(whole)["tasks"][0]


def test_a_study_in_which_all_fail_has_another_exit_code(tmp_path: Path) -> None:
    task = tasks()[1]
    assert launch("test", [replace(task, contenders=task.contenders[1:3])], {}, Where(tmp_path, True, 10.0), ["test"]) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_at_any_moment_it_ends_with_the_same_numbers(whole: Path, tmp_path: Path, how: signal.Signals) -> None:
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1); "
    command += f"import test_study; from pathlib import Path; sys.exit(test_study.run(Path({str(tmp_path)!r})))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("trainings/*/*.json"))) < 7 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, how)
    _, error = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was faster than the signal")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("trainings/*/*.json")}
    assert len(before) >= 7
    assert "Traceback" not in error
    assert run(tmp_path) == 0
    assert numbers(tmp_path) == numbers(whole)
    # What was done is not done again.
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in before.items())
