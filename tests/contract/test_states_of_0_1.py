"""State dicts that version 0.1 wrote: seven steps of each recipe, and where three more led.

A network 5-4-4-2 on twelve samples; ``states-0.1.pt.gz`` holds what that version saved.
"""

import gzip
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import precond

SAVED = torch.load(io.BytesIO(gzip.decompress(Path(__file__).with_name("states-0.1.pt.gz").read_bytes())), weights_only=True)
MAKE = {
    "sgd, momentum": lambda model: precond.sgd(model, lr=0.01, momentum=0.9),
    "soap, rank 2": lambda model: precond.soap(model, lr=0.01, rank=2),
    "adam behind BNP": lambda model: precond.adam(model, lr=0.01, inputs=precond.BNP()),
}
ANOTHER = {"soap", "soap, rank 2", "shampoo", "whitening", "auto"}
"""Whose steps are others than in 0.1: bases and roots are renewed in turns."""


@pytest.mark.parametrize("name", SAVED)
def test_goes_on_from_it(name):
    saved = SAVED[name]
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model.load_state_dict(saved["model"])
    optimizer = MAKE[name](model) if name in MAKE else getattr(precond, name)(model, lr=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, before in saved["optimizer"]["state"].items():
        now = optimizer.state[params[i]]
        assert before.keys() <= now.keys()
        assert all(torch.equal(torch.as_tensor(value).reshape(now[key].shape), now[key]) for key, value in before.items())

    x, y = torch.linspace(-1, 1, 60).view(12, 5).sin(), torch.arange(12) % 2
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    way = [model.state_dict()[key] - value for key, value in saved["model"].items()]
    off = [model.state_dict()[key] - value for key, value in saved["after"].items()]
    length, error = (float(torch.cat([t.flatten() for t in ts]).norm()) for ts in (way, off))
    # Rounding in float32, of sums in other orders; Muon's products are in 16 bits where the processor has instructions for them.
    assert error < {"muon": 0.1}.get(name, 1e-4) * length or name in ANOTHER
    assert error < 2 * length


def test_directions_that_0_1_did_not_count_are_all():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = precond.auto(model)
    optimizer.load_state_dict(SAVED["auto"]["optimizer"])
    ranks = {key: value.item() for key, value in optimizer.state[model[2].weight].items() if key.endswith("rank")}
    assert ranks == {"inner.rank": 4.0}
