"""Kernels of whole layers where groups, batches and gradients vary: the steps of the reference engine, or a clear error."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import precond
from precond import BNP, L2, RMS, Auto, Momentum, Polar, PreconditionedGD, Whitening, decay_groups

AVERAGE = Momentum(0.9)
MAKERS: dict[str, Callable[..., PreconditionedGD]] = {
    "auto": lambda p, **more: precond.auto(p, 0.01, choice=Auto(whitening=Whitening(root="cholesky", every=4)), **more),
    "polar": lambda p, **more: PreconditionedGD(
        p, 0.01, preconditioner=Polar(3), momentum=AVERAGE, regularizers=[L2(0.1)], **more
    ),
    "bnp": lambda p, **more: precond.bnp(p, 0.01, weight_decay=0.1, **more),
    "adamw in BNP's coordinates": lambda p, **more: precond.adamw(p, 0.01, inputs=BNP(), **more),
    "adamw in whitened coordinates": lambda p, **more: precond.adamw(p, 0.01, inputs=Whitening(every=4), **more),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def trained(
    make: Callable[[nn.Module], PreconditionedGD], sizes: list[int], before: Callable[..., None] = lambda *_: None
) -> Any:
    model = net()
    optimizer, generator = make(model), torch.Generator().manual_seed(1)
    for t, n in enumerate(sizes):
        x = torch.randn(n, 5, generator=generator).double() * 3 + 1
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(0, 3, (n,), generator=generator)).backward()
        before(t, model, optimizer)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


DIFFER: dict[str, Callable[[PreconditionedGD, int], None]] = {
    "decay": lambda o, t: None,
    "learning rates": lambda o, t: o.param_groups[1].update(lr=0.002 * t),
    "sign": lambda o, t: o.param_groups[1].update(maximize=True),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("differ", DIFFER)
def test_a_layer_whose_bias_is_in_another_group(name: str, differ: str) -> None:
    """Kernels take one learning rate, one decay and one sign for a layer: where they differ its leaves must have their own."""
    ends = [
        trained(
            lambda m, engine=engine: MAKERS[name](decay_groups(m, 0.5 if differ == "decay" else 0.0), engine=engine),
            [16] * 6,
            lambda t, _, o: DIFFER[differ](o, t),
        )[0]
        for engine in ("auto", "loop")
    ]
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sizes", [[16, 16, 9, 16, 1, 1, 16, 1, 16, 16, 16], [1] * 11, [1, 1, 16, 1, 16, 16, 1]], ids=str)
def test_where_the_outer_map_is_the_identity_for_a_step(sizes: list[int]) -> None:
    """One sample has no covariance: P₁ is then the identity, whatever root was made before, and comes back without a new one."""
    outers = (Whitening(decay=0.0, every=4), Whitening(every=4), BNP(decay=0.0))
    for outer, inner in product(outers, (Polar(10), RMS())):
        ends = [
            trained(
                lambda m, engine=engine, P=outer @ inner: PreconditionedGD(
                    m, 0.01, preconditioner=P, momentum=AVERAGE, engine=engine
                ),
                sizes,
            )[0]
            for engine in ("auto", "loop")
        ]
        torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_and_parameters_that_come_and_go(name: str) -> None:
    def before(t: int, model: nn.Sequential, _: PreconditionedGD) -> None:
        model[0].bias.requires_grad_(t not in (3, 4, 5))
        model[2].weight.requires_grad_(t not in (6, 7))
        for p in model.parameters():
            if not p.requires_grad:
                p.grad = None
        if t % 3 == 1:
            model[2].bias.grad = None
        if t == 9:
            model[0].weight.grad = None

    ends = [
        trained(lambda m, engine=engine: MAKERS[name](m, engine=engine), [16] * 12, before)[0] for engine in ("auto", "loop")
    ]
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_state_that_starts_later_is_measured_when_it_starts(engine: str) -> None:
    """A frozen bias leaves a narrower matrix, whose root and length begin anew, in a step that is no first one."""
    layer = nn.Linear(3, 8)
    with torch.no_grad():
        layer.weight.mul_(100)
    optimizer = PreconditionedGD(layer, 1e-6, preconditioner=Polar(50), momentum=AVERAGE, engine=engine)
    for t in range(6):
        layer.bias.requires_grad_(t < 5)
        layer.weight.grad, layer.bias.grad = torch.randn(8, 3), torch.randn(8) if t < 5 else None
        optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["root"].shape == (3, 3) and state["gram"].trace() > 0.99
    torch.testing.assert_close(state["length"], layer.weight.detach().norm() / 8**0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("limits", [(2, 5), (5, 2)], ids=str)
def test_groups_that_disagree_on_blocks_are_refused(limits: tuple[int, int]) -> None:
    """With another ``max_dim`` for the bias than for the weight it would be stepped twice, or never."""
    model = nn.Linear(4, 3)
    optimizer = PreconditionedGD(decay_groups(model, 0.1), 0.1, preconditioner=Polar(), momentum=AVERAGE)
    for group, limit in zip(optimizer.param_groups, limits, strict=True):
        group["polar.max_dim"] = limit
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"'bias'.*max_dim.*one value"):
        optimizer.step()


def test_the_table_tells_of_each_group_and_of_what_is_stepped() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    optimizer = precond.auto([{"params": model[:2]}, {"params": model[2], "auto.max_inputs": 2}])
    rows = {row.name: row for row in optimizer.explain().rows}
    first, second, third = (
        [r for r in rows.values() if r.shape in s] for s in ([(7, 5), (7,)], [(3, 7), (3,)], [(2, 3), (2,)])
    )
    assert [r.why for r in first] == ["", "no matrix"] and [r.why for r in second] == ["7 inputs"] * 2
    assert [r.why for r in third] == ["3 inputs are too many to whiten"] * 2


def test_the_table_writes_a_tied_layer_as_it_is_chosen() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    (row, *_) = precond.auto(Tied()).explain().rows
    assert row.preconditioner.startswith("Whitening(root='cholesky'") and "Part(" not in row.preconditioner


def test_auto_takes_the_momentum_that_polar_has() -> None:
    own = Momentum(0.5, "heavy_ball", dampening=0.5)
    optimizer = precond.auto(net(), choice=Auto(polar=Polar(momentum=own)))
    assert all(cell.momentum == own for cell in optimizer._bound.cells)


def test_auto_warns_of_a_frozen_rest() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for p in model[0].parameters():
        p.requires_grad_(False)
    with pytest.warns(UserWarning, match="no layer that it knows"):
        precond.auto(model)


def test_16_bit_parameters_are_measured_in_32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 4).bfloat16()
    with torch.no_grad():
        layer.weight.mul_(40)
    x = torch.randn(8, 300).bfloat16()
    wanted = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().float().norm() / 2
    optimizer = PreconditionedGD(layer, 0.01, preconditioner=Polar(), momentum=AVERAGE, rounding="kahan")
    layer(x).float().square().mean().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert {state[k].dtype for k in ("gram", "root", "norm", "length", "m")} == {torch.float32}
    torch.testing.assert_close(state["length"], wanted, rtol=1e-5, atol=0)
