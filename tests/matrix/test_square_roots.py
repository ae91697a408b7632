"""Inverse square roots by products, beside eigenvectors in float64."""

import pytest
import torch

from precond.optim.preconditioners.polar_roots import renew_whole
from precond.optim.preconditioners.square_roots import inverse_square_roots, together

EYE = torch.eye


def gram(n: int, rank: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Of trace 1, with eigenvalues from 1 down to about ``spread``², and zeros."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    X = Q[:, :rank] * torch.logspace(0, torch.tensor(spread).log10().item(), rank, dtype=torch.float64)
    L = X @ X.T
    return L / L.trace()


def oracle(L: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    values, V = torch.linalg.eigh(L.double())
    damped = values.clamp_min(0) + damping * values[-1]
    return (V * damped**-0.5) @ V.T, float((values.clamp_min(0) / damped).sum())


@pytest.mark.parametrize("damping", [1e-4, 1e-3, 1e-2, 1.0])
def test_they_are_those_of_eigenvectors(damping: float) -> None:
    Ls = [gram(n, rank, spread, n) for n in (5, 17, 33, 49, 64, 120) for rank in (1, n // 2, n) for spread in (1.0, 0.1, 1e-4)]
    Ls += [1e-9 * Ls[4], 1e9 * Ls[4]]
    for L, found in zip(Ls, inverse_square_roots([L.float() for L in Ls], damping), strict=True):
        root, rank = oracle(L.float(), damping)
        assert found is not None
        # The polynomials end within 1e-4 of 1; beside that rounding of L by n·6e-8 changes its damped eigenvalues by a share of n·6e-8/ε.
        error = 2e-4 + len(L) * 6e-8 / damping
        assert (found[0] - root).norm() <= error * root.norm()
        assert abs(found[1].item() - rank) <= 2 * error * len(L)


def test_what_is_not_known_is_left_to_eigenvectors() -> None:
    fine = gram(40, 40, 0.1).float()
    found = inverse_square_roots([fine, torch.zeros(40, 40), torch.full((40, 40), torch.nan), fine * torch.inf], 1e-3)
    assert [f is not None for f in found] == [True, False, False, False]
    roots = [EYE(40) * 2, EYE(40) * 2, EYE(40) * 2]
    with pytest.warns(UserWarning, match="holds inf or NaN"):
        ranks = renew_whole(roots, [fine, torch.zeros(40, 40), torch.full((40, 40), torch.nan)], 1e-3)
    torch.testing.assert_close(roots[0], oracle(fine, 1e-3)[0].float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(roots[1], EYE(40)) and ranks[1] == 0 and torch.equal(roots[2], EYE(40) * 2)


def test_what_is_not_positive_is_left_to_eigenvectors() -> None:
    """As rounding to 16 bits leaves a matrix of one large eigenvalue: others at −6e-4 of it, for a damping of 1e-3."""
    Q = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    L = ((Q * torch.cat([torch.ones(1), torch.full((127,), -6e-4)])) @ Q.T).float()
    assert inverse_square_roots([L], 1e-3) == [None]
    root = EYE(128)
    (rank,) = renew_whole([root], [L], 1e-3)
    expected, directions = oracle(L, 1e-3)
    assert abs(rank.item() - directions) < 1e-2
    torch.testing.assert_close(root, expected.float(), rtol=1e-3, atol=1e-2)


def test_double_precision_is_exact() -> None:
    L, root = gram(40, 40, 0.1), EYE(40, dtype=torch.float64)
    (rank,) = renew_whole([root], [L], 1e-3)
    expected, directions = oracle(L, 1e-3)
    torch.testing.assert_close(root, expected, rtol=1e-9, atol=1e-9)
    assert abs(rank.item() - directions) < 1e-9


def test_sizes_are_joined_where_zeros_cost_less_than_calls() -> None:
    assert together([8, 64, 8, 60, 16]) == [[0, 2, 4], [3, 1]]
    assert together([128, 8]) == [[1], [0]]
    assert sorted(i for some in together([5, 300, 90, 91, 7]) for i in some) == [0, 1, 2, 3, 4]
