"""Steps that are bent (cautious, of fixed norms, with floors and brakes) against the oracle, in p and in z, and what each promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oracle
import precond
import test_oracle as sweep
from precond import RMS, SOAP, Cautious, CautiousL2, Hyperball, Momentum, Muon, PreconditionedGD, RadialBrake, RowFloor
from precond.algebra.spaces import Stage

NAMES = ["identity", "diagonal", "rms", "dense", "dense@rms", "structured@rms", "route", "shampoo", "soap", "muon"]
JOINT = {"dense", "dense@rms", "structured@rms"}
"""What takes all parameters jointly, and has one length in z."""
ROWS = [*sweep.W.view(4, 3), *sweep.V.view(2, 4)]
MATRICES = torch.zeros(sweep.N, dtype=torch.float64)
MATRICES[torch.cat([sweep.W, sweep.V])] = 1.0

# name → (the library's, the oracle's) of a space and of what has a length there
BENDS = {
    "cautious": (lambda s: Cautious(space=s), lambda s, i: oracle.Cautious(1.0, s, pieces=sweep.TENSORS)),
    "cautious, half": (lambda s: Cautious(0.5, s), lambda s, i: oracle.Cautious(0.5, s, pieces=sweep.TENSORS)),
    "cautious decay": (lambda s: CautiousL2(0.2, s), lambda s, i: oracle.CautiousL2(0.2, s)),
    "brake": (lambda s: RadialBrake(0.7, s), lambda s, i: oracle.RadialBrake(0.7, s, MATRICES, pieces=i)),
    "brake, all": (lambda s: RadialBrake(space=s, where=None), lambda s, i: oracle.RadialBrake(1.0, s, pieces=i)),
    "floor": (lambda s: RowFloor(3.0, s), lambda s, i: oracle.RowFloor(3.0, s, MATRICES, rows=ROWS)),
    "hyperball": (lambda s: Hyperball(0.5, s), lambda s, i: oracle.Hyperball(0.5, s, MATRICES, pieces=i)),
    "hyperball, all": (lambda s: Hyperball(space=s, where=None), lambda s, i: oracle.Hyperball(1.0, s, pieces=i)),
}


MOMENTUM = {"beta": 0.7, "bias_correction": True}


def pieces(name, space):
    return [sweep.ALL] if space == "z" and name in JOINT else sweep.TENSORS


def pair(bend, name, space):
    ours, theirs = BENDS[bend]
    return ours(space), theirs(space, pieces(name, space))


CASES = [(n, b, s) for n in NAMES for b in BENDS for s in "pz" if (n, s) != ("muon", "z")]
# Shampoo states no root, as the oracle's that its own is taken of; signs of coordinates are refused.
CASES = [(n, b, s) for n, b, s in CASES if not (n == "shampoo" and s == "z" and ("cautious" in b or b == "floor"))]


@pytest.mark.parametrize(("name", "bend", "space"), CASES)
def test_sweep(name, bend, space):
    ours, theirs = pair(bend, name, space)
    # The oracle of Muon is told of gradients alone.
    momentum = None if name == "muon" else MOMENTUM
    end = sweep.compare(name, [ours], [theirs], momentum)
    plain = sweep.compare(name, (), (), momentum)
    # A step's momentum may agree with its gradient in every entry: then there is nothing to leave out.
    assert bend.startswith("cautious") or "brake" in bend or (end - plain).abs().max() > 1e-5


@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize("name", ["rms", "dense@rms"])
def test_several_at_once_in_any_order_beside_penalties(name, space):
    some = [pair(b, name, space) for b in ("hyperball", "cautious decay", "floor", "brake", "cautious")]
    penalties = [sweep.PENALTIES[x] for x in ("L2-z", "L1-p", "SAM-p")]
    ours, theirs = zip(*some, *penalties, strict=True)
    end = sweep.compare(name, ours, theirs, MOMENTUM)
    again = sweep.compare(name, ours[::-1], theirs[::-1], MOMENTUM)
    assert (end - again).abs().max() < 1e-12  # sums of penalties in another order


def matrices(net):
    return [p for p in net.parameters() if p.ndim > 1]


def descend(optimizer, net, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
        yield


@pytest.mark.parametrize(
    "make", [precond.adamw, precond.sgd, precond.muon, precond.soap, precond.auto], ids=lambda f: f.__name__
)
def test_on_the_hyperball_the_learning_rate_is_an_angle(make):
    net = sweep.Net()
    start = [p.detach().clone() for p in matrices(net)]
    optimizer = make(net, lr=0.03, weight_decay=0.1, regularizers=[Hyperball()])
    for _ in descend(optimizer, net, 1):
        for p, q in zip(matrices(net), start, strict=True):
            assert p.norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
            # A chord of length α‖p‖, or less where the step was along p: projecting back turns it by its tangential part.
            assert 1e-4 < ((p - q).norm() / q.norm()).item() < 0.03 * 1.02


def test_the_step_on_the_hyperball_does_not_depend_on_its_length_before():
    ends = []
    for factor in (1.0, 100.0):
        net = sweep.Net()
        muon = PreconditionedGD(net, 0.1, preconditioner=precond.Fixed(), regularizers=[Hyperball(where=None)])
        muon.zero_grad()
        (factor * net.loss()).backward()
        muon.step()
        ends.append(sweep.flat(net.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-13, atol=0)


def test_zeros_are_free_on_the_hyperball():
    layer = nn.Linear(3, 2, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    optimizer = precond.sgd(layer, lr=0.1, regularizers=[Hyperball()])
    layer(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.data, torch.full((2, 3), -0.1, dtype=torch.float64))


def test_without_growth_lengths_do_not_grow_but_to_second_order():
    net = sweep.Net()
    optimizer = precond.adamw(net, lr=1e-4, weight_decay=0.0, regularizers=[RadialBrake(where=None)])
    before = [p.norm().item() for p in net.parameters()]
    for _ in descend(optimizer, net, 20):
        pass
    # Twenty steps of 1e-4 an entry, at right angles to p: (Δp)²/2‖p‖ each at most.
    for p, length in zip(net.parameters(), before, strict=True):
        assert p.norm().item() <= length + 20 * p.numel() * 1e-8 / (2 * length)


def test_a_cautious_step_waits_where_momentum_points_uphill():
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = PreconditionedGD(
        [p], 1.0, preconditioner=precond.Fixed(), momentum=Momentum(0.9, "heavy_ball"), regularizers=[Cautious()]
    )
    for g in ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -0.5]):
        before = p.detach().clone()
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    # Momenta 1.9, 1.9, 1.9, 0.4: the last waits, the others are longer by 4/3.
    torch.testing.assert_close(before - p.detach(), torch.tensor([1.9, 1.9, 1.9, 0.0], dtype=torch.float64) * 4 / 3)


def test_cautious_decay_leaves_a_minimum_where_it_is():
    """‖p − a‖² with coupled, decoupled and cautious decay: only the last ends at a."""
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ends = {}
    for name, decay in {"z": precond.L2(0.5), "cautious": CautiousL2(0.5)}.items():
        p = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
        optimizer = PreconditionedGD([p], 0.05, preconditioner=precond.Fixed(), regularizers=[decay])
        for _ in range(400):
            p.grad = 2 * (p.detach() - a)
            optimizer.step()
        ends[name] = p.detach()
    torch.testing.assert_close(ends["cautious"], a, rtol=1e-6, atol=0)
    assert (ends["z"] - a).abs().min() > 0.1


def test_rows_of_transposed_weights_are_their_outputs():
    layer = nn.ConvTranspose2d(3, 2, 2, bias=False, dtype=torch.float64)
    optimizer = precond.sgd(layer, lr=1.0, regularizers=[RowFloor(0.5)])
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(before)
    layer.weight.grad[:, 0] = 1e-3
    optimizer.step()
    moved = (before - layer.weight.detach()).transpose(0, 1).flatten(1).norm(dim=1)
    expected = 0.5 * before[:, 0].norm()
    torch.testing.assert_close(moved, torch.stack([expected, torch.zeros_like(expected)]))


def test_stages_are_in_the_order_that_is_documented():
    kinds = [Cautious(), RadialBrake(), RowFloor(0.1), CautiousL2(0.1), Hyperball()]
    assert [k.stage for k in kinds] == sorted(Stage)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cautious(1.5), r"strength must be in \[0, 1\], got 1.5"),
        (lambda: RadialBrake(-0.1), r"strength must be in \[0, 1\], got -0.1"),
        (lambda: RowFloor(-1.0), "ratio"),
        (lambda: Hyperball(-1.0), "length"),
        (lambda: CautiousL2(-1.0), "lam"),
        (lambda: PreconditionedGD(sweep.Net(), preconditioner=Muon(), regularizers=[Hyperball(space="z")]), "singular"),
        (lambda: PreconditionedGD(sweep.Net(), preconditioner=RMS(), regularizers=[Cautious(space="q")]), "space"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


@pytest.mark.parametrize(
    "bend", [Cautious(), CautiousL2(0.1), RadialBrake(), RowFloor(0.1), Hyperball()], ids=lambda b: type(b).__name__
)
def test_what_is_not_finite_changes_nothing_where_that_was_asked_for(bend):
    net = sweep.Net()
    optimizer = PreconditionedGD(net, 0.1, preconditioner=SOAP(), regularizers=[bend], nonfinite="skip")
    before = sweep.flat(net.parameters())
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert torch.equal(sweep.flat(net.parameters()), before)
