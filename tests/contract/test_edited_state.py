"""State that a user empties, replaces or edits between two steps: the next step goes on from what is there then, as torch's does."""

from __future__ import annotations

import copy
import io
from collections import defaultdict

import pytest
import torch
from torch import nn

import precond

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
MAKERS = {**precond.RECIPES, "SAM": lambda m: precond.adamw(m, regularizers=[precond.SAM(0.01)])}


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        x = X[t % 4 * 16 :][:16].to(next(model.parameters()).dtype)

        def loss(x=x):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :3]).square().mean()
            loss.backward()
            return loss

        optimizer.step(loss)


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def empty(optimizer):
    optimizer.state.clear()


def replace(optimizer):
    optimizer.state = defaultdict(dict)


def delete(optimizer):
    for p in list(optimizer.state):
        del optimizer.state[p]


def put_nothing(optimizer):
    for p in optimizer.state:
        optimizer.state[p] = {}


def pop(optimizer):
    for entries in optimizer.state.values():
        for key in list(entries):
            entries.pop(key)


@pytest.mark.parametrize("reset", [empty, replace, delete, put_nothing, pop])
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_reset_starts_anew(name, reset):
    model = fresh()
    optimizer = MAKERS[name](model)
    run(model, optimizer, range(5))
    other = copy.deepcopy(model)
    precond.unhook(other)
    anew = MAKERS[name](other)
    reset(optimizer)
    for m, o in ((model, optimizer), (other, anew)):
        run(m, o, range(5, 9))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    ours, theirs = optimizer.state_dict()["state"], anew.state_dict()["state"]
    assert {k: sorted(v) for k, v in ours.items()} == {k: sorted(v) for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("name", "key"), [("adam", "exp_avg"), ("adam", "step"), ("sgd", "momentum_buffer"), ("adagrad", "sum")]
)
def test_what_is_put_there_is_gone_on_from_and_saved(name, key):
    """As torch's optimizer of that name does."""
    options = {"momentum": 0.9} if name == "sgd" else {}
    # From a momentum of 2 numbers go far, and float32 shows in what order they were added.
    model, twin = fresh().double(), fresh().double()
    ours = precond.RECIPES[name](model, lr=0.1, **options)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[name]
    theirs = kind(twin.parameters(), lr=0.1, **options)
    for m, o in ((model, ours), (twin, theirs)):
        run(m, o, range(3))
        for entries in o.state.values():
            entries[key] = torch.full_like(entries[key], 2.0)
        run(m, o, range(3, 6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(ours.state[p][key], theirs.state[q][key].to(ours.state[p][key].dtype))


def test_a_look_binds_nothing_anew_and_copies_are_plain():
    model = fresh()
    optimizer = precond.adam(model)
    run(model, optimizer, range(2))
    before = optimizer.cells
    dict(optimizer.state), [sorted(e) for e in optimizer.state.values()], optimizer.state[torch.ones(1)]
    run(model, optimizer, range(2, 3))
    assert optimizer.cells is before
    made = copy.deepcopy(optimizer.state)
    assert type(made) is defaultdict and {type(e) for e in made.values()} == {dict}
    assert copy.copy(optimizer.state) == (optimizer.state | {}) == optimizer.state
    buffer = io.BytesIO()
    torch.save([dict(e) for e in optimizer.state.values()] + list(map(copy.copy, optimizer.state.values())), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
