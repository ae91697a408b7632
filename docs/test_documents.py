"""The code of the documents runs, and what the migration page calls the same numbers is the same."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import precond

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?:(?P<label>Before|After):\n\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


class SAM(torch.optim.Optimizer):
    """The interface of the wrapper davda54/sam, for the blocks that migrate from it."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.kept = [(p, p.clone()) for p in params]
        for p in params:
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p, old in self.kept:
            p.copy_(old)
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


@pytest.fixture(autouse=True)
def wrapper(monkeypatch):
    monkeypatch.setitem(sys.modules, "sam", types.SimpleNamespace(SAM=SAM))


def sections(document: str) -> dict[str, list[tuple[str | None, str]]]:
    """The (label, code) pairs under each heading."""
    text = (ROOT / document).read_text(encoding="utf-8")
    out = {}
    for part in re.split(r"^#+ (?=\S)", re.sub(r"(?ms)^```.*?^```$", _without_hashes, text), flags=re.MULTILINE):
        heading, _, body = part.partition("\n")
        blocks = [(m["label"], m["code"].replace("\0", "#")) for m in FENCE.finditer(body)]
        if blocks:
            out[heading] = blocks
    return out


def _without_hashes(fence: re.Match) -> str:
    """A comment at the start of a line of code is no heading."""
    return fence[0].replace("#", "\0")


def run(name: str, *codes: str) -> dict:
    # A module of its own, so that dataclasses and pickling find it.
    module = types.ModuleType(f"document_{abs(hash((name, codes)))}")
    sys.modules[module.__name__] = module
    try:
        for code in codes:
            exec(compile(code, name, "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        if error.name in ("lightning", "accelerate", "transformers", "timm", "skorch"):
            pytest.skip(f"{error.name} is not installed")
        raise
    finally:
        del sys.modules[module.__name__]
    return module.__dict__


MIGRATION = sections("docs/migration.md")
SETUP = MIGRATION["Migration"][0][1]


@pytest.mark.parametrize("heading", [h for h in MIGRATION if h != "Migration"])
def test_migration(heading):
    blocks = MIGRATION[heading]
    ends = {label: run(f"migration: {heading}", SETUP, code)["model"] for label, code in blocks}
    start = run("migration", SETUP)["model"]
    for model in ends.values():
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True))
    if {"Before", "After"} <= ends.keys():
        for p, q in zip(ends["Before"].parameters(), ends["After"].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_api_names_everything_public():
    listed = set(re.findall(r"^   (\w+)$", (ROOT / "docs/api.rst").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(precond.__all__) - {"RECIPES"} <= listed


@pytest.mark.parametrize("page", ["capture", "curvature", "layers", "models", "neurons", "normalization"])
def test_page(page):
    run(page, *(code for blocks in sections(f"docs/{page}.md").values() for _, code in blocks))


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs/trainers").iterdir()))
def test_trainer(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, *(code for blocks in sections(f"docs/trainers/{page}").values() for _, code in blocks))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_document(document):
    for heading, blocks in sections(document).items():
        for _, code in blocks:
            run(f"{document}: {heading}", code)
