"""Whitening of a rank against explicit eigenvalues in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import PreconditionedGD, Whitening
from precond.optim.preconditioners.correlation import Correlation, Whole

N = 13


def stepped(batches: list[Tensor], P: Whitening, bias: bool = True) -> PreconditionedGD:
    """The optimizer of a layer that received some batches."""
    model = nn.Linear(N, 2, bias=bias).to(batches[0].dtype)
    optimizer = PreconditionedGD(model, lr=1e-4, preconditioner=P)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def on_rows(optimizer: PreconditionedGD) -> Tensor:
    """M = P Pᵀ on the inputs of one row."""
    P = optimizer.map().to_dense()
    return (P @ P.T)[:N, :N]


def correlated(size: int = 30, seed: int = 0) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=make, dtype=torch.float64)  # noqa: E731
    scales = torch.logspace(-2, 2, N, dtype=torch.float64)
    return (random(size, 2) @ random(2, N) * 3 + random(size, N)) * scales + 5 * random(N)


def parts(x: Tensor, bias: bool, shrinkage: float) -> tuple[Tensor, Tensor]:
    """D and K of a batch."""
    h = x - x.mean(0) if bias else x
    C = h.T @ h / len(x)
    D = C.diagonal().sqrt()
    gamma = shrinkage * N / (len(x) + shrinkage * N)
    return D, (1 - gamma) * C / D[:, None] / D + gamma * torch.eye(N, dtype=x.dtype)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_leading_eigenvalues_are_kept_and_the_others_are_their_mean(bias: bool, shrinkage: float, rank: int) -> None:
    x = correlated()
    optimizer = stepped([x] * 100, Whitening(0.0, 0.0, every=1, observe_steps=1, shrinkage=shrinkage, rank=rank), bias)
    D, K = parts(x, bias, shrinkage)
    values, V = torch.linalg.eigh(K)
    values[: N - rank] = values[: N - rank].mean()
    wanted = (V / values) @ V.T / D[:, None] / D
    scale = D[:, None] * D
    torch.testing.assert_close(on_rows(optimizer) * scale, wanted * scale, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_is_of_that_form_is_inverted_exactly(rank: int) -> None:
    """Features that correlate alike, ρ = 0.8: K = 0.2·I + 0.8·11ᵀ, whatever their scales."""
    signs = torch.tensor([[(-1.0) ** (i >> k) for k in range(N + 1)] for i in range(2 ** (N + 1))], dtype=torch.float64)
    x = (signs[:, 1:] * 0.2**0.5 + signs[:, :1] * 0.8**0.5) * torch.logspace(-1, 1, N, dtype=torch.float64)
    C = x.T @ x / len(x)
    optimizer = stepped([x] * 20, Whitening(0.0, 0.0, every=1, observe_steps=1, shrinkage=0.0, rank=rank))
    torch.testing.assert_close(on_rows(optimizer) @ C, torch.eye(N, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_features_that_are_always_zero_do_not_hide_the_others() -> None:
    """Found at the first refresh, from few batches: one direction among the last features leads by far."""
    x = correlated(200) * (torch.arange(N) > 5)
    x[:, 6:] += 20 * x[:, 6:7] * x.std(0)[6:] / x.std(0)[6]
    optimizer = stepped([x] * 2, Whitening(0.0, 0.0, every=100, observe_steps=1, shrinkage=0.0, rank=2))
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    C = torch.corrcoef(x[:, 6:].T)
    value, vector = (t[..., -1] for t in torch.linalg.eigh(C))
    torch.testing.assert_close(state["leading"][0, -1] ** -2, value, rtol=1e-3, atol=0)
    assert (state["basis"][0, 6:, -1] @ vector).abs() > 0.999


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_the_trace_of_K_is_kept_on_the_way(steps: int) -> None:
    """Σ1/s² + (n − r)/a² = n, with orthonormal U, after any refresh."""
    optimizer = stepped([correlated(seed=t) for t in range(steps)], Whitening(every=4, rank=2))
    state = next(iter(optimizer.state.values()))
    U, s, a = state["basis"][0], state["leading"][0], state["rest"][0]
    torch.testing.assert_close(U.T @ U, torch.eye(2, dtype=U.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((s**-2).sum() + (N - 2) * a**-2, torch.tensor(float(N), dtype=U.dtype), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["zero", "first features zero", "one direction", "constant", "huge", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_degenerate_inputs(kind: str, dtype: torch.dtype) -> None:
    x = correlated()
    x = {
        "zero": 0 * x,
        "first features zero": x * (torch.arange(N) > 3),
        "one direction": x[:, :1] * torch.arange(1.0, N + 1),
        "constant": x[:1].expand_as(x),
        "huge": 1e15 * x,
        "tiny": 1e-15 * x,
    }[kind].to(dtype)
    optimizer = stepped([x] * 9, Whitening(every=4, rank=2))
    for p, state in optimizer.state.items():
        assert p.isfinite().all() and all(t.isfinite().all() for t in state.values())
    v = tuple(torch.randn_like(p) for p in optimizer.param_groups[0]["params"])
    P = optimizer.map()
    for there, back in zip(P.solve(P.mv(v)), v, strict=True):
        assert ((there - back).norm() / back.norm()) < (1e-2 if dtype == torch.float32 else 1e-7)


def test_layers_of_few_inputs_keep_all_of_K() -> None:
    """Up to 4r inputs."""
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3))
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=Whitening(rank=2))
    assert "factor" in optimizer.state[model[0].weight] and "basis" not in optimizer.state[model[0].weight]
    assert "basis" in optimizer.state[model[1].weight] and optimizer.state[model[1].weight]["basis"].shape == (1, 9, 2)


@pytest.mark.parametrize(
    ("rank", "error"), [(0, ValueError), (-2, ValueError), (1.5, ValueError), ("3", TypeError), (True, TypeError)]
)
def test_a_rank_is_a_whole_number(rank: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Whitening: rank must be"):
        Whitening(rank=rank)


def test_roots_taken_at_once_are_those_of_each() -> None:
    """K = (1 − γ)D⁻¹CD⁻¹ + γI in float64 by Cholesky; one matrix that has no such factor takes it from no other."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, 6, generator=make, dtype=torch.float64)
    C, mean = x.mT @ x / 40, x.mean(1)
    C[3] = 20 - 19 * torch.eye(6)  # no covariance: of eigenvalues 101 and −19
    std = C.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    shrunk: list[Any] = [1.1, torch.tensor([[1.2], [1.3]], dtype=torch.float64), 1.4, 1.5]
    groups = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)]
    of = [Correlation(C[g], mean[g] if k < 2 else None, std[g], s) for k, (g, s) in enumerate(zip(groups, shrunk, strict=True))]
    states = [{"factor": torch.zeros_like(K.covariance)} for K in of]
    Whole("cholesky").renew(states, of)
    for k in (0, 1, 3):
        centered = C[groups[k]] + (mean[groups[k], :, None] * mean[groups[k], None, :] if k < 2 else 0)
        scaled = centered / (std[groups[k], :, None] * std[groups[k], None, :])
        gamma = 1 - 1 / torch.as_tensor(shrunk[k], dtype=torch.float64).reshape(-1, 1, 1)
        K = (1 - gamma) * scaled + gamma * torch.eye(6)
        K.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        expected = torch.linalg.inv(torch.linalg.cholesky(K)).mT
        torch.testing.assert_close(states[k]["factor"], expected, rtol=1e-10, atol=1e-10)  # conditions of K below 10³
