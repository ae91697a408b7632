"""The polar factor after another preconditioner, and Muon's powers: what their steps are, side by side and alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from precond import (
    BNP,
    RMS,
    SOAP,
    Composition,
    Momentum,
    Muon,
    Orthogonalized,
    Polar,
    PreconditionedGD,
    Schatten,
    Shampoo,
    Whitening,
    vec,
)
from precond.algebra.maps import Dense, Secant

EXACT = Muon("eigh")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar(u):
    U, _, V = torch.linalg.svd(u, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize(
    "of", [SOAP(0.9, every=2), RMS(0.9), Shampoo(every=2), SOAP(0.9) @ RMS(0.9)], ids=lambda p: type(p).__name__
)
def test_a_step_is_the_polar_factor_of_the_other_s(of, shape):
    """Beside an optimizer of ``of`` alone with the same gradients and momentum, whatever that is."""
    # That of a composition is in the coordinates of its outer one, and here in p.
    momentum = None if isinstance(of, Composition) else Momentum(0.7, "nesterov", dampening=0.7)
    ends = []
    for P in (of, Orthogonalized(of, EXACT, where=None)):
        p = nn.Parameter(draw(0, *shape))
        optimizer = PreconditionedGD([("hidden.weight", p)], 0.1, preconditioner=P, momentum=momentum)
        moves = []
        for t in range(5):
            before = p.detach().clone()
            p.grad = draw(t + 1, *shape)
            optimizer.step()
            moves.append((before - p.detach()) / 0.1)
        ends.append(moves)
    for theirs, ours in zip(*(moves[1:] for moves in ends), strict=True):  # RMS makes signs of the first, of any rank
        expected = polar(theirs) * max(1.0, shape[0] / shape[1]) ** 0.5
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_behind_whitening_the_direction_is_without_the_outer_root():
    """polar(m C⁻ᵖ) of [W b] with p = 1/2, while ``Whitening() @ Polar()`` has C^(−1/2) once more behind it."""
    torch.manual_seed(0)
    X = draw(3, 50, 4) @ draw(4, 4, 4)
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    of = Whitening(decay=0.0, damping=0.0, shrinkage=0.0, every=1, power=0.5)
    optimizer = PreconditionedGD(layer, 0.1, preconditioner=Orthogonalized(of, EXACT, where=None))
    for _ in range(2):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        layer(X).pow(4).mean().backward()
        optimizer.step()
    C = X.T @ X / len(X)
    D = C.diagonal().sqrt()
    values, V = torch.linalg.eigh(C / D[:, None] / D)
    M = V @ torch.diag(values**-0.5) @ V.T / D[:, None] / D
    torch.testing.assert_close((before - layer.weight.detach()) / 0.1, polar(layer.weight.grad @ M), rtol=1e-8, atol=1e-8)


def test_where_the_polar_factor_ascends_the_other_step_is_taken():
    """A diagonal M₁ of wide range makes such a matrix: found by search, ⟨m, polar(M₁m)⟩ = −0.1 or so."""
    class_ = precond.Fixed
    for seed in range(20_000):
        g, s = draw(seed, 2, 2), (4 * draw(seed + 10**6, 2, 2)).exp()
        if (g * polar(s * g)).sum() < -1e-2:
            break
    else:
        pytest.fail("none found")
    of = class_(precond.Diagonal((s.sqrt(),)))
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = PreconditionedGD([("a.weight", p)], 1.0, preconditioner=Orthogonalized(of, EXACT, where=None))
    p.grad = g
    optimizer.step()
    u = s * g
    torch.testing.assert_close(-p.detach(), u / u.norm() * 2**0.5)
    assert (g * -p.detach()).sum() > 0


def test_what_is_no_hidden_matrix_takes_the_other_s_step():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    optimizer = PreconditionedGD(Net(), preconditioner=Orthogonalized(SOAP()))
    acting = {row.name: row.preconditioner.split("(")[0] for row in optimizer.explain().rows}
    assert acting["hidden.weight"] == "Orthogonalized"
    assert acting["head.weight"] == "SOAP" and acting["embedding.weight"] == "SOAP"
    assert acting["hidden.bias"] == "RMS"


@pytest.mark.parametrize("stacked", [False, True])
def test_the_secant_map_is_a_map(stacked):
    n = 6
    A = torch.eye(n).double() + 0.3 * draw(1, n, n)
    m, d = draw(2, n), draw(3, n)
    d = d if m @ d > 0 else -d
    if stacked:
        P = Secant(
            precond.InverseRoot((1 + draw(4, 3, n).abs(),)), (draw(5, 3, n),), (draw(5, 3, n) + 0.1 * draw(6, 3, n),), True
        )
        v = (draw(7, 3, n),)
        torch.testing.assert_close(P.gram(P.like)[0], P.d[0])
    else:
        P, v = Secant(Dense(A, (m,)), (m,), (d,)), (draw(7, n),)
        V = torch.eye(n).double() - torch.outer(m, d) / (m @ d)
        dense = P.to_dense()
        torch.testing.assert_close(dense @ dense.T, V.T @ A @ A.T @ V + torch.outer(d, d) / (m @ d))
        torch.testing.assert_close(P.rmv(v)[0], dense.T @ v[0])
    for there, back in ((P.mv, P.solve), (P.rmv, P.rsolve)):
        torch.testing.assert_close(back(there(v))[0], v[0])
    w = (draw(8, *v[0].shape),)
    torch.testing.assert_close(vec.dot(P.mv(v), w), vec.dot(v, P.rmv(w)))


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 3, 2)])
def test_a_step_of_schatten_s_norm(power, shape):
    p = nn.Parameter(draw(0, *shape))
    before = p.detach().clone()
    optimizer = PreconditionedGD([p], 0.1, preconditioner=Schatten(power))
    p.grad = draw(1, *shape)
    optimizer.step()
    U, s, V = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
    A, B = p.grad.flatten(1).shape
    step = U @ torch.diag(s**power) @ V
    step *= max(1, A / B) ** 0.5 * min(A, B) ** 0.5 / step.norm()
    torch.testing.assert_close((before - p.detach()).flatten(1) / 0.1, step, rtol=1e-9, atol=1e-9)
    # From both sides: (mmᵀ)^((s−1)/4) m (mᵀm)^((s−1)/4).
    m = p.grad.flatten(1)
    halves = [W @ torch.diag(s ** ((power - 1) / 2)) @ W.T for W in (U, V.T)]
    both = halves[0] @ m @ halves[1]
    torch.testing.assert_close(step, both * step.norm() / both.norm(), rtol=1e-8, atol=1e-8)


def test_schatten_s_ends_are_muon_and_the_momentum():
    steps = {}
    for name, P in {"muon": EXACT, "0": Schatten(0.0), "1": Schatten(1.0)}.items():
        p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = PreconditionedGD([p], 1.0, preconditioner=P)
        p.grad = draw(2, 4, 3)
        optimizer.step()
        steps[name] = -p.detach()
    torch.testing.assert_close(steps["muon"], steps["0"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps["1"] / steps["1"].norm(), p.grad / p.grad.norm())


@pytest.mark.parametrize("of", [Polar(), Muon(), BNP() @ Muon()], ids=lambda p: type(p).__name__)
def test_of_what_is_made_of_the_momentum_it_is_refused(of):
    with pytest.raises(ValueError, match="made of the momentum already"):
        Orthogonalized(of)


def test_bad_powers():
    with pytest.raises(ValueError, match=r"power must be in \[0, 1\], got 2"):
        Schatten(2.0)
    with pytest.raises(ValueError, match="power"):
        precond.muon(nn.Linear(2, 2), power=-1.0)
