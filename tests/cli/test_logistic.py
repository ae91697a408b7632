"""``precond logistic`` leaves a page and its numbers."""

import json
import re
from pathlib import Path

import pytest

from precond.lab.cli.main import main


def test_page_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logistic", "--data", "wine", "--limit", "300", "--out", str(tmp_path)]) == 0
    assert "BNP, exact statistics" in capsys.readouterr().out
    (problem,) = json.loads((tmp_path / "results.json").read_text())["problems"]
    assert [d["reached"] is None for d in problem["descents"]] == [True, True, False, False, False]
    page = (tmp_path / "report.html").read_text()
    assert "not in 300" in page
    assert not re.search(r"url\((?!#)|@import|<script", page)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "digits"], "data must be one of wine, breast-cancer"),
        (["--l2", "0"], "l2 must be > 0"),
        (["--tolerance", "2"], "tolerance must lie between 0 and 1"),
        (["--limit", "0"], "limit must be at least 1"),
    ],
)
def test_bad_input(argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["logistic", *argv, "--out", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
