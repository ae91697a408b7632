"""XTrace and XDiag against their definition, one factorization for each probe that is left out; and intervals against the truth."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import t as student

from precond.analysis.curvature import diagonal, trace
from precond.analysis.curvature.estimates import students_t
from precond.analysis.curvature.xtrace import xtrace

N = 600


def turned(d: torch.Tensor) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(len(d), len(d), generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    return (Q * d) @ Q.T


SPECTRA = {
    "decaying": torch.arange(1, N + 1).double() ** -2.0,
    "flat": 1 + torch.rand(N, generator=torch.Generator().manual_seed(2)).double(),
    "of both signs": torch.randn(N, generator=torch.Generator().manual_seed(3)).double(),
}
MATRICES = {name: turned(d) for name, d in SPECTRA.items()}
LOW = turned(torch.cat([torch.tensor([3.0, 2.0, -1.0]), torch.zeros(N - 3)]).double())


def by_definition(A: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates of the trace and of the diagonal by each of the probes, rows of W."""
    traces, diagonals = [], []
    for i in range(len(W)):
        Q = torch.linalg.qr(A @ torch.cat([W[:i], W[i + 1 :]]).T).Q
        P = Q @ Q.T
        rest = torch.eye(len(A), dtype=A.dtype) - P
        traces.append((Q.T @ A @ Q).trace() + W[i] @ rest @ A @ rest @ W[i])
        diagonals.append((P @ A).diagonal() + W[i] * (rest @ A @ W[i]))
    return torch.stack(traces), torch.stack(diagonals)


def signs(m: int, seed: int = 0) -> torch.Tensor:
    return 2.0 * torch.randint(0, 2, (m, N), generator=torch.Generator().manual_seed(seed)).double() - 1


@pytest.mark.parametrize("name", MATRICES)
def test_one_factorization_is_as_good_as_one_for_each_probe(name):
    A, W = turned(SPECTRA[name][:60]), signs(7)[:, :60]
    value, error, make = xtrace(W, lambda rows: rows @ A)
    diagonals, errors = make()
    traces, expected = by_definition(A, W)
    assert value == pytest.approx(float(traces.mean()), rel=1e-9)
    torch.testing.assert_close(diagonals, expected, rtol=1e-8, atol=1e-9)
    fewer = [by_definition(A, torch.cat([W[:i], W[i + 1 :]])) for i in range(len(W))]
    without = torch.stack([t.mean() for t, _ in fewer])
    assert error == pytest.approx(float((without - without.mean()).square().sum().sqrt()), rel=1e-7)
    without = torch.stack([d.mean(0) for _, d in fewer])
    torch.testing.assert_close(errors, (without - without.mean(0)).square().sum(0).sqrt(), rtol=1e-7, atol=1e-10)


def test_a_sketch_of_low_rank_is_exact():
    for A in (LOW, torch.zeros(N, N).double()):
        found = trace(A, method="xtrace", products=20)
        assert found.value == pytest.approx(float(A.trace()), abs=1e-11) and found.error < 1e-11
        torch.testing.assert_close(diagonal(A, method="xtrace", products=20).value[0], A.diagonal(), rtol=0, atol=1e-12)


def test_the_name_that_the_method_had():
    found, before = (trace(LOW, method=method, products=14, seed=3) for method in ("xtrace", "exchanged"))
    assert (before.value, before.error) == (found.value, found.error)
    with pytest.raises(ValueError, match=r"hutch\+\+, xtrace, got 'hutch'"):
        trace(LOW, method="hutch", products=14)


M = 120  # entries of the matrices whose intervals are counted
i = torch.arange(1, M + 1).double()
COUNTED = {
    "flat": SPECTRA["flat"][:M],
    "1/i": 1 / i,
    "1/i²": i**-2,
    "0.9^i": 0.9**i,
    "a step": torch.where(i <= 10, 1.0, 1e-3).double(),
    "one": torch.where(i <= 1, 1.0, 1e-6).double(),
    "one and noise": torch.where(i <= 1, 100.0, SPECTRA["flat"][:M]),
    "of both signs": SPECTRA["of both signs"][:M],
    "of both signs, decaying": SPECTRA["of both signs"][:M] / i,
}
REPETITIONS = 300


@pytest.mark.parametrize("products", [12, 48])
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("name", COUNTED)
def test_intervals_hold_as_often_as_they_say(name, method, products):
    A = turned(COUNTED[name])
    truth = float(A.trace())
    found = [trace(A, products=products, method=method, seed=seed) for seed in range(REPETITIONS)]
    for confidence in (0.8, 0.95):
        held = sum(low <= truth <= high for low, high in (e.interval(confidence) for e in found))
        # Three standard errors of a share of 300. By the scatter of vᵀAv 88 % of 400 held at 1/i² from 12 products.
        least = confidence - 3 * (confidence * (1 - confidence) / REPETITIONS) ** 0.5
        assert held >= least * REPETITIONS
    spread, said = float(torch.tensor([e.value for e in found]).std()), sum(e.error for e in found) / REPETITIONS
    assert spread < 1.2 * said  # 1.0 and the scatter of a standard deviation of heavy tails
    assert said < (6.0 if method == "xtrace" else 1.5) * spread


def test_the_sketch_serves_both_ends():
    A, truth = MATRICES["decaying"], float(SPECTRA["decaying"].sum())
    rms = lambda method: sum((trace(A, products=60, method=method, seed=s).value - truth) ** 2 for s in range(40)) ** 0.5  # noqa: E731
    assert rms("xtrace") < rms("hutch++") < 0.05 * rms("hutchinson")


def test_intervals_of_a_diagonal_and_of_what_is_exact():
    for name, A in MATRICES.items():
        for method in ("hutchinson", "hutch++", "xtrace"):
            low, high = diagonal(A, products=40, seed=1, method=method).interval(0.99)
            inside = ((low[0] <= A.diagonal()) & (A.diagonal() <= high[0])).double().mean()
            assert inside > 0.97, (name, method)  # of 600 entries, which are not independent
    exact = trace(torch.diag(torch.tensor([1.0, 2.0])))
    assert exact.interval() == (3.0, 3.0)
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        exact.interval(95)


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 19, 47])
def test_students_distribution(degrees):
    for confidence in (0.5, 0.9, 0.95, 0.99):
        exact = student.ppf((1 + confidence) / 2, degrees)
        assert students_t(confidence, degrees) == pytest.approx(exact, rel=8e-3 if confidence == 0.99 else 2e-3)


@pytest.mark.parametrize("scale", [2.0**-200, 2.0**40, 2.0**70, 2.0**200])
def test_of_a_multiple_it_is_that_multiple(scale):
    """Powers of 2 round nothing: all digits but those of the factorizations' own scaling stay."""
    A, W = MATRICES["flat"], signs(24)
    value, error, make = xtrace(W, lambda rows: rows @ A)
    scaled, its_error, its_make = xtrace(W, lambda rows: rows @ (scale * A))
    assert (scaled / scale, its_error / scale) == (pytest.approx(value, rel=1e-9), pytest.approx(error, rel=1e-6))
    for one, other in zip(make(), its_make(), strict=True):
        torch.testing.assert_close(other / scale, one, rtol=1e-6, atol=1e-9)
