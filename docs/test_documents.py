"""The code of the documents runs, what the migration page calls the same numbers is the same, and tutorials print what they show.

``python docs/test_documents.py docs/tutorials/*.md`` runs these pages and writes what they print, and their pictures.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import precond

ROOT = Path(__file__).resolve().parents[1]
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


OPTIONAL = ("lightning", "accelerate", "transformers", "timm", "skorch", "sklearn", "matplotlib")


@contextlib.contextmanager
def module(name: str):
    """A module of its own for a page's code, so that dataclasses and pickling find it; what needs a package that is absent is skipped."""
    made = types.ModuleType(re.sub(r"\W", "_", f"document_{name}_{id(object())}"))
    sys.modules[made.__name__] = made
    try:
        yield made.__dict__
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            pytest.skip(f"{error.name} is not installed")
        raise
    finally:
        del sys.modules[made.__name__]
        if "matplotlib.pyplot" in sys.modules:  # the next page draws on a figure of its own
            sys.modules["matplotlib.pyplot"].close("all")


def run(name: str, *codes: str) -> dict:
    with module(name) as names:
        for code in codes:
            exec(compile(code, name, "exec"), names)
    return names


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
    listed = set(re.findall(r"^   ([\w.]+)$", (ROOT / "docs/api.rst").read_text(encoding="utf-8"), re.MULTILINE))
    classes = {f"optim.{name}" for name in precond.optim.__all__}
    assert classes <= listed
    assert {name for name in precond.__all__ if f"optim.{name}" not in classes} - {"RECIPES", "optim"} <= listed


@pytest.mark.parametrize("page", ["capture", "coordinates", "curvature", "layers", "models", "neurons", "normalization"])
def test_page(page):
    run(page, *(code for blocks in sections(f"docs/{page}.md").values() for _, code in blocks))


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    run(path.name, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs/trainers").iterdir()))
def test_trainer(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, *(code for blocks in sections(f"docs/trainers/{page}").values() for _, code in blocks))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_document(document):
    for heading, blocks in sections(document).items():
        run(f"{document}: {heading}", *(code for _, code in blocks))


CONTRIBUTED = {
    "TensorRMS": "A preconditioner in one file",
    "RowRoot": "With work now and then",
    "RowBasis": "With work now and then",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_contributed_classes_in_each_dtype(dtype):
    """They train in each, and the momentum in a basis is the one beside it."""
    ends = {}
    for name, heading in CONTRIBUTED.items():
        names = run(heading, *(code for _, code in sections("CONTRIBUTING.md")[heading]))
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3))).to(dtype)
        x, losses = torch.randn(32, 6, dtype=dtype), []
        optimizer = precond.PreconditionedGD(model, lr=0.01, preconditioner=names[name](), momentum=precond.Momentum(0.9))
        for _ in range(25):
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        kept = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
        assert {t.dtype for t in kept} == {torch.float32 if dtype is torch.bfloat16 else dtype}
        ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    # 25 steps whose maps differ by rounding of eigenvectors; of bfloat16 parameters by a rounding of the last step that went the other way.
    rtol = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ends["RowBasis"], ends["RowRoot"], rtol=rtol, atol=rtol)


# A block of code, and beneath it what it prints.
SHOWN = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def executed(path: Path) -> list[str]:
    """What each block of a page prints; the blocks of a page share their names."""
    printed = []
    with module(path.stem) as names:
        for block in SHOWN.finditer(path.read_text(encoding="utf-8")):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block["code"], path.name, "exec"), names)
            printed.append("".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines()))
    return printed


def write(path: Path) -> None:
    """Put what a page's code prints beneath it. Pictures are written into the page's folder."""
    path = path.resolve()
    with contextlib.chdir(path.parent):
        printed = iter(executed(path))

    def shown(block: re.Match) -> str:
        out = next(printed)
        return f"```python\n{block['code']}```" + (f"\n\n```text\n{out}```" if out else "")

    path.write_text(SHOWN.sub(shown, path.read_text(encoding="utf-8")), encoding="utf-8")


# A quantity that was measured: a ratio, a share, a time, memory.
FIGURE = re.compile(
    r"\d (?:times|ms|µs|seconds?|minutes|MiB|GiB)\b|\d ?%|×\s?\d|\d of (?:its|AdamW's|\d+ (?:cases|tasks|seeds))\b"
    r"|\b0\.\d+ of (?:its|the|AdamW's)\s"
)
COMMAND = re.compile(
    r"\b(?:python (?:benchmarks|tests|docs)/|precond (?:bench|compare|verify|diagnose|train|logistic|lr-range)\b|pytest |make )"
)
ONE_OFF = "one-off figures"


def prose(page: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"))


def test_a_figure_in_the_readme_has_its_source_beside_it():
    items = re.split(r"\n\n|\n(?=- )", prose("README.md"))
    claims = [item for item in items if FIGURE.search(item)]
    assert len(claims) >= 4
    assert [item for item in claims if not COMMAND.search(item) and not re.search(r"\]\(docs/[\w-]+\.md", item)] == []


MEASURED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", MEASURED)
def test_a_page_with_figures_names_commands_or_says_that_none_makes_them(page):
    text = prose(page)
    assert not FIGURE.search(text) or COMMAND.search((ROOT / page).read_text(encoding="utf-8")) or ONE_OFF in text


PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "docs/t*/*.md") for path in ROOT.glob(pattern))
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(path: Path) -> set[str]:
    """Of the headings, as pages of documentation and of repositories name them."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(str(path.relative_to(ROOT))))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(page):
    for file, anchor in LINK.findall(prose(str(page.relative_to(ROOT)))):
        # The gallery's pages are made of the examples when the documentation is built.
        made = re.sub(r"^(?:\.\./)?gallery/(\w+)\.rst$", r"/examples/\1.py", file)
        to = ROOT / made[1:] if made != file else page.parent / file if file else page
        assert to.exists() or file.endswith("gallery/index.rst"), f"{file} is not there"
        assert not anchor or anchor in anchors(to.resolve()), f"{file}#{anchor} is not there"


TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
def test_tutorial(path, tmp_path, monkeypatch):
    """The words that are shown, and the numbers within a fifth: other processors sum in other orders, and trainings part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    blocks = list(SHOWN.finditer(path.read_text(encoding="utf-8")))
    for block, printed in zip(blocks, executed(path), strict=True):
        shown = block["printed"] or ""
        assert NUMBER.sub("#", " ".join(printed.split())) == NUMBER.sub("#", " ".join(shown.split()))
        for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
            assert float(ours.replace(",", "")) == pytest.approx(float(theirs.replace(",", "")), rel=0.2, abs=0.02)


def test_tutorials_say_where_to_go():
    for path in TUTORIALS:
        assert path.read_text(encoding="utf-8").count("\n## Where to go from here\n") == 1, path


if __name__ == "__main__":
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": str(ROOT / "docs/matplotlibrc"), "SOURCE_DATE_EPOCH": "0"}
    for argument in sys.argv[1:]:
        write(Path(argument))
