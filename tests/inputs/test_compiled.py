"""Models under torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch

from inputs.test_observation import Net, X, check_same, make, step
from precond import BNP, PreconditionedGD

torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("given", ["model", "compiled"])
def test_compiled_models_are_seen(given, backend, fresh_compiler):
    torch.manual_seed(0)
    model = Net().double()
    model.body[3].p = 0.0
    compiled = torch.compile(model, backend=backend)
    optimizer = PreconditionedGD(model if given == "model" else compiled, lr=0.1, preconditioner=BNP())
    other = make()
    other[0].body[3].p = 0.0
    for _ in range(3):
        step(compiled, optimizer)
        step(*other)
    check_same((model, optimizer), other, exact=False)
    assert optimizer.state[model.body[0].weight]["count"].item() == 36
    assert [n for g in optimizer.param_groups for n in g["param_names"]] == [n for n, _ in model.named_parameters()]


def test_a_model_compiled_and_called_before_is_warned_of(fresh_compiler):
    torch.manual_seed(0)
    model = Net().double()
    compiled = torch.compile(model, backend="eager")
    compiled(X).sum().backward()
    optimizer = PreconditionedGD(compiled, lr=0.1, preconditioner=BNP())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(compiled, optimizer)
    seen = optimizer.state[model.stem.weight]["count"].item() == 12
    assert seen or any("compiled and called before" in str(w.message) for w in caught)
    assert not seen or not caught
