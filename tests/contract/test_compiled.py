"""torch.compile of a step, and models that are compiled, exported, traced or scripted while an optimizer lives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from contract.table import flat
from precond import SAM

MAKERS = {**precond.RECIPES, "SAM": lambda m: precond.adamw(m, regularizers=[SAM(0.01)])}
X = torch.randn(6, 16, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MAKERS)
def test_a_compiled_step_is_the_step(name):
    ends = []
    for compiled in (False, True):
        model = net()
        optimizer = MAKERS[name](model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for x in X:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            while optimizer.probe():
                model(x).square().mean().backward()
            step()
            scheduler.step()
        ends.append(flat(model))
    assert torch.equal(*ends)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # none for each learning rate, say


@pytest.mark.parametrize("name", ["adamw", "auto"])
def test_a_compiled_training_step(name):
    ends = []
    for compiled in (False, True):
        model = net()
        optimizer = MAKERS[name](model)

        def train(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        run = torch.compile(train, backend="eager") if compiled else train
        for x in X:
            run(x)
        ends.append(flat(model))
    torch.testing.assert_close(*ends)


USES = {
    "fullgraph, evaluating": lambda m: torch.compile(m.eval(), backend="eager", fullgraph=True)(X[0]),
    "strict export": lambda m: torch.export.export(m.eval(), (X[0],), strict=True),
    "strict export, training": lambda m: torch.export.export(m.train(), (X[0],), strict=True),
    "export, training": lambda m: torch.export.export(m.train(), (X[0],), strict=False),
    "traced": lambda m: torch.jit.trace(m.train(), (X[0],)),
}
CLOSED = {
    "fullgraph": (lambda m: torch.compile(m.train(), backend="eager", fullgraph=True)(X[0]), torch._dynamo.exc.Unsupported),
    "scripted": (torch.jit.script, AttributeError),
}
HOOKED = {"SAM": MAKERS["SAM"], "bnp": MAKERS["bnp"], "auto": MAKERS["auto"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_stay_out_of_graphs(name, use):
    model = net()
    optimizer = HOOKED[name](model)
    USES[use](model)
    model.train()

    def run():
        optimizer.zero_grad()
        loss = model(X[0]).square().mean()
        loss.backward()
        return loss

    start = flat(model)
    optimizer.step(run)
    assert flat(model).isfinite().all() and not torch.equal(flat(model), start)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("use", CLOSED)
@pytest.mark.parametrize("name", HOOKED)
def test_where_hooks_cannot_go_the_error_says_close(name, use):
    model = net()
    optimizer = HOOKED[name](model)
    run, error = CLOSED[use]
    with pytest.raises(error, match=r"call optimizer\.close\(\) first"):
        run(model)
    torch._dynamo.reset()
    optimizer.close()
    run(model)
