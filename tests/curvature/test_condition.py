"""κ, κ₊, inertia and refusals against dense float64 Hessians and closed forms."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import precond
from curvature.cases import CROSS, examples, hessian_of, minimized, network, penalized
from precond.algebra import vec
from precond.algebra.maps import Dense, Diagonal
from precond.analysis.curvature import (
    CurvatureError,
    Indefinite,
    NotResolved,
    NotSymmetric,
    Objective,
    Shifted,
    Singular,
    Span,
    as_map,
    condition_number,
    eigenvalues,
    gauss_newton,
    hessian,
    invariances,
    to_scipy,
)

METHODS = ("dense", "lanczos")


def rotated(values, seed: int = 0) -> torch.Tensor:
    """A dense symmetric matrix with given eigenvalues."""
    d = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(len(d), len(d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return (Q * d) @ Q.T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "kappa", "positive", "inertia", "error", "error_positive"),
    [
        ([4.0, 2.0, 0.5], 8.0, 8.0, (0, 0, 3), None, None),
        ([4.0, 0.0, 0.5, 0.0], None, 8.0, (0, 2, 2), Singular, None),
        ([4.0, -1.0, 0.5, 0.0], None, None, (1, 1, 2), Indefinite, Indefinite),
        ([-4.0, -1.0], None, None, (2, 0, 0), Indefinite, Indefinite),
        ([0.0, 0.0], None, None, (0, 2, 0), Singular, NotResolved),
        ([3.0], 1.0, 1.0, (0, 0, 1), None, None),
    ],
)
def test_closed_forms(values, kappa, positive, inertia, error, error_positive, method):
    found = condition_number(Diagonal((torch.tensor(values, dtype=torch.float64),)), method=method, tol=1e-6)
    assert (found.inertia.negative, found.inertia.null, found.inertia.positive) == inertia and found.inertia.exact
    for name, expected, refusal, why in (
        ("kappa", kappa, error, found.why),
        ("kappa_positive", positive, error_positive, found.why_positive),
    ):
        if refusal is None:
            assert getattr(found, name) == pytest.approx(expected, rel=1e-6) and why is None
        else:
            with pytest.raises(refusal) as caught:
                getattr(found, name)
            assert str(caught.value) == why and isinstance(caught.value, CurvatureError)
    assert str(found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=40),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(METHODS),
    st.integers(0, 5),
)
def test_random_spectra(positive, null, negative, method, seed):
    values = [*positive, *[0.0] * null, *[-x / 3 for x in positive[:negative]]]
    found = condition_number(rotated(values, seed), method=method, tol=1e-6)
    negative = min(negative, len(positive))
    assert found.converged and found.indefinite == (negative > 0)
    assert found.inertia.exact or method == "lanczos"
    if found.inertia.exact:
        assert (found.inertia.negative, found.inertia.null, found.inertia.positive) == (negative, null, len(positive))
    assert found.inertia.negative <= negative and found.inertia.null <= null and found.inertia.positive <= len(positive)
    assert abs(found.lam_max - max(values)) <= 1e-6 * max(values)
    assert abs(found.lam_min - min(values)) <= max(found.lam_min_error, 1e-12)
    if found.indefinite and not found.inertia.exact:
        assert found.lam_min_positive is None
    else:
        assert abs(found.lam_min_positive - min(positive)) <= 1e-6 * min(positive)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_smaller_is_missed_and_bounds_hold(seed):
    generator = torch.Generator().manual_seed(seed)
    d = 10 ** (-3 * torch.rand(600, generator=generator, dtype=torch.float64))
    found = condition_number(Diagonal((d,)), method="lanczos", tol=1e-3, max_products=600, seed=seed)
    assert found.converged and found.products < 550
    for value, residual, end in zip((found.lam_max, found.lam_min), found.residuals[:2], (d.max(), d.min()), strict=True):
        assert (d - value).abs().min() <= residual + 1e-14 and abs(value - end) <= 1e-3 * end
    assert found.kappa == pytest.approx((d.max() / d.min()).item(), rel=2e-3)


def test_out_of_products_is_said():
    d = 10 ** (-6 * torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = condition_number(Diagonal((d,)), method="lanczos", max_products=30)
    assert not found.converged and found.products <= 31
    with pytest.raises(NotResolved, match=r"λ_min = .* is not resolved to tol=0.001 after .* products; raise max_products"):
        _ = found.kappa
    assert "not converged" in str(found)


def test_auto_computes_all_eigenvalues_where_lanczos_leaves_it_open():
    d = torch.cat(
        [10 ** (-6 * torch.rand(700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)), torch.zeros(9)]
    )
    found = condition_number(as_map(rotated(d)), max_products=60, null_tol=1e-12)
    assert found.method == "dense" and found.products > 709 and found.inertia.null == 9
    assert found.lam_min_positive == pytest.approx(d[:700].min().item(), rel=1e-6)


@cache
def minimum(activation):
    """A network at initialization and at its minimum, and the eigenvalues of the penalized Hessian at both."""
    x, y = examples()
    start, end = network(activation), network(activation)
    assert minimized(end, x, y, 1e-2) < 1e-8
    return start, end, *(torch.linalg.eigvalsh(hessian_of(model, x, y, 1e-2)) for model in (start, end))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_a_penalized_network_at_its_minimum_and_at_initialization(activation, method):
    x, y = examples()
    first, last, start, exact = minimum(activation)
    of = lambda model: hessian(Objective(model, penalized(model, 1e-2), [(x[:30], y[:30]), (x[30:], y[30:])]))  # noqa: E731
    found = condition_number(of(first), method=method, tol=1e-6)
    negative = int((start < 0).sum())
    assert found.indefinite and 0 < found.inertia.negative <= negative
    assert not found.inertia.exact or found.inertia.negative == negative
    assert (found.lam_min, found.lam_max) == pytest.approx((start[0].item(), start[-1].item()), rel=1e-5)
    found = condition_number(of(last), method=method, tol=1e-8)
    assert exact[0] > 0 and found.kappa == pytest.approx((exact[-1] / exact[0]).item(), rel=1e-8)
    assert found.kappa == found.kappa_positive and found.inertia.positive == len(exact)


@pytest.mark.parametrize("method", METHODS)
def test_null_space_of_softmax(method):
    x, y = examples(60)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    minimized(model, x, y)
    exact = torch.linalg.eigvalsh(hessian_of(model, x, y))
    objective = Objective(model, CROSS, [(x, y)])
    found = condition_number(hessian(objective), method=method, tol=1e-7)
    assert found.kappa_positive == pytest.approx((exact[-1] / exact[7]).item(), rel=1e-7)
    assert found.why is not None and "null" in found.why
    known = invariances(objective)
    assert known.dim == 7
    deflated = condition_number(hessian(objective), method=method, tol=1e-7, deflate=known)
    assert deflated.kappa == pytest.approx(found.kappa_positive, rel=1e-6) and deflated.deflated == 7


def test_the_number_of_null_directions_is_estimated():
    generator = torch.Generator().manual_seed(0)
    d = torch.cat([torch.zeros(1500), 1 + torch.rand(1500, generator=generator)]).double()
    found = condition_number(as_map(to_scipy(Diagonal((d,)))), method="lanczos", tol=1e-6)
    # A diagonal map would show its zero rows; behind a rotation by pairs nothing does.
    assert found.inertia.null == 1500
    half = torch.full((2,), 0.5**0.5, dtype=torch.float64)

    def turned(v):
        a, b = v[:1500], v[1500:]
        return torch.cat([half[0] * (a - b), half[0] * (a + b)])

    class Turned(precond.LinearMap):
        like = (torch.zeros(3000, dtype=torch.float64),)

        def mv(self, v):
            return (turned(v[0]),)

        def rmv(self, v):
            a, b = v[0][:1500], v[0][1500:]
            return (torch.cat([half[0] * (a + b), half[0] * (b - a)]),)

    found = condition_number(Turned().T @ Diagonal((d,)) @ Turned(), method="lanczos", tol=1e-6)
    assert not found.inertia.exact and found.inertia.null_error is not None
    assert abs(found.inertia.null_estimate - 1500) < 4 * found.inertia.null_error
    assert found.inertia.null_error < 60 and found.kappa_positive == pytest.approx(
        d.max().item() / d[1500:].min().item(), rel=1e-5
    )


@pytest.mark.parametrize("make", [precond.adam, precond.bnp, precond.sgd], ids=["adam", "bnp", "sgd"])
def test_preconditioned_by_an_optimizer(make):
    x, y = examples()
    model = network(nn.Tanh)
    loss = penalized(model, 1e-1)
    opt = make(model, lr=1e-2)
    for _ in range(5):
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
    objective = Objective(model, loss, [(x[:25], y[:25]), (x[25:], y[25:])])
    P = opt.map(list(model.parameters()))
    A = P.to_dense() if P.like is not None else torch.eye(53, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(A.T @ hessian_of(model, x, y, 0.1) @ A)
    for method in METHODS:
        found = condition_number(P.T @ hessian(objective) @ P, method=method, tol=1e-7)
        assert (found.lam_min, found.lam_max) == pytest.approx((exact[0].item(), exact[-1].item()), rel=1e-6)


def test_float64_of_a_float32_network_with_its_preconditioner_and_penalty():
    x, y = examples()
    model = network(nn.Tanh).float()
    loss = penalized(model, 1e-2)  # it refers to the model's own parameters
    objective = Objective(model, loss, [(x.float(), y)])
    d = tuple(torch.rand_like(p) + 0.5 for p in model.parameters())
    found = condition_number(Diagonal(d) @ hessian(objective) @ Diagonal(d), tol=1e-9, float64=True)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and found.dtype == torch.float64
    double = network(nn.Tanh)
    double.load_state_dict(model.state_dict())
    D = torch.cat([t.reshape(-1) for t in d]).double()
    A = D[:, None] * hessian_of(double, x.float().double(), y, 1e-2) * D
    exact = torch.linalg.eigvalsh(A)
    assert (found.lam_min, found.lam_max) == pytest.approx((exact[0].item(), exact[-1].item()), rel=1e-9)


def test_matrices_and_scipy_both_ways():
    A = rotated([5.0, 2.0, 1.0, 0.5])
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import aslinearoperator, eigsh

    for form in (A, A.numpy(), csr_matrix(A.numpy()), aslinearoperator(A.numpy()), Dense(A), to_scipy(as_map(A))):
        for method in METHODS:
            assert condition_number(form, method=method, tol=1e-9).kappa == pytest.approx(10.0, rel=1e-9)
    x, y = examples()
    model = network()
    H = hessian(Objective(model, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])]))
    exact = torch.linalg.eigvalsh(hessian_of(model, x, y))
    operator = to_scipy(H)
    assert operator.shape == (53, 53) and operator.dtype == "float64"
    assert eigsh(operator, k=1, return_eigenvectors=False)[0] == pytest.approx(exact[-1].item(), rel=1e-8)
    X = torch.randn(53, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(operator @ X.numpy()), H.to_dense() @ X, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.from_numpy(operator.rmatvec(X[:, 0].numpy())), H.to_dense() @ X[:, 0], rtol=1e-9, atol=1e-12
    )
    assert eigenvalues(operator, 1).values.item() == pytest.approx(exact[-1].item(), rel=1e-3)


def test_shifted_is_a_penalty():
    x, y = examples()
    model = network()
    objective = Objective(model, CROSS, [(x, y)])
    exact = torch.linalg.eigvalsh(hessian_of(model, x, y, 0.3))
    for method in METHODS:
        found = condition_number(Shifted(hessian(objective), 0.3), method=method, tol=1e-8)
        assert (found.lam_min, found.lam_max) == pytest.approx((exact[0].item(), exact[-1].item()), rel=1e-8)


def test_deflation_of_given_vectors():
    A = rotated([5.0, 2.0, 1.0, 0.5])
    V = torch.linalg.eigh(A).eigenvectors
    for method in METHODS:
        found = condition_number(A, method=method, tol=1e-9, deflate=Span([(V[:, 0],), (V[:, 0] + V[:, 3],)]))
        assert (
            (found.lam_min, found.lam_max) == pytest.approx((1.0, 2.0)) and found.deflated == 2 and found.inertia.positive == 2
        )


def test_the_text_says_what_was_found():
    text = str(condition_number(rotated([4.0, 2.0, 0.5])))
    for part in ("λ_max   +4.0", "λ_min   +5.0", "κ       8 ±", "0 negative, 0 null, 3 positive", "3 products, dense, float64"):
        assert part in text
    assert "λ_min₊" in str(condition_number(rotated([4.0, 0.0, 0.5]))) and "κ₊      8 ±" in str(
        condition_number(rotated([4.0, 0.0, 0.5]))
    )
    assert "1 negative" in str(condition_number(rotated([4.0, -1.0])))


def test_a_record_does_not_change():
    found = condition_number(rotated([2.0, 1.0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.lam_max = 1.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: condition_number(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), NotSymmetric, r"P.T @ H @ P"),
        (lambda: condition_number(torch.ones(2, 3)), ValueError, r"must be square, got shape \(2, 3\)"),
        (lambda: condition_number(torch.eye(2, dtype=torch.long)), ValueError, "floating-point, got torch.int64"),
        (lambda: condition_number(torch.eye(2).numpy() * 1j), ValueError, "must be real"),
        (lambda: condition_number("H"), TypeError, "got str"),
        (lambda: condition_number(precond.Identity()), ValueError, "takes vectors of any shape"),
        (lambda: condition_number(torch.eye(2), tol=0.0), ValueError, r"tol must lie in \(0, 1\), got 0.0"),
        (lambda: condition_number(torch.eye(2), method="qr"), ValueError, "method must be one of"),
        (lambda: condition_number(torch.full((2, 2), torch.nan)), ValueError, "not finite"),
        (lambda: condition_number(torch.full((2, 2), torch.inf), method="lanczos"), ValueError, "not finite"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_gauss_newton_is_never_indefinite():
    x, y = examples()
    model = network(nn.Tanh)
    found = condition_number(gauss_newton(Objective(model, CROSS, [(x, y)])), tol=1e-6)
    assert found.inertia.negative == 0 and found.inertia.null >= 6 and vec.flatten(tuple(model.parameters())).numel() == found.n
