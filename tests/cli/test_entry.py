"""Where extras are not installed: the library works, and the command line says what to install."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

from precond.lab.cli import entry

SOURCES = Path(__file__).parents[2] / "src"
_NAMES = {"scikit-learn": "sklearn", "curvlinops-for-pytorch": "curvlinops", "import-linter": "importlinter"}


def extras() -> set[str]:
    """Modules of all packages that extras name; jinja2 comes with torch."""
    names = {re.match(r"[\w.-]+", line)[0] for line in requires("precond") or () if "extra ==" in line}  # type: ignore[index]
    return {_NAMES.get(name, name.replace("-", "_")) for name in names} - {"jinja2"}


def without_extras(code: str) -> None:
    # What None stands for is not installed.
    before = f"import sys\nsys.modules.update(dict.fromkeys({sorted(extras())!r}))\n"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", before + code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_the_library_needs_torch_alone() -> None:
    """Each module but those of the command line: it, its reports, its measurements on data of scikit-learn."""
    modules = [
        ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
        for path in (SOURCES / "precond").rglob("*.py")
    ]
    needed = [
        *sorted(
            m
            for m in modules
            if not re.match(r"precond\.(lab\.(cli|report|evidence)|integrations\.(lightning|transformers|skorch))\b", m)
        ),
        "precond.lab.cli.entry",
    ]
    assert len(needed) > 100
    without_extras(f"import importlib\nfor name in {needed!r}: importlib.import_module(name)")


def test_the_loop_of_the_readme_needs_torch_alone() -> None:
    section = (SOURCES.parent / "README.md").read_text(encoding="utf-8").partition("## A training loop")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert "optimizer.step()" in code
    without_extras(f"import torch; torch.set_num_threads(1)\n{code}")


@pytest.mark.parametrize("argv", [[], ["--help"], ["train"], ["compare", "--help"], ["report", "x"]], ids=" ".join)
def test_what_is_missing_is_named(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def version(name: str) -> str:
        if name in ("optuna", "scikit-learn"):
            raise entry.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(entry, "version", version)
    assert entry.main(argv) == 2
    shown = capsys.readouterr()
    assert "needs optuna, scikit-learn, not installed here" in shown.err
    assert "pip install 'precond[cli]'" in shown.err
    assert shown.err.count("\n") == 1 and not shown.out


def test_version_and_commands_where_all_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert re.fullmatch(r"precond \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert not entry.absent()
    assert entry.main(["report", "/nonexistent"]) == 2
    assert "there is no /nonexistent" in capsys.readouterr().err


def test_the_module_is_the_command():
    ask = [sys.executable, "-m", "precond.lab.cli", "--version"]
    found = subprocess.run(ask, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, f"precond {version('precond')}\n"), found.stderr
