"""Whole runs: finished, killed, interrupted, refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from precond.lab.cli.main import main
from precond.lab.cli.stopping import stopping
from precond.lab.report import load_results
from precond.lab.workloads import WriteError, write_atomically

# Dropout, batch statistics, a second gradient per step, a search and two seeds: everything that a resumption must bring back.
ARGS = [
    "compare", "digits", "--recipes", "adam,adamw+SAM(0.01,space='z')", "--widths", "16", "--normalization", "batch",
    "--dropout", "0.2", "--steps", "60", "--evaluations", "4", "--lr-range", "1e-3,1e-2", "--trials", "2", "--seeds", "0,1",
    "--checkpoint-seconds", "0.02",
]  # fmt: skip
without_figures = pytest.mark.usefixtures("without_figures")
_COMMAND = "import sys; from precond.lab.cli.main import main; sys.exit(main(sys.argv[1:]))"


def start(out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *ARGS, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def under_way(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the first checkpoint is there, and then a random time."""
    deadline = time.monotonic() + 60
    while not list(out.glob("trainings/*/*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.5))


def numbers(out: Path) -> Any:
    """results.json without timings and the folder's name."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stripped(v) for k, v in value.items() if k not in ("seconds", "cpu_seconds", "created", "command")}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return stripped(json.loads((out / "results.json").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    assert main([*ARGS, "--out", str(out)]) == 0
    torch.set_num_threads(before)
    return out


def test_a_run_leaves_results_page_and_readable_text(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_results(whole / "results.json")
    (found,) = loaded.tasks
    assert [len(e.search) for e in found.entries] == [2, 2]
    assert [len(e.runs) for e in found.entries] == [2, 2]
    assert not list(whole.glob("trainings/*/*.pt"))
    assert (loaded.settings["threads"], loaded.clock) == (1, "cpu_seconds")
    page = (whole / "report.html").read_text()
    assert "adamw + SAM(0.01, space=&#39;z&#39;)" in page
    # The same command again trains nothing.
    before = (whole / "results.json").stat().st_mtime_ns, numbers(whole)
    assert main([*ARGS, "--out", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "8 of 8 trainings were done before" in shown
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert numbers(whole) == before[1]
    # The page is made again from the numbers alone.
    (whole / "report.html").unlink()
    assert main(["report", str(whole)]) == 0
    assert (whole / "report.html").exists()


@without_figures
def test_killed_at_random_and_resumed_it_ends_with_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    under_way(tmp_path, process)
    process.kill()
    process.communicate()
    assert main([*ARGS, "--out", str(tmp_path)]) == 0
    assert numbers(tmp_path) == numbers(whole)


@without_figures
def test_interrupted_it_says_what_is_saved_and_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    under_way(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was faster than the signal")
    assert process.returncode == 130
    assert "trainings are done" in error
    assert "is saved at step" in error
    assert f"--out {tmp_path}" in error
    assert "Traceback" not in error
    assert main([*ARGS, "--out", str(tmp_path)]) == 0
    assert numbers(tmp_path) == numbers(whole)


def test_the_polite_kill_stops_like_ctrl_c_and_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_interrupted_before_anything_is_saved_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("precond.lab.cli.logistic.logistic", interrupt)
    assert main(["logistic"]) == 130
    assert capsys.readouterr().err.endswith("Interrupted before anything new was saved.\n")


@without_figures
def test_other_settings_are_named_and_no_resume_starts_over(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["compare", "wine", "--recipes", "sgd", "--lr", "1e-6", "--steps", "3", "--seeds", "0", "--out", str(tmp_path)]
    assert main(args) == 0
    assert main([*args, "--batch-size", "32"]) == 2
    error = capsys.readouterr().err
    assert "batch_size was 64, now 32; name another folder with --out, or start all over with --no-resume" in error
    assert main([*args, "--checkpoint-seconds", "3"]) == 0
    assert main([*args, "--batch-size", "32", "--no-resume"]) == 0


@without_figures
@pytest.mark.parametrize("name", ["settings.json", "trainings/wine/00-sgd-seed-0.json"])
def test_damaged_files_are_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["compare", "wine", "--recipes", "sgd", "--lr", "1e-6", "--steps", "3", "--seeds", "0", "--out", str(tmp_path)]
    assert main(args) == 0
    (tmp_path / name).write_text("{")
    assert main(args) == 2
    assert f"{tmp_path / name} is damaged" in capsys.readouterr().err


def test_a_folder_has_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["compare", "wine", "--lr", "1e-6", "--steps", "1", "--out", str(tmp_path)]) == 2
    assert "another process works in" in capsys.readouterr().err


def test_divergence_is_reported_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["compare", "digits", "--recipes", "sgd(lr=1e30),adam", "--lr", "0.003", "--steps", "20", "--seeds", "0,1"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    assert "sgd(lr=1e+30), seed 0: diverged at step" in capsys.readouterr().out
    first, second = load_results(tmp_path / "results.json").tasks[0].entries
    assert [run.status for run in (*first.runs, *second.runs)] == ["diverged", "diverged", "finished", "finished"]
    assert "<strong>sgd(lr=1e+30) diverged</strong> with 2 of 2 seeds" in (tmp_path / "report.html").read_text()


def test_a_search_in_which_all_diverge(tmp_path: Path) -> None:
    args = [
        "compare",
        "digits",
        "--recipes",
        "sgd",
        "--lr-range",
        "1e30,1e31",
        "--trials",
        "2",
        "--steps",
        "5",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main(args) == 0
    assert load_results(tmp_path / "results.json").tasks[0].entries[0].lr == 1.778e30


@without_figures
def test_train_saves_the_model(tmp_path: Path) -> None:
    args = ["train", "diabetes", "--model", "linear", "--recipe", "adam(lr=0.01)", "--steps", "30", "--out", str(tmp_path)]
    assert main(args) == 0
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert [v.shape for v in state.values()] == [(1, 10), (1,)]
    (found,) = load_results(tmp_path / "results.json").tasks
    assert (found.metric, found.entries[0].lr, found.entries[0].lr_from) == ("R²", 0.01, "own")


@without_figures
def test_a_model_of_others_stays_and_a_damaged_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "wine", "--recipe", "adam(lr=0.01)", "--steps", "2", "--out", str(tmp_path)]
    (tmp_path / "model.pt").write_bytes(b"mine")
    for more in ([], ["--no-resume"]):
        assert main([*args, *more]) == 2
        assert f"{tmp_path / 'model.pt'} is there already" in capsys.readouterr().err
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.pt", b"mine")]
    (tmp_path / "model.pt").unlink()
    assert main(args) == 0
    (tmp_path / "model.pt").write_bytes(b"")
    assert main(args) == 2
    assert f"{tmp_path / 'model.pt'} is damaged" in capsys.readouterr().err
    (tmp_path / "model.pt").unlink()
    assert main(args) == 0
    assert torch.load(tmp_path / "model.pt", weights_only=True)


FACTORY = """
import torch

def make():
    x = torch.linspace(-1, 1, 20)[:, None]
    batches = [(x[i : i + 5], 2 * x[i : i + 5]) for i in range(0, 20, 5)]
    return torch.nn.Linear(1, 1), torch.nn.MSELoss(), batches
"""


def test_ones_own_factory_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_problem_of_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    args = ["compare", "my_problem_of_test:make", "--recipes", "sgd,adam", "--epochs", "5", "--seeds", "0"]
    assert main(args) == 2
    assert "needs validation data" in capsys.readouterr().err
    assert main([*args, "--lr", "0.1"]) == 0
    (page,) = tmp_path.glob("runs/compare-my_problem_of_test-make-*/report.html")
    assert "Training loss" in page.read_text()


@without_figures
def test_a_training_that_failed_leaves_no_model_and_says_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = "lambda out, y: (out - y).detach().square().mean()"
    (tmp_path / "detached_problem_of_test.py").write_text(FACTORY.replace("torch.nn.MSELoss()", loss))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["train", "detached_problem_of_test:make", "--steps", "5", "--lr", "0.1", "--out", "out"]) == 1
    assert "Saved in out: report.html, results.json\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.pt").exists()


def test_the_remedy_of_a_file_that_cannot_be_written_is_that_of_the_reason(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"\(1 bytes\): Is a directory; name another place and run the same command again"):
        write_atomically(tmp_path, "x")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="name another place"):
        write_atomically(tmp_path / "file" / "x", "x")


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    def full(check: Callable[..., Any]) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["compare", "wine", "--recipes", "sgd", "--lr", "1e-6", "--steps", "3", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("precond: error: cannot write")
    assert "the disk is full; free some space and run the same command again" in error
