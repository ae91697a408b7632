"""Matrices side by side take the steps that each takes alone, and no step depends on rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import precond
from matrix import oracles
from precond import KFAC, SOAP, Momentum, PreconditionedGD, Shampoo
from precond.optim.blocks import memory
from precond.optim.blocks.turns import ahead, is_due, next_renewal, turns
from precond.optim.engine import plan
from precond.optim.preconditioners import eigenbases, rational
from precond.optim.preconditioners.kronecker import norms
from precond.optim.preconditioners.roots import inverse_root

RECIPES: dict[str, Callable[..., PreconditionedGD]] = {
    "soap": lambda m, **more: precond.soap(m, lr=0.01, precondition_frequency=3, **more),
    "soap, drift, one side": lambda m, **more: precond.soap(
        m, lr=0.01, precondition_frequency=2, drift=0.3, sides="smaller", factor_frequency=2, **more
    ),
    "soap, rank": lambda m, **more: precond.soap(m, lr=0.01, precondition_frequency=3, rank=1, **more),
    "soap, nesterov": lambda m, **more: PreconditionedGD(
        m, 0.01, preconditioner=SOAP(every=3), momentum=Momentum(0.9, "nesterov"), **more
    ),
    "shampoo": lambda m, **more: precond.shampoo(m, lr=0.01, precondition_frequency=3, **more),
    "shampoo, tiles, sums": lambda m, **more: precond.shampoo(
        m, lr=0.01, precondition_frequency=3, block_size=4, shampoo_beta=-1, graft="adagrad", **more
    ),
    "shampoo, newton": lambda m, **more: precond.shampoo(
        m, lr=0.01, precondition_frequency=2, method="newton", graft="sgd", matrix_eps=1e-4, **more
    ),
    "shampoo, qr, no graft": lambda m, **more: precond.shampoo(
        m, lr=0.01, precondition_frequency=3, method="qr", graft="none", matrix_eps=1e-2, **more
    ),
    "KFAC": lambda m, **more: PreconditionedGD(m, 0.01, preconditioner=KFAC(every=7, output_every=3), **more),
    "outputs": lambda m, **more: PreconditionedGD(m, 0.01, preconditioner=precond.OutputFactor(every=3), **more),
}
each = pytest.mark.parametrize("name", RECIPES)


def ragged() -> nn.Sequential:
    """Several layers of some shapes, one of others."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(8, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 5),
        nn.Linear(5, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 5),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).double()


def batch(t: int, n: int = 40) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(t)
    return torch.randn(n, 8, generator=make, dtype=torch.float64), torch.randint(0, 3, (n,), generator=make)


def trained(
    model: nn.Module, optimizer: PreconditionedGD, steps: range, before: Callable[[int, nn.Module], None] = lambda *_: None
) -> Tensor:
    for t in steps:
        optimizer.zero_grad()
        x, y = batch(t)
        F.cross_entropy(model(x), y).backward()
        before(t, model)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gaps(t: int, model: nn.Module) -> None:
    if t % 3 == 1:
        model[2].weight.grad = None
    if t % 4 == 2:
        model[0].bias.grad = model[8].weight.grad = None


def freezing(t: int, model: nn.Module) -> None:
    model[2].weight.requires_grad_(t not in (3, 4, 5, 6))
    for p in model.parameters():
        if not p.requires_grad:
            p.grad = None


@pytest.mark.parametrize("before", [lambda *_: None, gaps, freezing], ids=["all", "gaps", "freezing"])
@each
def test_a_stack_is_its_members_one_by_one(name, before, monkeypatch):
    """In stacks of one each, by kernels, and by the reference."""
    model = ragged()

    def end(**options: str) -> tuple[PreconditionedGD, Tensor]:
        mine = copy.deepcopy(model)
        optimizer = RECIPES[name](mine, **options)
        return optimizer, trained(mine, optimizer, range(11), before)

    with monkeypatch.context() as patched:
        patched.setattr(plan, "has_kernel", lambda *_: False)  # on a processor, too
        stacked, expected = end()
        patched.setattr(memory, "CACHED", 0)
        _, found = end()
    assert name == "KFAC" or max(len(c.members) for c in stacked._bound.cells if c.handled) > 1
    # What 11 steps make of rounding: KFAC's inverses of damped factors multiply 2e-16 by condition numbers up to 1e6 and more.
    bound = 1e-9 if name == "KFAC" else 1e-10
    for one in (found, end(engine="auto")[1], end(engine="loop")[1]):
        torch.testing.assert_close(one, expected, rtol=10 * bound, atol=bound)


@pytest.mark.parametrize("at", [1, 4, 8])
@each
def test_a_resumed_run_refreshes_when_the_original_does(name, at, monkeypatch):
    """In the midst of a period."""
    monkeypatch.setattr(plan, "has_kernel", lambda *_: False)
    model = ragged()
    optimizer = RECIPES[name](model)
    trained(model, optimizer, range(at))
    other = copy.deepcopy(model)
    resumed = RECIPES[name](other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(trained(model, optimizer, range(at, 12)), trained(other, resumed, range(at, 12)))


def test_matrices_take_turns_by_their_shapes():
    p = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    assert turns([p(4, 3), p(4), p(2, 3, 1, 1), p(4, 3), p(3, 4), p(0, 3)]) == [0, 0, 1, 0, 2, 0]
    assert turns([p(1000, 1000)] * 5 + [p(8, 8)]) == [0, 0, 1, 1, 2, 3]  # squares of two sides fit into 64 MiB twice
    assert turns([p(8, 2)] * 8) == [
        0,
        0,
        0,
        0,
        1,
        1,
        1,
        1,
    ]  # squares of four sides of 8 have twice as many entries as all of them
    assert [t for t in range(1, 9) if is_due(t, 4, 0)] == [4, 8] and [t for t in range(1, 9) if is_due(t, 4, 3)] == [1, 5]


def test_turns_are_far_apart_and_meet_only_where_there_are_more_than_steps():
    assert [ahead(turn, 64) for turn in range(6)] == [0, 32, 16, 48, 8, 40]
    assert [ahead(turn, 10) for turn in range(12)] == [
        0,
        5,
        2,
        7,
        1,
        6,
        3,
        8,
        4,
        9,
        0,
        5,
    ]  # 10/16 is 0 again and 50/16 is 3: passed by
    for every in (1, 2, 3, 7, 100):
        assert {ahead(turn, every) for turn in range(every)} == set(range(every))
    assert ahead(9, 10**12) < 10**12  # of a period that never ends nothing is listed


@pytest.mark.parametrize(
    ("turn", "every", "steps"),
    [
        (0, 24, {1, 2, 4, 8, 16, 24, 48, 72}),
        (1, 24, {1, 2, 3, 6, 12, 20, 36, 60}),  # half of a period before its end: of 3 and 4 before 3, of 17 to 24 before 20
        (3, 24, {1, 2, 3, 5, 10, 18, 30, 54}),
        (3, 1, set(range(1, 73))),
        (0, 6, {1, 2, 4, *range(6, 73, 6)}),
    ],
)
def test_renewals_are_dense_at_first_and_take_turns(turn, every, steps):
    assert {t for t in range(1, 73) if next_renewal(t, every, turn) == t} == steps
    assert all(next_renewal(t, every, turn) == min(s for s in steps if s >= t) for t in range(1, max(steps)))


def test_refreshes_fall_on_different_steps():
    model = ragged()
    optimizer = precond.soap(model, precondition_frequency=5)
    changed: dict[int, set[tuple[int, ...]]] = {}
    kept = {}
    for t in range(1, 16):
        trained(model, optimizer, range(t, t + 1))
        for p in model.parameters():
            if "left_basis" in optimizer.state[p]:
                basis = optimizer.state[p]["left_basis"].clone()
                if p in kept and not torch.equal(basis, kept[p]):
                    changed.setdefault(t, set()).add(tuple(p.shape))
                kept[p] = basis
    shapes = {(8, 8): 0, (5, 8): 2, (8, 5): 1, (3, 5): 3}  # steps before the end of a period: 5·0, 5/2, 5/4, 15/4
    assert changed == {5 * k - j: {shape} for shape, j in shapes.items() for k in (1, 2, 3)}


HALVES: dict[str, Callable[..., PreconditionedGD]] = {
    "every 10": lambda m, **more: precond.soap(m, lr=0.003, **more),
    "every 3": lambda m, **more: precond.soap(m, lr=0.003, precondition_frequency=3, **more),
    "rank": lambda m, **more: precond.soap(m, lr=0.003, precondition_frequency=5, rank=4, **more),
    "one side": lambda m, **more: precond.soap(m, lr=0.003, precondition_frequency=5, sides="smaller", **more),
    "shampoo": lambda m, **more: precond.shampoo(m, lr=0.003, precondition_frequency=5, **more),
}


@pytest.mark.parametrize(("n", "engine"), [(2, "auto"), (4, "auto"), (12, "auto"), (4, "loop")])
@pytest.mark.parametrize("kind", ["tanh", "relu", "conv"])
@pytest.mark.parametrize("name", HALVES)
def test_a_batch_in_halves_or_in_another_order_is_that_batch(name, kind, n, engine):
    """Fewer samples than rows leave factors of rank n: eigenvectors of their null spaces are arbitrary, and bases must not be.

    ReLU's zeros leave exact ones. What remains is Adam's own: gradients that are rounding alone are divided by ε, here 1e-3 for ReLU.
    """

    def net() -> nn.Module:
        torch.manual_seed(0)
        if kind == "conv":
            layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)]
        else:
            act = nn.Tanh if kind == "tanh" else nn.ReLU
            layers = [nn.Flatten(), nn.Linear(64, 32), act(), nn.Linear(32, 32), act(), nn.Linear(32, 5)]
        return nn.Sequential(*layers).double()

    ends = []
    for order in ("whole", "halves", "turned"):
        model = net()
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = HALVES[name](model, engine=engine)
        if kind != "tanh" and name != "shampoo":
            optimizer.param_groups[0]["eps"] = 1e-3
        for t in range(20 if name == "every 10" else 12):  # two periods
            make = torch.Generator().manual_seed(t)
            x = torch.randn(n, 1, 8, 8, generator=make, dtype=torch.float64)
            y = torch.randint(0, 5, (n,), generator=make)
            optimizer.zero_grad()
            parts = [slice(0, n // 2), slice(n // 2, n)] if order == "halves" else [slice(None)]
            if order == "turned":
                x, y = x.flip(0), y.flip(0)
            for part in parts:
                (F.cross_entropy(model(x[part]), y[part], reduction="sum") / n).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    away = [float((end - ends[0]).norm() / (ends[0] - start).norm()) for end in ends[1:]]
    assert max(away) <= 1e-10


def spectrum(*values: float, n: int, seed: int = 0) -> Tensor:
    """A symmetric matrix with some eigenvalues, the others 0."""
    make = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, len(values), generator=make, dtype=torch.float64)).Q
    return U * torch.tensor(values, dtype=torch.float64) @ U.T


def test_a_basis_is_completed_by_reflections():
    """Eigenvectors first, then what the product of reflections has: a function of their span, to rounding."""
    S = spectrum(5.0, 2.0, 1.0, n=7)
    make = torch.Generator().manual_seed(1)
    for noise in (0.0, 1e-15):
        E = noise * torch.randn(7, 7, generator=make, dtype=torch.float64)
        Q = torch.zeros(1, 7, 7, dtype=torch.float64)
        assert eigenbases.begin((S + E + E.T)[None], Q).all()
        U = torch.linalg.eigh(S)[1].flip(1)[:, :3]
        torch.testing.assert_close(Q[0], oracles.reflections(U), rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [0.25, 0.3, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_roots_without_eigenvalues(power, many, dtype):
    """What an accelerator takes, side by side: near the exact roots, λ_max of the damping being known to some percent."""
    eigenvalues = torch.logspace(0, -8, 12, dtype=torch.float64).tolist()
    S = torch.stack([s * spectrum(*eigenvalues, n=12, seed=k) for k, s in enumerate((1.0, 1e6, 1e-9))])
    found = rational.inverse_roots(S.to(dtype), power, 1e-4, 0.5, 2**19 if many else 0)
    for mine, matrix in zip(found, S, strict=True):
        exact = inverse_root(matrix / 0.5, power, 1e-4)
        assert exact is not None
        assert (mine - exact).norm() / exact.norm() < 0.02 * max(1.0, power)
    assert rational.inverse_roots(torch.zeros(1, 3, 3), power, 1e-4).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_any_size(dtype):
    large = 1e30 if dtype == torch.float32 else 1e300
    t = torch.tensor([[3.0, 4.0], [3 / large, 4 / large], [3 * large, 4 * large]], dtype=dtype)
    torch.testing.assert_close(norms(t), torch.tensor([5.0, 5 / large, 5 * large], dtype=dtype), rtol=1e-6, atol=0)
    assert not (norms(torch.zeros(1, 2, dtype=dtype)) > 0).any()


def test_the_steps_of_matrices_side_by_side_are_the_oracle_s():
    """Two matrices of one shape, with gradients of their own."""
    make = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(5, 4, generator=make, dtype=torch.float64)  # noqa: E731
    starts, params = [draw(), draw()], []
    params = [nn.Parameter(s.clone()) for s in starts]
    optimizer = PreconditionedGD(params, 0.1, preconditioner=Shampoo(damping=0.1, every=2))
    theirs = [oracles.Shampoo(5, 4, damping=0.1, every=2) for _ in params]
    ends = [s.clone() for s in starts]
    for _ in range(5):
        gradients = [draw(), draw()]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()
        for k, (oracle, g) in enumerate(zip(theirs, gradients, strict=True)):
            oracle.see(g)
            ends[k] = ends[k] - 0.1 * (oracle.M() @ g.reshape(-1)).view(5, 4)
    for p, end in zip(params, ends, strict=True):
        torch.testing.assert_close(p.detach(), end, rtol=1e-9, atol=1e-9)
