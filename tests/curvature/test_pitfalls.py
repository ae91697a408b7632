"""What goes wrong in libraries of curvature, one test for each: C1 to C10."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.cases import CROSS, examples, hessian_of, minimized, network
from precond.algebra import vec
from precond.algebra.maps import Diagonal
from precond.analysis.curvature import (
    CurvatureError,
    NoSecondDerivative,
    NotResolved,
    Objective,
    condition_number,
    diagonal,
    eigenvalues,
    gauss_newton,
    hessian,
    invariances,
    neuron_hessian,
    spectral_density,
    trace,
)


def test_c1_no_ghosts():
    d = torch.cat([torch.tensor([1e4, 1e3]), torch.rand(400, generator=torch.Generator().manual_seed(0))]).double()
    found = eigenvalues(Diagonal((d,)), 5, tol=1e-6, method="lanczos", max_products=300)
    torch.testing.assert_close(found.values, d.sort(descending=True).values[:5], rtol=1e-6, atol=1e-9)
    # The same recurrence without reorthogonalization finds the largest eigenvalue several times.
    v, before, beta, rows = torch.ones_like(d) / len(d) ** 0.5, torch.zeros_like(d), 0.0, []
    for _ in range(120):
        w = d * v - beta * before
        alpha = w @ v
        w = w - alpha * v
        rows.append((alpha, w.norm()))
        before, beta = v, w.norm()
        v = w / beta
    alphas, betas = torch.tensor(rows, dtype=torch.float64).T
    T = alphas.diag() + betas[:-1].diag(1) + betas[:-1].diag(-1)
    assert (torch.linalg.eigvalsh(T) > 9e3).sum() > 1


def test_c2_batches_count_by_their_size():
    x, y = examples(100)
    x[96:] *= 5
    model = network()
    exact = hessian_of(model, x, y)
    H = hessian(Objective(model, CROSS, [(x[:96], y[:96]), (x[96:], y[96:])])).to_dense()
    torch.testing.assert_close(H, exact, rtol=1e-9, atol=1e-12)
    equally = (hessian_of(model, x[:96], y[:96]) + hessian_of(model, x[96:], y[96:])) / 2
    assert (equally - exact).norm() > 0.5 * exact.norm()


def test_c3_products_are_exact_on_relu_networks():
    x, y = examples(200)
    model = network(nn.ReLU, (6, 20, 20, 3))
    params = tuple(model.parameters())
    v = tuple(torch.randn_like(p) for p in params)
    exact = hessian_of(model, x, y) @ vec.flatten(v)
    objective = Objective(model, CROSS, (x, y))
    torch.testing.assert_close(vec.flatten(hessian(objective).mv(v)), exact, rtol=1e-9, atol=1e-11)
    g = vec.flatten(objective.gradient())
    step = 1e-2 * vec.norm(params).item() / vec.norm(v).item()
    with torch.no_grad():
        for p, t in zip(params, v, strict=True):
            p += step * t
    differences = (vec.flatten(objective.gradient()) - g) / step
    assert (differences - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("mode", ["eval", "train", "unchanged"])
@pytest.mark.parametrize("training", [True, False])
def test_c4_a_measurement_changes_nothing(training, mode):
    x, y = examples()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3)).double()
    model(x)
    model.train(training)
    model[2].eval()
    model[1].train(not training)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    before, versions, modes = [t.clone() for t in tensors], [t._version for t in tensors], [m.training for m in model.modules()]
    random = torch.get_rng_state()
    objective = Objective(model, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])], mode=mode, seed=5)
    objective.value(), objective.gradient()
    for map in (hessian(objective), gauss_newton(objective), hessian(objective.double())):
        condition_number(map, method="lanczos", max_products=5), eigenvalues(map), spectral_density(map)
        trace(map), diagonal(map), map.to_dense()
    condition_number(hessian(objective), float64=True), invariances(objective)
    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(a is b for a, b in zip(after, tensors, strict=True)) and versions == [t._version for t in after]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("budget", [2, 3, 5, 8, 12, 20, 30])
def test_c5_no_plausible_kappa_of_an_indefinite_hessian(budget):
    x, y = examples()
    for seed in range(3):
        model = network(nn.Tanh, seed=seed)
        assert torch.linalg.eigvalsh(hessian_of(model, x, y))[0] < -1e-3
        found = condition_number(hessian(Objective(model, CROSS, (x, y))), method="lanczos", max_products=budget, seed=seed)
        for name in ("kappa", "kappa_positive"):
            with pytest.raises(CurvatureError):
                getattr(found, name)


@pytest.mark.parametrize(("kappa", "resolved"), [(1e2, True), (1e5, False), (1e8, False)])
def test_c6_float32_says_what_it_cannot_resolve(kappa, resolved):
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(50, 12, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    X = (U * torch.logspace(0, -0.5 * torch.log10(torch.tensor(kappa)).item(), 12, dtype=torch.float64) @ V.T).float()
    exact = torch.linalg.eigvalsh(X.double().T @ X.double()) * 2 / 50
    model = nn.Linear(12, 1, bias=False)
    H = hessian(Objective(model, nn.MSELoss(), (X, torch.zeros(50, 1))))
    for method in ("dense", "lanczos"):
        found = condition_number(H, method=method, tol=1e-3)
        assert (found.why is None) == resolved and abs(found.lam_min - exact[0]) <= found.lam_min_error
        if not resolved and "null" not in found.why:
            assert "float64=True" in found.why
        double = condition_number(H, method=method, tol=1e-6, float64=True)
        assert double.kappa == pytest.approx((exact[-1] / exact[0]).item(), rel=1e-6)


def test_c7_the_smallest_positive_eigenvalue_is_no_echo_of_the_threshold():
    torch.manual_seed(0)
    d = 10 ** (-20 * torch.rand(400, dtype=torch.float64))
    for null_tol in (1e-10, 1e-8, 1e-6):
        found = condition_number(Diagonal((d,)), null_tol=null_tol)
        assert found.lam_min_positive < 3 * found.threshold and "echoes the threshold" in found.why_positive
    torch.manual_seed(0)
    x = torch.randn(300, 3, dtype=torch.float64)
    teacher, model = network(nn.LeakyReLU, (3, 3, 1)), network(nn.LeakyReLU, (3, 3, 1))
    y = teacher(x).detach() + 0.01 * torch.randn(300, 1, dtype=torch.float64)
    loss = nn.MSELoss()
    params = tuple(model.parameters())
    for _ in range(12):
        g = vec.flatten(torch.autograd.grad(loss(model(x), y), params))
        step = torch.linalg.pinv(hessian_of(model, x, y, loss=loss), rtol=1e-6, hermitian=True) @ g
        with torch.no_grad():
            for p, t in zip(params, vec.unflatten(step, params), strict=True):
                p -= t
    exact = torch.linalg.eigvalsh(hessian_of(model, x, y, loss=loss))
    objective = Objective(model, loss, (x, y))
    null = invariances(objective)
    assert g.norm() < 1e-14 and null.dim == 3 == int((exact.abs() < 1e-14).sum()) and exact[3] > 1e-3
    for method in ("dense", "lanczos"):
        found = condition_number(hessian(objective), method=method, tol=1e-8, deflate=null)
        assert found.kappa == pytest.approx((exact[-1] / exact[3]).item(), rel=1e-7)
    # Near the minimum these directions have tiny curvatures of either sign, which a threshold does not tell from others.
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-4 * torch.randn_like(p)
    kappa = found.kappa
    raw = condition_number(hessian(objective), tol=1e-6)
    assert raw.why_positive is not None or abs(raw.kappa_positive / kappa - 1) > 1
    assert condition_number(hessian(objective), tol=1e-6, deflate=invariances(objective)).kappa == pytest.approx(
        kappa, rel=1e-2
    )


def test_c8_every_eigenvalue_is_within_its_residual():
    x, y = examples()
    model = network()
    minimized(model, x, y, 1e-4)
    A = hessian_of(model, x, y)
    exact = torch.linalg.eigvalsh(A)
    H = hessian(Objective(model, CROSS, (x, y)))
    for budget in (10, 20, 30, 45):
        found = eigenvalues(H, 3, "both", tol=1e-9, method="lanczos", max_products=budget)
        for value, x_, residual, error, resolved in zip(
            found.values, found.vectors, found.residuals, found.errors, found.resolved, strict=True
        ):
            v = vec.flatten(x_)
            assert (A @ v - value * v).norm() <= residual + 1e-14
            assert (exact - value).abs().min() <= residual + 1e-14
            if resolved:
                assert (exact - value).abs().min() <= error + 1e-14


class Attention(nn.Module):
    """Self-attention over a short sequence, by torch's function or by hand."""

    def __init__(self, kind: str, backend: SDPBackend | None = None):
        super().__init__()
        self.qkv, self.head, self.kind, self.backend = nn.Linear(4, 12), nn.Linear(4, 3), kind, backend

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.kind == "function":
            with sdpa_kernel(self.backend) if self.backend is not None else contextlib.nullcontext():
                h = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            h = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.head(h.mean(1))


def test_c9_attention_has_second_derivatives():
    torch.manual_seed(0)
    x, y = torch.randn(8, 5, 4), torch.randint(0, 3, (8,))
    fused = Attention("function")
    with pytest.raises(RuntimeError, match="derivative"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        g = torch.autograd.grad(CROSS(fused(x), y), fused.qkv.weight, create_graph=True)[0]
        torch.autograd.grad(g.square().sum(), fused.qkv.weight)
    by_hand = Attention("by hand").double()
    by_hand.load_state_dict(fused.state_dict())
    exact = hessian_of(by_hand, x.double(), y)
    found = hessian(Objective(fused, CROSS, (x, y)).double()).to_dense()
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
    forced = Attention("function", SDPBackend.FLASH_ATTENTION)
    with pytest.raises(NoSecondDerivative, match="without forcing a fused kernel"):
        hessian(Objective(forced, CROSS, (x, y))).mv(tuple(torch.ones_like(p) for p in forced.parameters()))


@pytest.mark.parametrize(("activation", "apart"), [(nn.Tanh, True), (nn.ReLU, False)])
def test_c10_the_curvature_of_a_neuron_is_not_that_of_gauss_newton(activation, apart):
    x, y = examples(60)
    model = network(activation, (6, 5, 3))
    objective = Objective(model, CROSS, (x, y))
    H, G = hessian_of(model, x, y), gauss_newton(objective).to_dense()
    for unit in range(5):
        at = torch.tensor([30 + unit, *range(6 * unit, 6 * unit + 6)])  # [b, w]
        block = H[at][:, at]
        torch.testing.assert_close(neuron_hessian(objective, "0", unit).to_dense(), block, rtol=1e-8, atol=1e-11)
        off = (G[at][:, at] - block).norm() / block.norm()
        assert off > 0.3 if apart else off < 1e-9


def test_a_refusal_names_the_remedy():
    d = 10 ** (-6 * torch.rand(600, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(NotResolved, match=r"float64=True|max_products"):
        _ = condition_number(Diagonal((d,)), method="lanczos", max_products=550, null_tol=1e-7).kappa
