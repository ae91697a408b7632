"""Spectral density, trace and diagonal against all eigenvalues, with error bars that hold."""

from __future__ import annotations

import pytest
import torch

from curvature.cases import CROSS, examples, hessian_of, network
from precond.algebra.maps import Diagonal
from precond.analysis.curvature import Objective, Span, as_map, diagonal, hessian, spectral_density, trace


def spiked(n: int = 700) -> torch.Tensor:
    """Few large eigenvalues, many small ones, as a Hessian has them."""
    d = 0.1 * torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    d[:5] = torch.tensor([50.0, 20.0, 10.0, -2.0, 5.0])
    return d


def turned(d: torch.Tensor) -> torch.Tensor:
    """diag(d) in other coordinates (a Householder reflection)."""
    u = torch.randn(len(d), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = u / u.norm()
    Q = torch.eye(len(d), dtype=d.dtype) - 2 * torch.outer(u, u)
    return Q @ d.diag() @ Q


def test_small_maps_are_exact():
    x, y = examples()
    model = network()
    exact = torch.linalg.eigvalsh(hessian_of(model, x, y))
    found = spectral_density(hessian(Objective(model, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])])))
    assert found.exact and found.n == 53
    torch.testing.assert_close(found.nodes[0], exact, rtol=1e-9, atol=1e-12)
    assert found.count(-10, -1e-9) == (pytest.approx(int((exact < -1e-9).sum())), 0)
    t = torch.linspace(-1, 1, 7, dtype=torch.float64)
    curve, error = found.smoothed(t, 0.1)
    expected = torch.exp(-((t[:, None] - exact) ** 2) / 0.02).mean(1) / (0.1 * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(curve, expected, rtol=1e-9, atol=1e-12)
    assert not error.any() and "53 eigenvalues" in str(found)


@pytest.mark.parametrize("seed", range(3))
def test_quadrature_within_its_error_bars(seed):
    d = spiked()
    found = spectral_density(turned(d), probes=12, steps=40, seed=seed)
    assert not found.exact and found.nodes.shape == found.weights.shape == (12, 40) and found.products == 480
    torch.testing.assert_close(found.weights.sum(1), torch.ones(12, dtype=torch.float64))
    # Outliers are nodes of every probe; a run of Lanczos without reorthogonalization would split their weights.
    for outlier in (50.0, 20.0, -2.0):
        assert ((found.nodes - outlier).abs() < 1e-8).sum() == 12
    for f in (lambda t: t, lambda t: t**2, lambda t: torch.exp(-t.abs())):
        mean, error = found.mean(f(found.nodes))
        assert abs(mean - f(d).mean()) < 4 * error and error > 0
    below, error = found.count(-3, 0.05)
    assert abs(below - (d <= 0.05).sum()) < max(4 * error, 20)
    grid = found.grid()
    curve, bars = found.smoothed(grid, 2.0)
    exact = torch.exp(-((grid[:, None] - d) ** 2) / 8).mean(1) / (2 * (2 * torch.pi) ** 0.5)
    assert ((curve - exact).abs() <= 5 * bars + 1e-6).all() and torch.trapezoid(found.smoothed(grid)[0], grid) > 0.9


def test_moments_of_one_probe_are_those_of_its_vector():
    d = spiked(600)
    A = turned(d)
    found = spectral_density(A, probes=2, steps=30, seed=4)
    generator = torch.Generator().manual_seed(4)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        v = torch.randn(1, 600, generator=generator, dtype=torch.float64)[0]
        v /= v.norm()
        for k in range(4):
            assert (weights * nodes**k).sum() == pytest.approx((v @ torch.linalg.matrix_power(A, k) @ v).item(), rel=1e-9)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_deflated_density(method):
    d = spiked()
    A = turned(d)
    top = torch.linalg.eigh(A).eigenvectors[:, -2:]
    found = spectral_density(A, method=method, steps=30, deflate=Span([(top[:, 0],), (top[:, 1],)]))
    assert found.n == 698 and found.nodes.max() == pytest.approx(10.0)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_and_diagonal_within_their_error_bars(method):
    A = turned(spiked())
    traces = [trace(A, method=method, products=60, seed=s) for s in range(30)]
    z = torch.tensor([(t.value - A.trace().item()) / t.error for t in traces])
    assert z.abs().mean() < 1.5 and abs(z.mean()) < 0.8 and all(t.products == 60 and not t.exact for t in traces)
    found = diagonal(A, method=method, products=60, seed=0)
    z = (found.value[0] - A.diag()) / found.error[0]
    assert 0.5 < z.square().mean().sqrt() < 2 and found.products == 60


def test_the_sketch_pays_where_few_eigenvalues_are_large():
    A = turned(spiked())
    assert trace(A, method="hutch++").error < 0.5 * trace(A, method="hutchinson").error
    assert trace(A).error == trace(A, method="hutch++").error
    error = {m: (diagonal(A, method=m).value[0] - A.diag()).norm() for m in ("hutchinson", "hutch++")}
    assert error["hutch++"] < 0.5 * error["hutchinson"]


@pytest.mark.parametrize("n", [5, 300, 700])
def test_exact_trace_and_diagonal(n):
    A = turned(spiked(n))
    for found in (trace(A, method="exact"), trace(A, products=max(n, 6))):
        assert found.exact and found.error == 0 and found.value == pytest.approx(A.trace().item(), rel=1e-12)
    found = diagonal(A, method="exact")
    torch.testing.assert_close(found.value[0], A.diag(), rtol=1e-12, atol=1e-14)
    assert found.exact and found.products == n


def test_the_diagonal_is_aligned_to_the_parameters():
    x, y = examples()
    model = network()
    found = diagonal(hessian(Objective(model, CROSS, (x, y))))
    assert [t.shape for t in found.value] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(
        torch.cat([t.reshape(-1) for t in found.value]), hessian_of(model, x, y).diag(), rtol=1e-9, atol=1e-12
    )


def null_space(n: int = 700) -> torch.Tensor:
    return torch.cat([torch.zeros(400), 1 + torch.rand(n - 400, generator=torch.Generator().manual_seed(3))]).double()


COUNTS = {
    "spikes": (spiked(), [(-3, 0.05), (0.02, 0.03), (1, 100), (-0.01, 0.11), (-torch.inf, 0.07), (200, 300)]),
    "a null space": (null_space(), [(-1, 1e-6), (1.5, 3), (1.2, 1.21), (-1, 0.5)]),
    "copies": ((4 * torch.rand(700, generator=torch.Generator().manual_seed(3))).floor().double(), [(0.5, 1.5), (-1, 2.5)]),
    "identity": (torch.ones(600).double(), [(0.5, 2), (1.5, 2), (0.5, torch.inf)]),
    "a wide range": (
        10 ** (-4 * torch.rand(700, generator=torch.Generator().manual_seed(3)).double()),
        [(1e-3, 1e-2), (0.1, 1)],
    ),
}


@pytest.mark.parametrize("steps", [6, 40])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_within_both_parts_of_their_error(name, steps):
    d, intervals = COUNTS[name]
    A, off = turned(d), []
    for seed in range(10):
        found = spectral_density(A, probes=(3, 8)[seed % 2], steps=steps, seed=seed)
        for low, high in intervals:
            count = found.count(low, high)
            value, error = count
            assert (value, error) == (count.value, count.error) and error == count.sampling + count.resolution
            truth = int(((d >= low) & (d <= high)).sum())
            off.append(max(abs(value - truth) - count.resolution, 0) / max(count.sampling, 1e-6))
    off = torch.tensor(off)
    # What goes beyond the resolution, which is a bound, is of the probes: a normal deviate, or near one.
    assert (off > 2).double().mean() <= 0.12 and off.max() < 5


def test_resolution_falls_with_the_steps_and_sampling_with_the_probes():
    A = turned(spiked())
    few, more = (spectral_density(A, probes=8, steps=k).count(-3, 0.05) for k in (10, 80))
    assert more.resolution < 0.2 * few.resolution
    few, more = (spectral_density(A, probes=k, steps=20).count(-3, 0.05) for k in (4, 36))
    assert more.sampling < 0.6 * few.sampling
    # Where the ends lie in gaps of the spectrum, nothing is left undecided.
    assert spectral_density(A, steps=40).count(1, 100).resolution < 1e-6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda A: spectral_density(A, probes=1), "probes must be a whole number >= 2, got 1"),
        (lambda A: spectral_density(A, steps=0), "steps must be"),
        (lambda A: spectral_density(A).smoothed(torch.zeros(1), 0.0), "width must be positive"),
        (lambda A: trace(A, products=3), "products must be a whole number >= 6, got 3"),
        (lambda A: diagonal(A, method="xdiag"), "method must be one of"),
        (lambda A: trace(torch.full((600, 600), torch.nan)), "not finite"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make(as_map(Diagonal((torch.ones(3),))))
