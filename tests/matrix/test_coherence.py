"""Steps in proportion to the root of the coherence of momentum, against sums over the history of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from precond import BNP, Momentum, Muon, Polar, PreconditionedGD, Schatten, Whitening
from precond.optim.blocks import Block, Leaf, Stack, State

BETA, RHO, STEPS = 0.8, 0.7, 6
AVERAGES = {
    "ema": Momentum(BETA, lengths=RHO),
    "heavy_ball": Momentum(BETA, "heavy_ball", dampening=BETA, lengths=RHO),
    "nesterov": Momentum(BETA, "nesterov", dampening=BETA, lengths=RHO),
    "nesterov of sums": Momentum(BETA, "nesterov", lengths=RHO),
    "first gradient": Momentum(BETA, start="first_gradient", lengths=RHO),
}
SHAPES = ((3, 4), (3,))


def history(scale=1.0, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [
        tuple((scale * torch.randn(s, generator=make, dtype=torch.float64)).to(dtype) for s in SHAPES) for _ in range(STEPS)
    ]


def oracle(kind, seen):
    """√min(1, ‖m̂‖/ḡ) after each step, by sums."""
    flat = [torch.cat([t.double().flatten() for t in a]) for a in seen]
    for t in range(1, len(flat) + 1):
        of_m = [BETA ** (t - s) for s in range(1, t + 1)]  # weights but for a factor
        if kind == "first gradient":
            of_m = [of_m[0], *((1 - BETA) * w for w in of_m[1:])]
        elif kind.startswith("nesterov"):
            of_m = [BETA * w for w in of_m[:-1]] + [1 + BETA]
        m = sum(w * a for w, a in zip(of_m, flat[:t], strict=True)) / sum(of_m)
        weights = [RHO ** (t - s) for s in range(1, t + 1)]
        square = sum(w * a.norm() ** 2 for w, a in zip(weights, flat[:t], strict=True)) / sum(weights)
        yield min(1.0, float(m.norm() / square.sqrt())) ** 0.5 if square else 0.0


def folded(momentum, states, each):
    for state in states:
        for step in state["step"]:
            step += 1
    momentum.fold_all(states, each)
    return [momentum.current(state, a) for state, a in zip(states, each, strict=True)]


def begun(momentum, block):
    return State(block, momentum.init(block), step=tuple(torch.zeros(()) for _ in block.leaves))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25, 0.0])
@pytest.mark.parametrize("kind", AVERAGES)
def test_stride_is_that_of_sums(kind, scale):
    momentum, dtype = AVERAGES[kind], torch.float64 if scale in (0.0, 1.0) else torch.float32
    block = Block(tuple(Leaf(str(i), torch.zeros(s, dtype=dtype)) for i, s in enumerate(SHAPES)))
    alone, (first, second) = begun(momentum, block), (begun(momentum, block) for _ in range(2))
    one, other = history(scale, dtype), history(scale, dtype, seed=1)
    tol = 1e-12 if dtype == torch.float64 else 1e-5  # rounding of float32, some tens of additions
    for a, b, c, d in zip(one, other, oracle(kind, one), oracle(kind, other), strict=True):
        (m,) = folded(momentum, [alone], [a])
        assert momentum.stride(alone, a, m).item() == pytest.approx(c, rel=tol)
        together = folded(momentum, [first, second], [a, b])
        assert momentum.strides([first, second], [a, b], together) == pytest.approx([c, d], rel=tol)


def test_of_a_stack_each_member_has_its_own():
    momentum = AVERAGES["nesterov"]
    members = [Block(tuple(Leaf(f"{k}.{i}", torch.zeros(s).double()) for i, s in enumerate(SHAPES))) for k in range(2)]
    stack = Stack.of(members)
    counts = tuple(torch.zeros(()) for _ in stack.all_leaves)
    state = State(
        stack, {"m": stack.zeros()} | {k: torch.zeros(2).double() for k in ("mean_length", "mean_weight")}, step=counts
    )
    seen = [history(), history(seed=1)]
    expected = zip(*(oracle("nesterov", of) for of in seen), strict=True)
    for a, b, c in zip(*seen, expected, strict=True):
        both = tuple(torch.stack(pair) for pair in zip(a, b, strict=True))
        for step in counts:
            step += 1
        momentum.fold(state, both)
        found = momentum.stride(state, both, momentum.current(state, both))
        torch.testing.assert_close(found, torch.tensor(c, dtype=torch.float64), rtol=1e-12, atol=0)


def test_agreeing_gradients_have_coherence_one_and_a_spike_no_more():
    momentum = AVERAGES["ema"]
    block = Block((Leaf("0", torch.zeros(3).double()),))
    state = begun(momentum, block)
    for scale in (1.0, 1.0, 1.0, 1e6):
        a = (torch.full((3,), scale).double(),)
        (m,) = folded(momentum, [state], [a])
        assert momentum.stride(state, a, m).item() == pytest.approx(1.0, rel=1e-12) or scale > 1
    assert momentum.stride(state, a, m).item() <= 1.0


PRECONDITIONERS = {
    "polar": Polar(),
    "muon": Muon(),
    "exact muon": Muon(root="eigh"),
    "schatten": Schatten(power=0.3),
    "whitening @ polar": Whitening() @ Polar(),
    "bnp @ polar": BNP() @ Polar(),
    "bnp @ muon": BNP() @ Muon(),
}


@pytest.mark.parametrize("alike", [1, 3])
@pytest.mark.parametrize("engine", ["loop", "auto"])
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_steps_are_as_long_as_gradients_agree(name, engine, alike):
    """Of one history of gradients, with the same maps: what is descended does not depend on how far was gone."""
    torch.manual_seed(0)
    inputs = [torch.randn(9, 4, dtype=torch.float64) for _ in range(STEPS)]
    gradients = [[torch.randn(4, 4, dtype=torch.float64) for _ in range(alike)] for _ in range(STEPS)]
    moved = {}
    for lengths in (None, RHO):
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(alike))).double()
        momentum = Momentum(BETA, "nesterov", dampening=BETA, lengths=lengths)
        optimizer = PreconditionedGD(model, lr=1e-9, preconditioner=PRECONDITIONERS[name], momentum=momentum, engine=engine)
        moved[lengths] = []
        for x, g in zip(inputs, gradients, strict=True):
            model(x)
            for layer, own in zip(model, g, strict=True):
                layer.weight.grad = own.clone()
            before = [layer.weight.detach().clone() for layer in model]
            optimizer.step()
            moved[lengths].append([layer.weight.detach() - b for layer, b in zip(model, before, strict=True)])
            stepped = optimizer.map().gram([layer.weight.grad for layer in model]) if lengths else ()
        assert all(torch.isfinite(t).all() for t in stepped)
    for k in range(alike):
        c = list(oracle("nesterov", [(g[k],) for g in gradients]))
        for t in range(STEPS):
            # Steps of 1e-9 on weights of size 1 are known to 1e-7 of them.
            torch.testing.assert_close(moved[RHO][t][k], c[t] * moved[None][t][k], rtol=1e-5, atol=1e-15)


def test_a_state_without_mean_lengths_goes_on():
    """Of a version that did not keep them: the mean begins anew, without a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = precond.auto(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key in ("mean_length", "mean_weight"):
            state.pop(key, None)
    other = precond.auto(model)
    other.load_state_dict(saved)
    other.step()
    kept = other.state[model[0].weight]
    assert kept["mean_weight"].item() == pytest.approx(0.05)
    assert kept["mean_length"] > 0


def test_lengths_out_of_range_raise():
    with pytest.raises(ValueError, match="lengths"):
        Momentum(0.9, lengths=1.0)
