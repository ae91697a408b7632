"""Four wings, what is loaded when, and the import paths of earlier versions."""

from __future__ import annotations

import ast
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import precond
from precond._moved import MOVED

ROOT = Path(precond.__file__).parent


def loaded_by(code: str) -> set[str]:
    """The modules of this library that a fresh process has loaded after some code."""
    ask = f"import torch\n{code}\nimport sys\nprint(*(m for m in sys.modules if m.startswith('precond')))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_the_top_reads_like_a_table_of_contents() -> None:
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith("__pycache__")}
    assert entries == {"__init__.py", "_moved.py", "py.typed", "algebra", "analysis", "integrations", "lab", "optim"}


def test_a_training_loop_loads_the_optimizer_alone() -> None:
    loop = "import precond\nprecond.auto(torch.nn.Linear(2, 2))"
    assert not {m for m in loaded_by(loop) if m.startswith(("precond.analysis", "precond.lab", "precond.integrations"))}


def test_analysis_loads_nothing_of_the_lab() -> None:
    found = loaded_by("import precond\nprecond.diagnose, precond.hessian")
    assert "precond.analysis.curvature" in found
    assert not {m for m in found if m.startswith("precond.lab")}


@pytest.mark.parametrize("name", sorted(MOVED))
def test_a_path_of_an_earlier_version_names_the_same_module(name: str) -> None:
    if name == "report":
        pytest.importorskip("jinja2")
    now = importlib.import_module(MOVED[name])
    assert importlib.import_module(f"precond.{name}") is now
    assert getattr(precond, name) is now
    assert now.__spec__ is not None and now.__spec__.name == now.__name__ == MOVED[name]


def test_modules_below_an_earlier_path_are_the_same_too() -> None:
    from precond.algebra.maps import diagonal

    assert importlib.import_module("precond.maps.diagonal") is diagonal
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        importlib.import_module("precond.maps.nowhere")


def test_an_old_path_is_found_by_a_process_that_asks_for_it_first() -> None:
    assert {"precond.curvature", "precond.analysis.curvature"} <= loaded_by("from precond.curvature import hessian")


def test_what_was_pickled_under_an_earlier_path_is_found() -> None:
    # Protocol 0 has the path in plain words.
    old = pickle.dumps(precond.RMS, 0).replace(b"precond.optim.preconditioners.rms", b"precond.preconditioners.rms")
    assert b"precond.preconditioners.rms" in old
    assert pickle.loads(old) is precond.RMS


def test_every_public_name_is_there() -> None:
    for name in precond.__all__:
        assert getattr(precond, name) is not None
    assert set(precond.__all__) <= set(dir(precond))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        precond.nothing  # noqa: B018


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names of torch with a part that begins with an underscore, as a module writes them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            full = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)*\._[a-zA-Z]\w*|torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)+", full):
                yield full
        elif isinstance(node, ast.ImportFrom) and re.fullmatch(r"torch(\.\w+)*", node.module or ""):
            yield from (full for name in node.names if "._" in (full := f"{node.module}.{name.name}"))


def test_what_is_private_in_torch_is_in_the_table_of_versions() -> None:
    table = (ROOT.parents[1] / "docs/reliability.md").read_text(encoding="utf-8").partition("## Versions of torch")[2]
    rows = set(re.findall(r"`(torch\.[\w.*]+)`", table))
    used = {name for path in ROOT.rglob("*.py") for name in private_names(ast.parse(path.read_text(encoding="utf-8")))}
    whole = {name for name in used if not any(other.startswith(f"{name}.") for other in used)}  # no parts of longer ones
    unlisted = {name for name in whole if not any(fnmatch(name, row) for row in rows)}
    assert not unlisted
    assert not {row for row in rows if not any(fnmatch(name, row) for name in whole)}
    for name in whole:
        value: object = torch
        for part in name.split(".")[1:]:
            value = getattr(value, part, None) or importlib.import_module(f"{value.__name__}.{part}")  # type: ignore[attr-defined]
        assert value is not None, name
