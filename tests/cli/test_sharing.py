"""Several processes work on tasks of one study in one folder."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from precond.lab.cli.errors import UserError
from precond.lab.cli.folder import Folder
from precond.lab.cli.launch import Where, launch
from precond.lab.cli.study import folder_name
from precond.lab.report import load_results
from precond.lab.workloads import (
    Architecture,
    BuiltIn,
    Contender,
    LogUniform,
    Plan,
    Search,
    Task,
    load_data,
    parse_entrants,
    train,
)

pytestmark = pytest.mark.usefixtures("without_figures")

SETTINGS = {"a": 1}


def tasks() -> tuple[Task, ...]:
    digits = load_data("digits", examples=200)
    contenders = tuple(
        Contender(entrant, lambda: BuiltIn(digits, Architecture("mlp", (8,)), 32, evaluated=50), LogUniform(1e-3, 1.0, 0.01))
        for entrant in parse_entrants("sgd, adam")
    )
    one = Task(
        "one", contenders, Plan(None, 20, 0, "linear", 2, 4), (0, 1), Search(3, judge="training"), reference="adam",
        allowance=0.0, target_part="train", metric="accuracy",
    )  # fmt: skip
    return tuple(Task(**{**vars(one), "name": name, "facts": {"data": f"digits {name}"}}) for name in ("one", "two", "three"))


def run(out: Path, names: list[str], resume: bool = True) -> int:
    chosen = [task for task in tasks() if task.name in names]
    return launch("test", chosen, SETTINGS, Where(out, resume, 0.02), ["test"], ("Same for all.",))


def started(out: Path, names: list[str]) -> "subprocess.Popen[str]":
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch; torch.set_num_threads(1); "
    command += "from precond.lab.report import style; style.svg_panels = lambda *_, **__: '<svg></svg>'; "  # as without_figures
    command += f"import test_sharing; from pathlib import Path; sys.exit(test_sharing.run(Path({str(out)!r}), {names!r}))"
    return subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def numbers(out: Path) -> Any:
    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if k not in ("seconds", "cpu_seconds", "against")}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return stripped(json.loads((out / "results.json").read_text())["tasks"])


def test_two_processes_at_once_and_then_one_that_collects(tmp_path: Path) -> None:
    both = tmp_path / "both"
    processes = [started(both, ["one"]), started(both, ["two", "three"])]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, "")
    trained = {file: file.stat().st_mtime_ns for file in both.glob("trainings/*/*.json")}
    assert len(trained) == 3 * 2 * (3 + 2)
    everything = ["one", "two", "three"]
    assert run(both, everything) == 0
    assert {file: file.stat().st_mtime_ns for file in both.glob("trainings/*/*.json")} == trained
    assert [task.name for task in load_results(both / "results.json").tasks] == everything
    assert run(tmp_path / "alone", everything) == 0
    assert numbers(both) == numbers(tmp_path / "alone")
    found = load_results(both / "results.json")
    assert found.rules == ("Same for all.",)
    for task in found.tasks:
        assert (task.reference, task.judge, task.target.part) == ("adam", "training", "train")
        for entry in task.entries:
            assert [trial.lr for trial in entry.search] == [0.01, 0.005623, 0.1778]
            assert {r.lr for r in entry.runs} == {min(entry.search, key=lambda t: t.loss).lr}


def test_a_search_is_judged_by_the_loss_of_training_examples_that_no_curve_shows(tmp_path: Path) -> None:
    assert run(tmp_path, ["one"]) == 0
    (task,), (found,) = tasks()[:1], load_results(tmp_path / "results.json").tasks
    contender = task.contenders[0]
    shown: dict[str, float] = {}
    parts: tuple[Literal["train", "search"], ...] = ("train", "search")
    for part in parts:
        plan = replace(task.plan, lr=0.01, seed=task.search_seed, evaluations=1, training_loss_on=part)
        shown[part] = train(contender.workload(), contender.entrant, plan)[0].curve.train_loss[-1]
    assert found.entries[0].search[0].loss == shown["search"] != shown["train"]


@pytest.mark.parametrize("first", [True, False], ids=["reference first", "reference last"])
def test_a_search_may_aim_at_steps_to_the_lowest_loss_of_the_references_best_trial(tmp_path: Path, first: bool) -> None:
    base = tasks()[0]
    contenders = base.contenders[::-1] if first else base.contenders
    search = Search(4, judge="training", aim="steps", evaluations=8)
    task = replace(base, contenders=contenders, search=search)
    assert launch("test", [task], SETTINGS, Where(tmp_path, True, 1e9), ["test"]) == 0
    (found,) = load_results(tmp_path / "results.json").tasks
    assert [entry.label for entry in found.entries] == [c.label for c in contenders] and found.aim == "steps"

    def curves(label: str) -> dict[float, tuple[list[int], list[float]]]:
        kept = [json.loads(file.read_text()) for file in tmp_path.glob(f"trainings/one/*-{label}-search-*.json")]
        return {one["lr"]: (one["curve"]["step"], one["curve"]["train_loss"]) for one in kept}

    adam, sgd = curves("adam"), curves("sgd")
    best_of_adam = min(adam, key=lambda lr: adam[lr][1][-1])
    goal = min(adam[best_of_adam][1])
    steps, own = (
        {lr: next((n for n, x in zip(*curve, strict=True) if x <= goal), None) for lr, curve in trials.items()}
        for trials in (sgd, adam)
    )
    assert len(sgd) == 4 and all(len(n) == 9 for n, _ in sgd.values())
    reached = {lr: (n, sgd[lr][1][-1]) for lr, n in steps.items() if n is not None}
    best_of_sgd = min(reached, key=lambda lr: reached[lr]) if reached else min(sgd, key=lambda lr: sgd[lr][1][-1])
    for entry in found.entries:
        of_reference = entry.label == "adam"
        assert {t.lr: t.steps for t in entry.search} == (own if of_reference else steps)
        assert {run.lr for run in entry.runs} == {best_of_adam if of_reference else best_of_sgd}
    assert "the fewest steps to the lowest loss in the best trial of adam" in (tmp_path / "report.html").read_text()


def test_a_task_is_one_processs(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 1.0)
    identity = json.loads((tmp_path / "settings.json").read_text()) if run(tmp_path, ["one"]) == 0 else {}
    with folder.claimed(identity, [folder_name(tasks()[0])], resume=True):
        with pytest.raises(UserError, match="another process works in"):
            run(tmp_path, ["one", "two"])
        assert run(tmp_path, ["two"]) == 0
        # Nobody starts all over under another's feet.
        with pytest.raises(UserError, match="another process works in"):
            run(tmp_path, ["two"], resume=False)
        with (
            pytest.raises(UserError, match="holds a run with other settings"),
            folder.claimed({**identity, "a": 2}, ["three"], resume=True),
        ):
            pass
    assert run(tmp_path, ["two"], resume=False) == 0
    assert not list(tmp_path.glob("trainings/one/*.json"))
