"""Whitening to a power against eigendecompositions of explicit covariances, and what it is at its ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond import BNP, PreconditionedGD, Whitening

SAMPLES, INPUTS, OUTPUTS = 40, 5, 3
GENERATOR = torch.Generator().manual_seed(4)
MIX = torch.randn(INPUTS, INPUTS, generator=GENERATOR, dtype=torch.float64) * torch.tensor([100.0, 1.0, 1.0, 0.01, 3.0])
X = torch.randn(SAMPLES, INPUTS, generator=GENERATOR, dtype=torch.float64) @ MIX + 2.0


def M(preconditioner, bias=True, dtype=torch.float64):
    """M of a layer that has seen X once and is refreshed, dense, a row [w b] after the other."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)
    optimizer = PreconditionedGD(layer, 1e-9, preconditioner=preconditioner)
    for _ in range(2):  # the map of the second step is the one that the first has refreshed
        optimizer.zero_grad()
        layer(X.to(dtype)).square().mean().backward()
        optimizer.step()
    P = optimizer.map().to_dense()
    found = P @ P.T
    n = OUTPUTS * INPUTS
    rows = [[*range(k * INPUTS, (k + 1) * INPUTS), *([n + k] if bias else [])] for k in range(OUTPUTS)]
    mixed = found.clone()
    for row in rows:
        mixed[torch.tensor(row)[:, None], torch.tensor(row)] = 0
    assert not mixed.any()  # rows do not mix
    return torch.stack([found[torch.tensor(row)[:, None], torch.tensor(row)] for row in rows])


def explicit(power, bias=True, rank=None):
    """U·diag(D⁻¹K^(−p)D⁻¹, 1)·Uᵀ on [w b]."""
    mean = X.mean(0) if bias else torch.zeros(INPUTS, dtype=X.dtype)
    C = (X - mean).T @ (X - mean) / SAMPLES
    D = C.diagonal().sqrt()
    values, V = torch.linalg.eigh(C / D[:, None] / D)
    if rank is not None:
        values[:-rank] = values[:-rank].mean()
    inner = V @ torch.diag(values**-power) @ V.T / D[:, None] / D
    if not bias:
        return inner
    U = torch.eye(INPUTS + 1, dtype=X.dtype)
    U[INPUTS, :INPUTS] = -mean
    return U @ torch.block_diag(inner, torch.ones(1, 1, dtype=X.dtype)) @ U.T


EXACT = {"damping": 0.0, "shrinkage": 0.0, "every": 1, "decay": 0.0}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
def test_the_map_is_the_explicit_power(power, bias):
    expected = explicit(power, bias)
    for row in M(Whitening(power=power, **EXACT), bias):
        # κ of the correlations is 1e4 or so: a rounding of 2e-16 in them is 1e-11 in their inverse; relative to the largest entry.
        assert (row - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_same_of_leading_eigenvalues(power):
    # One step of orthogonal iteration from fixed columns, and another from there: eigenvectors to some digits only.
    expected = explicit(power, rank=1)
    for row in M(Whitening(power=power, rank=1, **EXACT)):
        assert (row - expected).abs().max() <= 0.05 * expected.abs().max()


def test_at_its_ends_it_is_whitening_and_the_arrow_of_bnp():
    torch.testing.assert_close(M(Whitening(**EXACT)), M(Whitening(power=1.0, **EXACT)), rtol=0, atol=0)
    arrow = M(BNP(decay=0.0, damping=0.0))
    torch.testing.assert_close(M(Whitening(power=0.0, **EXACT)), arrow, rtol=1e-9, atol=1e-12 * float(arrow.abs().max()))


def test_units_do_not_matter_whatever_the_power():
    scales = torch.tensor([1e3, 1.0, 1e-2, 1.0, 7.0], dtype=torch.float64)
    before = M(Whitening(power=0.5, **EXACT), bias=False)
    global X
    kept, X = X, X * scales
    try:
        after = M(Whitening(power=0.5, **EXACT), bias=False)
    finally:
        X = kept
    torch.testing.assert_close(after * scales * scales[:, None], before, rtol=1e-8, atol=1e-10 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"power": 1.5}, r"power must be in \[0, 1\], got 1.5"), ({"power": 0.5, "root": "cholesky"}, "use root='symmetric'")],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        Whitening(**options)
