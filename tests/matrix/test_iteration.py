"""A step of orthogonal iteration: the columns that are taken, in which order, and what completes them, wherever SQ is kept."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from matrix import oracles
from precond.optim.preconditioners import iteration
from precond.optim.preconditioners.iteration import follow

WAYS = ["processor", "accelerator", "in place", "in place, by columns"]


@contextmanager
def way(name: str, n: int):
    """As an accelerator is told, which cannot look, and with little memory."""
    accelerator = mock.patch.object(iteration, "at_hand", lambda t: False)
    pieces = {"in place": 8 * 2 * n, "in place, by columns": 1}  # bytes: of two rows, of none
    with (
        accelerator if name != "processor" else mock.MagicMock(),
        mock.patch.object(iteration, "PIECE", pieces.get(name, 2**23)),
    ):
        yield


def oracle(S: Tensor, Q: Tensor, least: float = 1e-6) -> tuple[list[int], Tensor]:
    """The order, and the new Q: Gram–Schmidt of the independent columns of SQ, the largest qᵀSq first, and the reflections of these.

    Where some depend on others, those independent are told by SQ + 10⁻⁹λI, λ = max qᵀSq. What is near a bound is left to other tests.
    """
    Y, n = S @ Q, len(S)
    sizes = (Q * Y).sum(0)
    largest = float(sizes.max())
    sizes = (sizes / largest).tolist()
    order = sorted(range(n), key=lambda j: (-sizes[j] if sizes[j] > least else 0.0, j))
    gaps = [abs(sizes[i] - sizes[j]) for i, j in itertools.pairwise(order)]
    assume(all(g == 0 or g > 1e-9 for g in gaps) and all(s < 1e-12 or s > 1e-3 for s in sizes))
    Y = Y[:, order]
    rests = triangle(Y)
    if not all(r > least for r in rests) or min(sizes) < least:
        rests = triangle(Y + 1e-3 * least * largest * torch.eye(n, dtype=S.dtype))
    assume(all(r < 1e-7 or r > 1e-3 for r in rests))
    taken = [j for j, r in enumerate(rests) if r > least]
    U = oracles.gram_schmidt(Y[:, taken])
    left = [order[j] for j in range(n) if j not in taken]
    return [order[j] for j in taken] + left, torch.cat([U, oracles.reflections(U)[:, len(taken) :]], 1)


def triangle(Y: Tensor) -> list[float]:
    """What is left of each column without those before it, by the most."""
    rests, U = [], Y[:, :0]
    for y in Y.T:
        size = float(y.norm())
        for _ in range(3):
            y = y - U @ (U.T @ y)
        rests.append(float(y.norm()))
        if rests[-1] > 1e-13 * size:
            U = torch.cat([U, (y / y.norm())[:, None]], 1)
    return [r / max(rests) for r in rests]


@st.composite
def matrices(draw, n):
    """S = GGᵀ of whole numbers, so that exact: of any rank but 0, with rows that are zero and rows alike; Q."""
    columns = draw(st.integers(1, n + 1))
    rows = [draw(st.lists(st.integers(-3, 3), min_size=columns, max_size=columns)) for _ in range(n)]
    if draw(st.booleans()):
        rows[draw(st.integers(0, n - 1))] = rows[draw(st.integers(0, n - 1))]
    G = torch.tensor(rows, dtype=torch.float64)
    assume(bool(G.any()))
    Q = torch.eye(n, dtype=torch.float64)[:, torch.tensor(draw(st.permutations(range(n))))]
    if draw(st.booleans()):
        make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        Q = torch.linalg.qr(torch.randn(n, n, generator=make, dtype=torch.float64)).Q
    return G @ G.T, Q


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_step_is_the_oracle_s(name, data):
    """Errors are u times the condition of columns that are independent by 1e-3, a few of them: below 1e-8."""
    n, k = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 2))
    pairs = [data.draw(matrices(n)) for _ in range(k)]
    S, Q = (torch.stack(x) for x in zip(*pairs, strict=True))
    expected = [oracle(*pair) for pair in pairs]
    with way(name, n):
        order = follow(S, Q)
    assert order is not None
    for k, (theirs, basis) in enumerate(expected):
        assert order[k].tolist() == theirs
        torch.testing.assert_close(Q[k], basis, rtol=0, atol=1e-8)
        torch.testing.assert_close(Q[k].T @ Q[k], torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [33, 20, 1])
def test_bases_come_to_be_eigenvectors(name, dtype, rank):
    """Of eigenvalues 1, 0.6, 0.36, … and zeros, in 60 steps: to rounding by the gap to the next one, but orthonormal to rounding alone."""
    n, u = 33, torch.finfo(dtype).eps
    make = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(n, n, generator=make, dtype=torch.float64)).Q[:, :rank]
    values = 0.6 ** torch.arange(rank, dtype=torch.float64)
    S, Q = ((V * values) @ V.T).to(dtype)[None], torch.eye(n, dtype=dtype)[None].clone()
    with way(name, n):
        for _ in range(60):
            follow(S, Q)
    assert (Q[0].T @ Q[0] - torch.eye(n)).abs().amax() < 8 * n**0.5 * u
    leading = min(rank, 12)
    cosines = (V.to(dtype) * Q[0, :, :rank]).sum(0).abs()[:leading]
    torch.testing.assert_close(cosines, torch.ones(leading, dtype=dtype), rtol=0, atol=100 * n * u / values[leading - 1].item())


@pytest.mark.parametrize("name", WAYS)
def test_bases_that_may_not_move_stay(name):
    """Of S = 0, one that is not finite, and one that is told to: to rounding, in float32. The others follow as if alone."""
    n, make = 9, torch.Generator().manual_seed(0)
    G = torch.randn(5, n, n, generator=make)
    S, Q = G @ G.mT, torch.linalg.qr(torch.randn(5, n, n, generator=make)).Q.contiguous()
    S[0], S[1, 2, 3], S[2, 4, 4] = 0.0, torch.nan, torch.inf
    may = torch.tensor([True, True, True, False, True])
    before, alone = Q.clone(), Q[4:].clone()
    with way(name, n), mock.patch.object(iteration, "kept"):
        order = follow(S, Q, may)
        follow(S[4:], alone)
    assert order is not None and order[:4].tolist() == [list(range(n))] * 4
    torch.testing.assert_close(Q[:4], before[:4], rtol=0, atol=20 * torch.finfo(Q.dtype).eps)
    torch.testing.assert_close(Q[4:], alone, rtol=0, atol=1e-5)
    assert (Q[4] - before[4]).abs().amax() > 0.1
