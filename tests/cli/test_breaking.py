"""A sample of ``breaking.py``, and one test for each kind that it found."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from precond.lab.cli.errors import UserError
from precond.lab.cli.folder import file_name, sole
from precond.lab.cli.main import main
from precond.lab.report import load_results, save
from precond.lab.report.reading import parsed, read
from precond.lab.report.results import Results, ResultsError
from precond.lab.workloads import (
    Checkpoint,
    CheckpointError,
    Outcome,
    Plan,
    WriteError,
    parse_entrants,
    sweep,
    train,
    write_atomically,
)

BREAKING = Path(__file__).with_name("breaking.py")
TRAIN = ["train", "wine", "--recipe", "sgd", "--lr", "1e-6", "--steps", "3", "--widths", "4"]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_a_sample() -> None:
    # Without -W ignore a fork of a process with threads is deprecated from Python 3.12 on; torch's wait for work and hold no lock.
    found = subprocess.run([sys.executable, "-W", "ignore", BREAKING, "sample"], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr


# --- files -------------------------------------------------------------------------------------------------------------------


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file, contents, wrong = tmp_path / "x", [bytes([i]) * 200_000 for i in range(4)], []

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                write_atomically(file, content)
                if file.read_bytes() not in contents:
                    wrong.append("half a file")
        except WriteError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and list(tmp_path.iterdir()) == [file]


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".0123456789abcdef.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    (tmp_path / "0123456789abcdef.tmp").touch()
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "0123456789abcdef.tmp"]


def test_text_without_utf8_is_written_and_a_folder_that_is_none_is_an_error_of_writing(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", json.dumps("\udcff", ensure_ascii=False))
    assert json.loads((tmp_path / "x").read_text()) == "\udcff"
    with pytest.raises(WriteError, match=r"cannot write .*/x/y .*Not a directory|File exists"):
        write_atomically(tmp_path / "x" / "y", b"")


_STUDY = ["verify", "--experiment", "z-versus-p", "--only", "digits-adam"]


@pytest.mark.parametrize(
    "argv", [["logistic"], ["verify", "--only", "rate"], ["diagnose", "wine"], TRAIN, _STUDY], ids=" ".join
)
def test_a_folder_that_cannot_be_used_is_refused_before_the_work(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "busy").mkdir()
    assert main([*argv, "--out", str(tmp_path / "file" / "out")]) == 2
    shown = capsys.readouterr()
    assert (
        f"precond: error: cannot work in {tmp_path}/file/out: " in shown.err and "name another folder with --out" in shown.err
    )
    pytest.importorskip("fcntl")
    with sole(tmp_path / "busy"):
        assert main([*argv, "--out", str(tmp_path / "busy")]) == 2
    assert "another process works in" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and not shown.out


def test_a_lock_that_is_a_link_leaves_the_file_behind_it_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "mine")
    with sole(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(UserError, match="cannot work in"), sole(tmp_path / "mine"):
        pass


@pytest.mark.parametrize("text", ["x" * 10_000, "日" * 1000, "../" * 500, "", "\x00", "a/../b", "."])
def test_names_of_files_are_names_of_files(text: str, tmp_path: Path) -> None:
    name = file_name(text)
    assert len(f"{name}-search-00.json".encode()) < 255 and Path(name).name == name
    (tmp_path / name).touch()


# --- going on ------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_left_beside_an_outcome_goes_and_a_model_that_is_gone_is_trained_again(tmp_path: Path) -> None:
    assert main([*TRAIN, "--out", str(tmp_path)]) == 0
    (outcome,) = tmp_path.glob("trainings/*/*.json")
    left, model = outcome.with_suffix(".pt"), torch.load(tmp_path / "model.pt", weights_only=True)
    left.write_bytes(b"whatever")
    assert main([*TRAIN, "--out", str(tmp_path)]) == 0
    assert not left.exists()
    (tmp_path / "model.pt").unlink()
    assert main([*TRAIN, "--out", str(tmp_path)]) == 0
    again = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(model[key], again[key]) for key in model)


@pytest.mark.parametrize(
    "spoiled", [{"model": {}}, {"curve": {"step": [1]}}, {"random": None}, {"step": None, "scheduler": 3}, {"identity": 1}]
)
def test_a_checkpoint_that_holds_something_else_is_named(spoiled: dict[str, Any], tmp_path: Path) -> None:
    from precond.lab.workloads import Architecture, BuiltIn, Interrupted, load_data

    workload = BuiltIn(load_data("wine"), Architecture("linear", ()), 32)
    checkpoint, (entrant,), plan = Checkpoint(tmp_path / "c.pt", 0.0), parse_entrants("adam"), Plan(0.01, 6, 0)
    with pytest.raises(Interrupted):
        train(workload, entrant, plan, checkpoint=checkpoint, watch=lambda step, _: step == 3)
    state = checkpoint.load()
    assert state is not None
    checkpoint.save({**state, **spoiled})
    with pytest.raises(CheckpointError, match=r"c.pt (holds no state of this training|belongs to 1, not to)"):
        train(workload, entrant, plan, checkpoint=checkpoint)


# --- results -------------------------------------------------------------------------------------------------------------------


def results(tmp_path: Path) -> Any:
    assert main(["compare", "wine", "--recipes", "sgd", "--lr", "1e-6", "--steps", "3", "--seeds", "0", "--widths", "4",
                 "--out", str(tmp_path)]) == 0  # fmt: skip
    return json.loads((tmp_path / "results.json").read_text())


CASES: list[tuple[str, Any, str]] = [
    ("tasks", [], "has no task"),
    ("tasks.0.entries", [], "tasks[0]: 'wine' has no entrant"),
    ("tasks.0.entries.0.runs", [], "'sgd' has no training"),
    ("tasks.0.entries.0.runs.0.curve.step", [0], "a curve of 1 evaluations has"),
    ("tasks.0.entries.0.runs.0.curve.step.0", "0", 'step[0] must be a whole number below 2^63, got "0"'),
    ("tasks.0.entries.0.runs.0.curve.step.0", True, "step[0] must be a whole number below 2^63, got true"),
    ("tasks.0.entries.0.runs.0.curve.step.0", 10**400, "got a larger one"),
    ("tasks.0.entries.0.runs.0.curve.train_loss.0", 10**400, "must be a finite number or null, got a larger one"),
    ("tasks.0.entries.0.runs.0.status", "<b>", "must be one of 'finished', 'diverged', 'failed', got \"<b>\""),
    ("tasks.0.facts", {"data": 1}, 'facts["data"] must be text, got 1'),
    ("tasks.0.entries.0.bounds", [1.0], "bounds must be a list of 2, got a list of 1"),
    ("versions", None, "versions must be an object, got null"),
    ("clock", ["x"], "got a list of 1"),
]


def test_results_of_other_types_are_named_by_their_place(tmp_path: Path) -> None:
    whole = results(tmp_path)
    file = tmp_path / "results.json"
    for path, value, words in CASES:
        spoiled = json.loads(json.dumps(whole))
        *keys, last = (int(k) if k.isdigit() else k for k in path.split("."))
        at = spoiled
        for key in keys:
            at = at[key]
        at[last] = value
        file.write_text(json.dumps(spoiled))
        with pytest.raises(ResultsError) as caught:
            load_results(file)
        assert words in str(caught.value) and str(file) in str(caught.value), path
    for content, words in ((b"[" * 100_000, "nested too deeply"), (b'{"schema": NaN}', "NaN is no JSON"), (b"\xff", "is no JSON"),
                           (b"1" * 10_000, "is no JSON"), (json.dumps(whole).encode()[:-40], "is no JSON")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(ResultsError, match=words):
            load_results(file)
    file.unlink()
    file.symlink_to(file)
    assert main(["report", str(file)]) == 2


def test_hostile_names_stay_text(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    sys.path.insert(0, str(BREAKING.parent))
    try:
        import breaking
    finally:
        sys.path.pop(0)
    whole = read(parsed(json.dumps(results(tmp_path)).encode()), Results, "")
    (task,), (entry,) = whole.tasks, whole.tasks[0].entries
    many = breaking.NAMES
    failed: list[Outcome] = [replace(entry.runs[0], status="failed", error=name) for name in many]
    tasks = tuple(
        replace(
            task, name=name, metric=name, facts={name: name, "data": name}, reference=name,
            target=replace(task.target, rule=name),
            entries=(*(replace(entry, label=label) for label in many), replace(entry, label=f"failed {name}", runs=(run,))),
        )
        for name, run in zip(many[2:4], failed, strict=False)
    )  # fmt: skip
    every = replace(
        whole, tasks=tasks, title=many[2], command=many[3], rules=tuple(many), settings={n: n for n in many},
        versions={n: n for n in many}, machine={n: n for n in many},
    )  # fmt: skip
    save(tmp_path, every)
    breaking.check_page(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page
    assert not [w for w in recwarn if "Glyph" not in str(w.message)]
