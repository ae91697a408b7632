"""Hessian and Gauss–Newton products and eigenvalues against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond.algebra import vec
from precond.algebra.maps import Diagonal
from precond.analysis.curvature import Objective, Span, eigenvalues, gauss_newton, hessian

CROSS = nn.CrossEntropyLoss()
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "relu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4)),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)), (4,)),
}


def problem(name: str, sizes=(10, 3)):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double()
    data = [(torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))) for n in sizes]
    return model, data


def dense(model, data) -> torch.Tensor:
    """The Hessian of the mean over all examples, column by column.

    torch.func.hessian is no oracle here: under vmap torch 2.13 differentiates LayerNorm wrongly (0.1 off; asymmetric).
    """
    names, params = zip(*model.named_parameters(), strict=True)
    like = tuple(p.detach() for p in params)
    x, y = (torch.cat(t) for t in zip(*data, strict=True))

    def loss(flat):
        return CROSS(torch.func.functional_call(model, dict(zip(names, vec.unflatten(flat, like), strict=True)), (x,)), y)

    return torch.autograd.functional.hessian(loss, vec.flatten(like))


@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_of_uneven_batches(name):
    model, data = problem(name)
    H, A = hessian(Objective(model, CROSS, data)), dense(model, data)
    torch.testing.assert_close(H.to_dense(), A, rtol=1e-9, atol=1e-11)
    v = tuple(torch.randn_like(p) for p in model.parameters())
    torch.testing.assert_close(vec.flatten(H.mv(v)), A @ vec.flatten(v), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton(name):
    model, data = problem(name)
    names, params = zip(*model.named_parameters(), strict=True)
    like = tuple(p.detach() for p in params)
    total = sum(len(y) for _, y in data)
    expected = torch.zeros((sum(p.numel() for p in like),) * 2, dtype=torch.float64)
    for x, y in data:

        def out(flat, x=x):
            return torch.func.functional_call(model, dict(zip(names, vec.unflatten(flat, like), strict=True)), (x,))

        J = torch.func.jacrev(out)(vec.flatten(like))
        p = out(vec.flatten(like)).softmax(-1)
        S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        expected += torch.einsum("nij,nik,nkl->jl", J, S, J) / total
        assert len(y) == len(J)
    torch.testing.assert_close(gauss_newton(Objective(model, CROSS, data)).to_dense(), expected, rtol=1e-9, atol=1e-11)


def test_a_measurement_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    _, data = problem("mlp")
    model(data[0][0])
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = [t.clone() for t in [*model.buffers(), *(p.grad for p in model.parameters())]]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model.eval()
    H = hessian(Objective(model, CROSS, data))
    H.mv(tuple(torch.ones_like(p) for p in model.parameters()))
    assert torch.equal(torch.rand(2), expected) and not model.training
    after = [*model.buffers(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", ["dense", "lanczos"])
@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_eigenvalues(name, which, method):
    model, data = problem(name)
    A = dense(model, data)
    exact = torch.linalg.eigvalsh(A)
    k = 3
    expected = {"largest": exact.flip(0)[:k], "smallest": exact[:k], "both": torch.cat([exact[:k], exact[-k:]])}[which]
    found = eigenvalues(hessian(Objective(model, CROSS, data)), k, which, tol=1e-8, method=method)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-9)
    for value, x, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        flat = vec.flatten(x)
        assert (A @ flat - value * flat).norm() <= 2 * residual + 1e-12
        assert residual < 1e-3 and flat.norm().item() == pytest.approx(1)


def test_zero_rows_and_deflation():
    d = torch.tensor([3.0, 0.0, -1.0, 0.0, 2.0, 5.0], dtype=torch.float64)
    A = Diagonal((d,))
    for method in ("dense", "lanczos"):
        assert eigenvalues(A, 4, method=method).values.tolist() == pytest.approx([5, 3, 2, 0], abs=1e-9)
        found = eigenvalues(A, 3, "smallest", method=method)
        assert found.values.tolist() == pytest.approx([-1, 0, 0], abs=1e-9)
        assert all(torch.allclose(d * v[0], lam * v[0]) for lam, v in zip(found.values, found.vectors, strict=True))
        top = Span([(torch.eye(6, dtype=torch.float64)[5],)])
        assert eigenvalues(A, 1, method=method, deflate=top).values.tolist() == pytest.approx([3])


def test_no_ghosts_after_many_products():
    torch.manual_seed(0)
    d = torch.cat([torch.tensor([1e4, 1e3], dtype=torch.float64), torch.rand(600, dtype=torch.float64)])
    found = eigenvalues(Diagonal((d,)), 5, tol=1e-6, method="lanczos", max_products=400)
    torch.testing.assert_close(found.values, d.sort(descending=True).values[:5], rtol=1e-6, atol=1e-9)


def test_an_unsymmetric_map_is_refused():
    from precond.algebra.maps import Dense
    from precond.analysis.curvature import NotSymmetric

    A = Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), like=(torch.zeros(2),))
    with pytest.raises(NotSymmetric, match=r"P.T @ H @ P"):
        eigenvalues(A)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m, d: Objective(m, CROSS, []), ValueError, "nothing|empty|no batch"),
        (lambda m, d: Objective(m, CROSS, d, params=["nope"]), (ValueError, TypeError), "nope"),
        (lambda m, d: eigenvalues(hessian(Objective(m, CROSS, d)), 1, "greatest"), ValueError, "which must be"),
        (lambda m, d: eigenvalues(hessian(Objective(m, CROSS, d)), 10**6), ValueError, "ask for fewer"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make(*problem("mlp"))
