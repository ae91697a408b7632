"""The tables of the experiments say the same for every entrant, and tasks are chosen by whole words."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest

from precond.lab.cli import bench, calibrate
from precond.lab.cli.bench import Bench, Experiment
from precond.lab.cli.main import main
from precond.lab.report import load_results, ratios
from precond.lab.workloads import LogUniform, Task
from precond.lab.workloads.calibration import settings
from precond.lab.workloads.fashion_study import ENTRANTS, fashion_tasks
from precond.lab.workloads.pool import pool_tasks
from precond.lab.workloads.pool.halves import HALVES, Half
from precond.lab.workloads.race import REFERENCE

pytestmark = pytest.mark.usefixtures("without_figures")


def test_every_entrant_of_every_task_has_the_same_budget(fashion_mnist: Path) -> None:
    tasks = fashion_tasks((0, 1, 2), trials=5, folder=fashion_mnist, examples=1000)
    assert [task.name for task in tasks] == [f"{net}, batch {b}" for b in (128, 60, 6, 2, 1) for net in ("MLP", "conv net")]
    for task in tasks:
        assert (task.search.trials, task.seeds, task.reference, task.allowance) == (5, (0, 1, 2), "Adam", 0.0)
        assert [c.label for c in task.contenders] == [label for label, *_ in ENTRANTS]
        assert {c.lr_from for c in task.contenders} == {"searched"}
        widths = [math.log10(c.lr.high / c.lr.low) for c in task.contenders if isinstance(c.lr, LogUniform)]
        assert widths == pytest.approx([3.477] * len(ENTRANTS), abs=0.05)
    assert [t.plan.steps for t in fashion_tasks((0,), 5, scale=0.1, folder=fashion_mnist, examples=1000)][:2] == [80, 20]


def test_tasks_are_chosen_by_whole_words(
    fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def tasks(*args: object) -> tuple[Task, ...]:
        every = fashion_tasks((0,), 1, 0.002, fashion_mnist, 300)
        return tuple(t for t in every if "MLP" in t.name)

    def launch(title: str, chosen: list[Task], *rest: object) -> int:
        made.extend(task.name for task in chosen)
        return 0

    monkeypatch.setitem(bench.EXPERIMENTS, "fashion-mnist", Experiment(tasks))
    monkeypatch.setattr(bench, "launch", launch)
    assert main(["bench", "fashion-mnist", "--tasks", "batch 6,batch 1", "--out", str(tmp_path)]) == 0
    assert made == ["MLP, batch 6", "MLP, batch 1"]
    assert main(["bench", "fashion-mnist", "--tasks", "nonsense"]) == 2
    assert "no task of fashion-mnist contains 'nonsense'; there are MLP, batch 128; MLP, batch 60" in capsys.readouterr().err


def test_entrants_are_chosen_beside_the_reference_and_keep_their_files(
    fashion_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them go on in the same folder."""

    def task(*args: object) -> tuple[Task, ...]:
        (found,) = (t for t in fashion_tasks((0,), 1, 0.002, fashion_mnist, 300) if t.name == "MLP, batch 128")
        return (replace(found, reference="Adam", seeds=(0,)),)

    monkeypatch.setitem(bench.EXPERIMENTS, "fashion-mnist", Experiment(task))
    labels = [c.label for c in task()[0].contenders]

    def run(*names: str) -> int:
        return main(["bench", "fashion-mnist", "--trials", "1", "--entrants", ",".join(names), "--out", str(tmp_path)])

    def files() -> list[str]:
        return sorted(p.name[:2] for p in tmp_path.glob("trainings/*/*seed-0.json"))

    assert run("BNP∘Adam") == 0
    assert files() == sorted(f"{labels.index(name):02d}" for name in ("Adam", "BNP∘Adam"))
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("trainings/*/*seed-0.json")}
    assert run("SGD", "BNP∘Adam") == 0
    assert {f"{labels.index(name):02d}" for name in ("SGD", "Adam", "BNP∘Adam")} <= set(files())
    assert all((tmp_path / "trainings" / "MLP-batch-128" / name).stat().st_mtime_ns == at for name, at in before.items())
    (found,) = load_results(tmp_path / "results.json").tasks
    assert [entry.label for entry in found.entries] == [x for x in labels if x == "Adam" or "SGD" in x or x == "BNP∘Adam"]
    capsys.readouterr()
    assert run("Lion") == 2 and "no entrant of fashion-mnist contains 'Lion'; there are SGD" in capsys.readouterr().err


def test_the_settings_that_decide_a_result_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    one = Experiment(lambda *args: (Task("one", (), None, (), None),), ("same for all",))  # type: ignore[arg-type]
    monkeypatch.setitem(bench.EXPERIMENTS, "fashion-mnist", one)

    def launch(title: str, tasks: object, settings: dict[str, object], where: object, *rest: object) -> int:
        seen.update(settings, rules=rest[1])
        return 0

    monkeypatch.setattr(bench, "launch", launch)
    assert Bench("fashion-mnist", trials=3, seeds=(1,), scale=0.5).run(["x"]) == 0
    assert seen == {
        "name": "fashion-mnist",
        "trials": 3,
        "seeds": [1],
        "scale": 0.5,
        "examples": None,
        "rules": ("same for all",),
    }


def test_a_race(fashion_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("heavyball", "pytorch_optimizer", "schedulefree"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra [bench])")
    arguments = ["--tasks", "wine", "--trials", "2", "--seeds", "0,1,2", "--scale", "0.02", "--examples", "300"]
    arguments += ["--data-dir", str(fashion_mnist)]
    assert main(["bench", "race", *arguments, "--out", str(tmp_path)]) == 0
    (task,) = load_results(tmp_path / "results.json").tasks
    assert (task.name, task.reference, task.target.part) == ("logistic, wine", REFERENCE, "train")
    assert not any(entry.error for entry in task.entries)
    assert {entry.search[0].lr for entry in task.entries} == {1e-3, 2.5e-3, 3e-3, 0.01, 0.1}  # each one's own
    assert ratios(task, "step")[REFERENCE].value == 1.0
    assert "schedule-free" in (tmp_path / "summary.md").read_text()
    shown = capsys.readouterr()
    assert "Warning" not in shown.out + shown.err


def test_a_task_of_the_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--tasks",
        "diabetes,ratings",
        "--entrants",
        "torch AdamW",
        "--trials",
        "2",
        "--seeds",
        "0,1",
        "--scale",
        "0.02",
    ]
    assert main(["bench", "pool", *arguments, "--examples", "300", "--out", str(tmp_path)]) == 0
    found = load_results(tmp_path / "results.json")
    assert [task.family for task in found.tasks] == ["tabular", "recommenders"]
    assert [[entry.label for entry in task.entries] for task in found.tasks] == [["torch AdamW", "torch AdamW, β₂ = 0.95"]] * 2
    assert "## Pairs: work to the validation target" in (tmp_path / "summary.md").read_text()
    # The best of two is at an end, so that the search went on.
    assert all(2 < len(entry.search) <= 4 for task in found.tasks for entry in task.entries)
    capsys.readouterr()
    assert main(["bench", "pool", "--data-dir", "x", "--out", str(tmp_path)]) == 2
    assert "the pool reads no files" in capsys.readouterr().err


@pytest.mark.parametrize("half", HALVES)
def test_every_half_of_the_pool_has_a_command(half: Half) -> None:
    name = "pool" if half == "development" else f"pool-{half}"
    assert name in get_args(bench.Name)
    # Making them takes seconds, of nets that are trained before.
    made = bench.EXPERIMENTS[name].tasks
    assert isinstance(made, partial) and (made.func, made.args) == (pool_tasks, (half,))


def test_the_calibration_study_trains_once_and_predicts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "settings", lambda: settings()[:1])
    monkeypatch.setattr(calibrate, "BASES", ("gd",))
    command = ["bench", "calibration", "--out", str(tmp_path)]
    assert main([*command, "--tasks", "wine"]) == 0
    (curves,) = (tmp_path / "curves").iterdir()
    made, table = curves.stat().st_mtime_ns, (tmp_path / "table.md").read_text()
    found = json.loads((tmp_path / "cells.json").read_text())
    remedies = ["standardize", "bnp", "whitened"]
    assert [(cell["remedy"], cell["horizon"]) for cell in found] == [(name, steps) for name in remedies for steps in (50, 150)]
    assert [line.split(" | ")[:3] for line in table.splitlines()[2:]] == [["| wine, linear", "gd", name] for name in remedies]
    assert all(cell["measured"] > 2 for cell in found if cell["remedy"] == "standardize")  # raw columns up to the thousands
    assert main(command) == 0
    assert (curves.stat().st_mtime_ns, (tmp_path / "table.md").read_text()) == (made, table)
    capsys.readouterr()
    assert main([*command, "--tasks", "nonsense"]) == 2
    assert "no task of calibration contains 'nonsense'; there are wine, linear" in capsys.readouterr().err
