"""``precond diagnose`` and its page."""

from __future__ import annotations

import json
import re
import sys
import warnings
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.lab.cli.main import main
from precond.lab.report.diagnosis import render_diagnosis

FACTORIES = """
import torch
from torch import nn
from precond.analysis.curvature import Objective

def parts():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(50, 4) * torch.tensor([1e-3, 1.0, 10.0, 1e3])
    return model, nn.functional.cross_entropy, [(x, torch.randint(0, 2, (50,)))]

def objective():
    return Objective(*parts())

def with_optimizer():
    found = objective()
    return found, torch.optim.Adam(found.model.parameters(), lr=1e-3)

def nothing():
    return None

def data_set():
    model, loss, ((x, y),) = parts()
    return model, loss, torch.utils.data.TensorDataset(x, y)

def three():
    return 1, 2, 3

def fails():
    raise KeyError("column")

def wrong_later():
    model, loss_fn, [(x, y)] = parts()
    return model, loss_fn, [(x, y), (x[:, :3], y)]

def detached():
    model, loss_fn, data = parts()
    return model, lambda out, y: loss_fn(out.detach(), y), data

def wrong_targets():
    model, loss_fn, [(x, y)] = parts()
    return model, loss_fn, [(x, y.float())]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "factories_to_diagnose.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("factories_to_diagnose", None)


class Page(HTMLParser):
    """Collects what a page would load, and whether its elements are closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids = [], [], []
        self.feed(text)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag


def run(capsys, *argv):
    code = main(["diagnose", *argv])
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.mark.parametrize("target", ["factories_to_diagnose:parts", "factories_to_diagnose:objective", "wine"])
def test_table_page_and_numbers(target, folder, capsys):
    code, out, _ = run(capsys, target, "--out", "found", "--widths", "8")
    assert code == 0
    assert "Standardize the data" in out and "diagnosis.html" in out
    assert all(len(line) <= 80 for line in out.splitlines() if "optimizer =" not in line)
    numbers = json.loads((folder / "found" / "diagnosis.json").read_text())
    assert numbers["layers"][0]["drivers"]["spread"] > 100
    page = Page((folder / "found" / "diagnosis.html").read_text())
    assert page.open == [] and page.loads == []
    assert len(page.ids) == len(set(page.ids))


def test_an_optimizer_its_steps_and_curvature(folder, capsys):
    code, out, _ = run(capsys, "factories_to_diagnose:with_optimizer", "--steps", "3", "--curvature", "gauss_newton")
    assert code == 0 and "its P" in out and "unstable above" in out
    assert (folder / "runs" / "diagnose-factories_to_diagnose-with_optimizer" / "diagnosis.html").exists()
    code, out, _ = run(capsys, "factories_to_diagnose:with_optimizer")
    assert code == 0 and "its P" in out and "after 10 steps of a copy" in out.replace("\n  ", " ")
    code, out, _ = run(capsys, "wine", "--recipe", "adam(inputs=BNP())", "--steps", "4", "--model", "linear")
    assert code == 0 and "its P" in out


def test_the_same_every_time(folder, capsys):
    assert len({run(capsys, "wine", "--recipe", "adam", "--steps", "5")[1] for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere:f"], r"cannot import 'nowhere'.*PYTHONPATH"),
        (["factories_to_diagnose:objectiv"], r"has no 'objectiv'; did you mean 'objective'"),
        (["factories_to_diagnose:nothing"], r"must return an Objective, .* it returned a NoneType"),
        (["factories_to_diagnose:three"], r"it returned a tuple of \(int, int, int\)"),
        (["factories_to_diagnose:fails"], r"factories_to_diagnose:fails\(\) failed: KeyError"),
        (["factories_to_diagnose:wrong_targets"], r"wrong_targets: the loss of its first batch failed: RuntimeError: .*Long"),
        (["factories_to_diagnose:with_optimizer", "--recipe", "adam"], "leave --recipe out"),
        (["wines"], r"unknown data 'wines'; did you mean 'wine'"),
        (["wine", "--steps", "3"], "--steps needs an optimizer; give --recipe"),
        (["wine", "--lr", "3"], "--lr belongs to a recipe"),
        (["wine", "--recipe", "adam,sgd"], "--recipe takes one recipe, got 2"),
        (["wine", "--recipe", "adan"], r"unknown recipe 'adan'; did you mean"),
        (
            ["factories_to_diagnose:data_set"],
            r"data_set: data must be .*; a data set goes into torch\.utils\.data\.DataLoader$",
        ),
        (
            ["wine", "--recipe", "sgd", "--lr", "1e30", "--steps", "9"],
            "diverged at step .*; give a smaller --lr, or look at the data$",
        ),
        (
            ["wine", "--recipe", "soap", "--lr", "1e30", "--steps", "9"],
            "diverged at step .*; give a smaller --lr, or look at the data$",
        ),
        (["wine", "--samples", "0"], "samples must be > 0"),
        (["wine", "--steps", "-1"], "steps must be a finite number >= 0, got -1; give a number such as 10"),
    ],
)
def test_what_a_user_can_put_right(argv, message, capsys):
    code, _, err = run(capsys, *argv)
    assert code == 2 and re.search(message, err), err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_later", r"wrong_later: the loss of batch 1 failed: RuntimeError: mat1"),
        ("detached", "does not depend on the parameters"),
    ],
)
def test_short_trainings_refuse_what_diagnoses_refuse(name, message, capsys):
    for command in (["diagnose"], ["lr-range", "--steps", "2", "--ramp-steps", "5"]):
        code, err = main([command[0], f"factories_to_diagnose:{name}", *command[1:]]), capsys.readouterr().err
        assert code == 2 and re.search(message, err), err


def test_without_an_optimizer_the_page_says_what_it_compares_with(folder, capsys):
    run(capsys, "factories_to_diagnose:parts", "--no-rates", "--out", "out")
    facts = json.loads((folder / "out" / "diagnosis.json").read_text())["facts"]
    assert facts["optimizer"] == "gradient descent with momentum 0.9, as none is given"


def test_text_is_escaped():
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(3, 2))
    objective = Objective(model, nn.functional.mse_loss, [(torch.randn(20, 3) + 90, torch.randn(20, 2))])
    text = render_diagnosis(diagnose(objective), "<i>", {"<u>": "&"})
    assert "<b>" not in text and "<i>" not in text and "<u>" not in text and "&lt;b&gt;" in text


def test_names_that_are_long_leave_room_for_figures():
    model = nn.Sequential()
    model.add_module("encoder_" * 12 + "last", nn.Linear(3, 2))
    objective = Objective(model, nn.functional.mse_loss, [(torch.randn(20, 3) + 90, torch.randn(20, 2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit
        text = render_diagnosis(diagnose(objective), "", {})
    assert re.search(r"<text[^>]*>…[a-z_]*_last</text>", text)


def test_dots_go_below_names_where_their_card_is_narrow():
    """A card may be narrow in a wide window, beside another."""
    objective = Objective(nn.Linear(3, 2), nn.functional.mse_loss, [(torch.randn(20, 3), torch.randn(20, 2))])
    text = render_diagnosis(diagnose(objective), "", {})
    assert re.search(r"\.chart \{ container-type: inline-size; \}", text) and '<div class="chart"><div class="dots">' in text
    assert re.search(r"@container \(max-width: \d+px\) \{[^}]*\.dots \{ grid-template-columns", text)


def test_nothing_to_show_is_a_page_too():
    objective = Objective(nn.PReLU(), lambda out, y: out.square().mean(), [(torch.randn(5, 4, 3), torch.zeros(5))])
    text = render_diagnosis(diagnose(objective), "PReLU", {})
    assert "No layer was diagnosed" in text and "no layer of a kind whose inputs are diagnosed" in text
