"""Blocks alike, side by side, take the steps that each takes alone: every configuration, on a model whose layers repeat."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import precond
from contract.table import EVERY, closure, flat
from precond.optim.blocks import Stack
from precond.optim.engine import plan

each = pytest.mark.parametrize("name", EVERY)
TOLERANCE = 1e-9
"""Of float64: products of several matrices at once are summed in another order, which 12 steps of an eigenbasis or a root enlarge."""


class Repeated(nn.Module):
    """Layers of the same and of other shapes, some with a bias and some without, convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.bare = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.first, self.head = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.expand(-1, 4, -1, -1)
        for conv in self.convs:
            x = x + torch.tanh(conv(x))
        x = self.first(x.flatten(1))
        for k, layer in enumerate(self.inner):
            x = x + torch.tanh(layer(self.norms[k % 2](x)))
        for layer in self.bare:
            x = x + layer(x).tanh()
        return self.head(x)


def model() -> Repeated:
    torch.manual_seed(0)
    return Repeated().double()


def data(count: int):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 1, 4, 4, generator=generator, dtype=torch.float64) + 0.3, torch.randint(3, (12,), generator=generator))
        for _ in range(count)
    ]


def train(net: nn.Module, optimizer, batches, change=None) -> None:
    for t, batch in enumerate(batches):
        torch.manual_seed(100 + t)
        if change is _frozen:
            change(net, t)
        run = closure(net, optimizer, batch)

        def changed(run=run, t=t):
            loss = run()
            if change is _missing:
                change(net, t)
            return loss

        optimizer.step(changed)


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer has a kernel of its own, as on an accelerator."""
    monkeypatch.setattr(plan, "has_kernel", lambda P, block: False)


def _missing(net: Repeated, t: int) -> None:
    if t in (2, 3, 7):
        net.inner[1].weight.grad = net.inner[1].bias.grad = None
    if t == 5:
        net.convs[0].bias.grad = None
    if t >= 6:
        net.bare[1].weight.grad = None


def _frozen(net: Repeated, t: int) -> None:
    for p in (*net.inner[2].parameters(), net.convs[1].weight):
        p.requires_grad_(not 3 <= t < 7)
        p.grad = None


def trained(name: str, engine: str, change, start: float = 1.0) -> torch.Tensor:
    net = model()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(start)
    train(net, EVERY[name](net, engine=engine), data(12), change)
    return flat(net)


TURNS_ON_ROUNDING = {"SOAP, SAM in z, heavy ball"}
"""Bases that are refreshed in each second step, from perturbed gradients whose eigenvalues cross."""
CHANGES = {"": None, "gradients are missing": _missing, "frozen and thawed": _frozen}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@each
def test_side_by_side_as_alone(name, change, side_by_side):
    ours, alone = (trained(name, engine, change) for engine in ("auto", "loop"))
    distance = (ours - alone).norm() / (alone - flat(model())).norm()
    if name in TURNS_ON_ROUNDING and distance > TOLERANCE:  # no further than what starts of other last bits make of it
        others = [(trained(name, "loop", change, start=1 + e) - alone).norm() for e in (1e-15, -1e-15, 2e-15, 4e-15)]
        distance /= 10 * max(others) / (alone - flat(model())).norm() / TOLERANCE
    assert distance <= TOLERANCE


@each
def test_resumed_in_the_midst_of_a_period(name, side_by_side):
    net = model()
    optimizer = EVERY[name](net)
    train(net, optimizer, data(5))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    train(net, optimizer, data(12)[5:])
    again = model()
    again.load_state_dict(weights)
    resumed = EVERY[name](again)
    resumed.load_state_dict(saved)
    train(again, resumed, data(12)[5:])
    assert torch.equal(flat(again), flat(net))


def test_layers_alike_are_one_stack(side_by_side):
    optimizer = EVERY["muon"](model())
    sizes = sorted(len(cell.block.members) for cell in optimizer._bound.cells if isinstance(cell.block, Stack))
    assert sizes == [1, 1, 3, 6]  # of muon's matrices: the first, the head, the convolutions, and all (6, 6)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]


@pytest.mark.parametrize("bound", [None, 1.0])
def test_layers_whose_kernels_a_bound_rules_out_are_stacked(bound):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
    optimizer = precond.auto(net, max_norm=bound)
    sizes = [len(cell.block.members) for cell in optimizer._bound.cells if isinstance(cell.block, Stack)]
    assert max(sizes, default=1) == (1 if bound is None else 6)


@pytest.mark.parametrize("inside, enough", [(False, 8), (True, 4)])
def test_small_layers_alike_that_have_kernels_are_one_stack_where_they_are_enough(inside, enough):
    def run(count: int, width: int, engine: str) -> tuple[list[int], torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(width, width) for _ in range(count))).double()
        options = {"lr": 1e-3, "engine": engine}
        optimizer = precond.adamw(net, inputs=precond.BNP(), **options) if inside else precond.bnp(net, momentum=0.9, **options)
        x = torch.randn(16, width, generator=torch.Generator().manual_seed(1)).double()
        for _ in range(5):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
        members = [len(cell.members) for cell in optimizer.cells if isinstance(cell.block, Stack)]
        return members, torch.cat([p.detach().flatten() for p in net.parameters()])

    (members, together), (_, reference) = run(enough, 6, "auto"), run(enough, 6, "loop")
    assert members == [enough]
    torch.testing.assert_close(together, reference, atol=TOLERANCE, rtol=0)
    assert run(enough - 1, 6, "auto")[0] == [] and run(enough, 96, "auto")[0] == []


class Passing(TorchDispatchMode):
    """Does what is asked for, as modes that count or print do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", [precond.soap, precond.shampoo, precond.adamw, precond.whitening])
def test_steps_below_a_dispatch_mode_are_those_without(recipe):
    """There multi-tensor operations leave the versions of tensors, and counts of steps are to be read anew all the same."""
    ends = []
    for context in (nullcontext, Passing):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer, x = recipe(model, lr=1e-2), torch.randn(8, 6)
        for _ in range(12):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with context():
                optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert {float(s["step"]) for s in optimizer.state.values()} == {12.0}
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
