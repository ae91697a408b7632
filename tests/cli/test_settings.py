"""Flags go before the file, the file before the defaults; what is wrong is named."""

from dataclasses import fields
from pathlib import Path

import pytest

from precond.lab.cli.config import from_toml
from precond.lab.cli.errors import UserError
from precond.lab.cli.main import COMMANDS, main, parse
from precond.lab.cli.train import Train

TOML = 'data = "wine"\nepochs = 7\nwidths = [8, 4]\nlr = 0.5\nseeds = [3, 4]\nbatch-size = 16\nout = "x/y"\nresume = false\n'


def test_flags_before_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(TOML)
    found = parse(["compare", "--config", str(file), "--epochs", "9", "--seeds", "1,2", "--resume"])
    assert (found.epochs, found.seeds, found.resume) == (9.0, (1, 2), True)
    assert (found.data, found.widths, found.lr, found.batch_size, found.out) == ("wine", (8, 4), 0.5, 16, Path("x/y"))
    assert (found.model, found.recipes) == ("mlp", COMMANDS["compare"]().recipes)
    assert parse(["compare", "digits", f"--config={file}"]).data == "digits"


def test_learning_rates() -> None:
    assert [parse(["compare", "--lr", text]).lr for text in ("0.1", "1", "search", "default")] == [
        0.1,
        1.0,
        "search",
        "default",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown setting 'epoch'; did you mean 'epochs'"),
        ("epochs = 'ten'", "epochs must be a number, got 'ten'"),
        ("epochs = true", "epochs must be a number, got True"),
        ("steps = 1.5", "steps must be a whole number, got 1.5"),
        ("widths = 64", "widths must be a list of whole numbers, got 64"),
        ("widths = ['a']", "widths must be a whole number"),
        ("model = 'mpl'", "model must be one of 'mlp', 'convnet', 'linear', 'logistic', got 'mpl'"),
        ("lr = 'fast'", "lr must be a number or one of 'search', 'default'"),
        ("resume = 1", "resume must be true or false"),
        ("out = 3", "out must be a path, got 3"),
        ("[compare]\nepochs = 3", "unknown setting 'compare'"),
        ("epochs 3", "is no TOML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        from_toml(file, Train)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compare", "digit"], "did you mean 'digits'"),
        (["compare", "--recipes", "sgd,adma"], "did you mean 'adam'"),
        (["compare", "--recipes", "adam(betas=3)"], "adam(betas=3): "),
        (["compare", "--recipes", "sgd+SAM(0.1)+GradientNorm(0.1)"], "sgd + SAM(0.1) + GradientNorm(0.1): "),
        (["compare", "--seeds", "1,1"], "seeds must be different"),
        (["compare", "--seeds", ""], "seeds must be different whole numbers >= 0, got none"),
        (["compare", "--lr", "-1"], "lr must be > 0"),
        (["compare", "--lr-range", "1,2,3"], "lr_range: need lowest and highest"),
        (["compare", "--lr-range", "1e-3,1e-4"], "need 0 < lowest < highest"),
        (["compare", "--trials", "0"], "trials must be at least 1"),
        (["bench", "fashion-mnist", "--seeds", "1,1"], "seeds must be different"),
        (["bench", "fashion-mnist", "--scale", "0"], "scale must be > 0"),
        (["bench", "fashion-mnist", "--data-dir", "/nonexistent"], "apt-get install dataset-fashion-mnist"),
        (["bench", "fashion-mnist", "--scale", "inf"], "scale must be > 0 and finite"),
        (["compare", "--epochs", "0"], "epochs must be > 0"),
        (["compare", "--epochs", "inf"], "epochs must be > 0 and finite"),
        (["compare", "--target", "nan"], "target must be a finite loss"),
        (["bench", "race", "--trials", "0"], "trials must be at least 1, got 0"),
        (["compare", "--split-seed", str(10**20)], "split_seed must be a whole number >= 0 and below 2^63"),
        (["compare", "--seeds", str(10**20), "--lr", "1"], "seed must be a whole number >= 0 and below 2^63"),
        (["lr-range", "wine", "--seed", "-1"], "seed must be a whole number >= 0"),
        (["compare", "--dropout", "1"], "dropout must lie in [0, 1), got 1.0; usual values are 0.1 to 0.5"),
        (["compare", "./mine.py:make"], "run from the folder that holds it, and write mine:make"),
        (["compare", "mine.make"], "did you mean 'mine:make'"),
        (["compare", "json:"], "'json:' names no function; write json:factory"),
        (["compare", "--steps", "5", "--warmup", "5"], "warmup must be shorter"),
        (["compare", "--device", "warp"], "device 'warp' does not work"),
        (["compare", "nowhere.at_all:make"], "cannot import 'nowhere.at_all'"),
        (["compare", "wine", "--model", "convnet"], "needs images"),
        (["compare", "fashion-mnist", "--data-dir", "/nonexistent"], "apt-get install dataset-fashion-mnist"),
        (["compare", "--config", "/nonexistent.toml"], "cannot read the settings in /nonexistent.toml"),
        (["train", "--recipe", "sgd,adam"], "train takes one recipe, got 2"),
        (["report", "/nonexistent"], "there is no /nonexistent"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("precond: error: ")
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [["compare", "--epochs", "ten"], ["compare", "--seeds", "a"], ["compar"], ["compare", "--recipe", "x"]]
)
def test_unreadable_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_every_setting_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, cls in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown = capsys.readouterr().out
        for field in fields(cls):
            assert field.name.replace("_", "-") in shown.lower() or field.name in ("data", "results", "target", "name")
