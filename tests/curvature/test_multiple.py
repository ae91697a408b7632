"""Multiple eigenvalues, null spaces and clusters against prescribed spectra; how many products they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvature.cases import examples, hessian_of, penalized
from precond.algebra.maps import Dense, Diagonal
from precond.analysis.curvature import Objective, condition_number, eigenvalues, hessian
from precond.analysis.curvature.condition import _Ends
from precond.analysis.curvature.lanczos import Ritz
from precond.analysis.curvature.spectrum import Spectrum
from precond.analysis.curvature.symmetric import SymmetricMap


class Turned(SymmetricMap):
    """diag(d) behind a reflection, so that no coordinate shows an eigenvector; it counts its products."""

    def __init__(self, d: torch.Tensor, seed: int = 0):
        u = torch.randn(len(d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.d, self.u, self.count, self.like = d, u / u.norm(), 0, (torch.zeros_like(d),)

    def mm(self, block):
        self.count += len(block[0])
        x = block[0] - 2 * torch.outer(block[0] @ self.u, self.u)
        x = x * self.d
        return (x - 2 * torch.outer(x @ self.u, self.u),)

    def mv(self, v):
        return (self.mm((v[0][None],))[0][0],)


def spectrum(*parts: tuple[float, int] | torch.Tensor) -> torch.Tensor:
    """Eigenvalues with their multiplicities, and tensors of more."""
    return torch.cat([p if isinstance(p, torch.Tensor) else torch.full((p[1],), p[0], dtype=torch.float64) for p in parts])


def uniform(low: float, high: float, n: int, seed: int = 0) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wanted(d: torch.Tensor, k: int, which: str) -> torch.Tensor:
    ascending = d.sort().values
    ends = {"largest": ascending.flip(0)[:k], "smallest": ascending[:k], "both": torch.cat([ascending[:k], ascending[-k:]])}
    return ends[which]


SPECTRA = {
    "copies above": spectrum((9.0, 3), (8.0, 2), uniform(0, 5, 200)),
    "copies below": spectrum((1e-2, 4), (2e-2, 2), uniform(0.1, 5, 200)),
    "weight decay": spectrum((1e-2, 150), 1e-2 + uniform(0.1, 5, 60)),
    "a null space": spectrum((0.0, 150), uniform(1, 2, 60)),
    "a small null space": spectrum((0.0, 2), uniform(1, 2, 60), uniform(5, 6, 60)),
    "identity": spectrum((1.0, 120)),
    "identity and two": spectrum((1.0, 120), (5.0, 2)),
    "rank one": spectrum((0.0, 119), (3.0, 1)),
    "clusters": spectrum((4.0, 3), (4.0 + 1e-7, 2), (1.0, 3), (1.0 - 1e-7, 2), uniform(1.5, 3, 100)),
    "both signs": spectrum((-2.0, 3), (2.0, 3), uniform(-1, 1, 120)),
    "a single number": spectrum((3.0, 1)),
    "two numbers": spectrum((3.0, 2)),
    "all null": spectrum((0.0, 30)),
}


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("name", SPECTRA)
def test_copies_are_found(name, which, tol):
    d = SPECTRA[name]
    k = min(5, len(d) // 2 if which == "both" and len(d) > 1 else len(d))
    which = "largest" if len(d) == 1 else which
    map = Turned(d)
    found = eigenvalues(map, k, which, tol=tol, method="lanczos")
    assert found.converged and found.complete and map.count == found.products
    # tol is what was asked for; what counts as null is known up to the threshold.
    torch.testing.assert_close(found.values, wanted(d, k, which), rtol=tol, atol=2 * found.threshold + 1e-13)
    vectors = torch.stack([v[0] for v in found.vectors])
    # Of Ritz vectors of one orthonormal basis.
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-8)
    for value, v, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert (map.mv(v)[0] - value * v[0]).norm() <= residual + 1e-12 * d.abs().max()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -1.0, 3.0, 1e-3, 1 + 1e-5, -7.0]), st.integers(1, 7)), min_size=1, max_size=5
    ),
    st.integers(0, 60),
    st.integers(1, 6),
    st.sampled_from(["largest", "smallest", "both"]),
    st.sampled_from([1e-3, 1e-6]),
    st.sampled_from([1, 1, 3]),
    st.integers(0, 9),
)
def test_random_multiplicities(parts, others, k, which, tol, block, seed):
    d = spectrum(*parts, uniform(-1, 1, others, seed))
    if len(d) < 2 * k:
        k, which = 1, "largest"
    found = eigenvalues(Turned(d, seed), k, which, tol=tol, method="lanczos", block=block, seed=seed)
    if found.converged:
        # Two that are closer together than a few residuals, at most √(tol·λ·gap/2) by then, may be taken for one, as documented.
        close = 1e-5 if {1.0, 1 + 1e-5} <= set(d.tolist()) else 0.0
        torch.testing.assert_close(found.values, wanted(d, k, which), rtol=3 * tol, atol=close + 2 * found.threshold + 1e-13)
        assert all((d - x).abs().min() <= r + 1e-12 for x, r in zip(found.values, found.residuals, strict=True))
    dense = eigenvalues(Dense(Turned(d, seed).to_dense()), k, which, method="dense")
    torch.testing.assert_close(dense.values, wanted(d, k, which), rtol=1e-10, atol=1e-12)
    assert dense.complete


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("name", ["copies above", "copies below"])
def test_what_was_not_looked_for_is_not_called_converged(name, which):
    d, resolved = SPECTRA[name], 0
    for budget in range(8, 60, 4):
        found = eigenvalues(Turned(d), 4, which, tol=1e-2, method="lanczos", max_products=budget)
        assert found.products <= budget + 1
        resolved += bool(found.resolved.all()) and not found.complete
        assert torch.allclose(found.values, wanted(d, 4, which), rtol=2e-2) or not found.converged
        assert found.complete or ("may be missing: raise max_products" in str(found) and not found.converged)
    assert resolved or (name, which) != ("copies above", "largest")


def test_a_block_wider_than_what_is_left_of_the_space():
    d = spectrum((1.0, 2), (0.5, 1), (0.0, 23), uniform(-0.1, 0.1, 3))
    for seed in range(8):
        found = eigenvalues(Turned(d, seed), 6, method="lanczos", tol=1e-8, block=7, seed=seed)
        assert found.converged
        torch.testing.assert_close(found.values, wanted(d, 6, "largest"), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block", [2, 3, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_blocks_that_lose_their_rank(name, block):
    # A block with fewer copies than vectors shrinks as it converges; what is left of it must stay orthogonal to the rest.
    d = SPECTRA[name]
    k = min(7, len(d))
    found = eigenvalues(Turned(d), k, method="lanczos", tol=1e-8, block=block)
    assert found.converged
    torch.testing.assert_close(found.values, wanted(d, k, "largest"), rtol=1e-7, atol=2 * found.threshold + 1e-13)


@pytest.mark.parametrize("basis", [24, 40])
def test_copies_across_restarts(basis):
    d = SPECTRA["copies above"]
    found = eigenvalues(Turned(d), 4, tol=1e-6, method="lanczos", basis=basis)
    right = torch.allclose(found.values, wanted(d, 4, "largest"), rtol=1e-6)
    assert right and found.residuals.max() < 1e-2


def test_softmax_with_weight_decay():
    x, y = examples(80)
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    H = hessian(Objective(model, penalized(model, 1e-2), [(x, y)]))
    exact = torch.linalg.eigvalsh(hessian_of(model, x, y, 1e-2))
    # All classes moved together: seven copies of the penalty's curvature.
    assert (exact[:7] - 1e-2).abs().max() < 1e-12
    for k in (2, 5, 7, 9):
        found = eigenvalues(H, k, "smallest", tol=1e-6, method="lanczos")
        assert found.converged
        torch.testing.assert_close(found.values, exact[:k], rtol=1e-6, atol=1e-12)
    found = condition_number(H, tol=1e-6, method="lanczos")
    assert abs(found.kappa - float(exact[-1] / exact[0])) <= found.kappa_error + 1e-9


@pytest.mark.parametrize(
    ("null", "positive", "tol"), [(900, 300, 1e-6), (900, 300, 1e-3), (1500, 1500, 1e-6), (1500, 100, 1e-9)]
)
@pytest.mark.parametrize("seed", range(2))
def test_the_smallest_positive_eigenvalue_behind_a_large_null_space(null, positive, tol, seed):
    d = spectrum((0.0, null), uniform(1, 2, positive, seed))
    found = condition_number(Turned(d, seed), method="lanczos", tol=tol, seed=seed)
    # Rounding brings up null vectors one by one, at a rate that depends on the processor: what is asked is that it does not matter.
    assert found.converged and found.inertia.negative == 0 and found.products < 400
    low, high = float(d[null:].min()), float(d.max())
    assert abs(found.lam_min_positive - low) <= max(tol * low, found.lam_min_positive_error)
    assert abs(found.kappa_positive * low / high - 1) <= 2 * tol
    assert 1 <= found.inertia.null <= null and found.inertia.positive <= positive


def test_a_small_positive_eigenvalue_is_not_passed_over_for_a_null_one():
    d = spectrum((0.0, 700), (1e-5, 1), uniform(1, 2, 300))
    for seed in range(4):
        found = condition_number(Turned(d, seed), method="lanczos", tol=1e-6, seed=seed)
        assert found.lam_min_positive == pytest.approx(1e-5, rel=1e-5)


def seen(*values: tuple[float, float]) -> Spectrum:
    """A spectrum of (θ, error), as Lanczos sees it on its way."""
    theta, errors = torch.tensor(values, dtype=torch.float64).T
    return Spectrum(theta, errors, errors, lambda at: at, False, 1e-15, 1e-14, 0, 0, 1, "lanczos")


def test_what_was_on_its_way_when_the_smallest_positive_one_settled_is_followed():
    ends, null, low, top = _Ends(1e-6), (0.0, 1e-16), (1.0, 1e-9), (2.0, 1e-9)
    assert not ends.known(seen(null, (0.5, 0.2), low, top))
    # It came to rest at a small positive number, which is the smallest now.
    assert ends.known(seen(null, (1e-5, 1e-13), low, top)) and ends.first(seen(null, (1e-5, 1e-13), low, top)) == 1
    ends = _Ends(1e-6)
    assert not ends.known(seen(null, (0.5, 0.2), low, top))
    assert not ends.known(seen(null, (1e-7, 1e-3), (0.6, 0.2), low, top))
    # It came to rest at zero; the next one on its way was not there then.
    assert ends.known(seen(null, null, (0.6, 0.2), low, top)) and ends.first(seen(null, null, (0.6, 0.2), low, top)) == 3


@pytest.mark.parametrize("basis", [40, 80])
def test_a_null_space_does_not_crowd_out_the_rest_of_a_small_basis(basis):
    d = spectrum((0.0, 300), uniform(1, 2, 1500))
    found = condition_number(Turned(d), method="lanczos", tol=1e-9, basis=basis, max_products=3000)
    assert found.converged and found.lam_min_positive == pytest.approx(float(d[300:].min()), rel=1e-9)


# Products that one run from one vector took before copies were looked for, and how much more may go into the search.
PLAIN = [
    ("spikes", spectrum(torch.logspace(1, -1, 10, dtype=torch.float64), uniform(-3e-3, 7e-3, 590)), 1, "largest", 7, 12),
    ("spikes", spectrum(torch.logspace(1, -1, 10, dtype=torch.float64), uniform(-3e-3, 7e-3, 590)), 3, "largest", 10, 26),
    ("spikes", spectrum(torch.logspace(1, -1, 10, dtype=torch.float64), uniform(-3e-3, 7e-3, 590)), (1, 3), "both", 70, 110),
    ("two outliers", spectrum((1e4, 1), (1e3, 1), uniform(0, 1, 598)), 2, "largest", 5, 22),
    ("logarithmic", 10 ** (-3 * uniform(0, 1, 600)), 3, "largest", 45, 90),
]


@pytest.mark.parametrize(("name", "d", "k", "which", "before", "allowed"), PLAIN)
def test_the_search_costs_little_in_plain_cases(name, d, k, which, before, allowed):
    map = Turned(d)
    found = eigenvalues(map, k, which, method="lanczos")
    assert found.converged and map.count == found.products <= allowed, (name, before)


def test_error_bounds_of_copies_are_quadratic():
    # Two copies of 1 that are known to 1e-6, and a neighbor at 2: (1e-6)², not 1e-6; an unresolved bulk has its residuals.
    rho = torch.tensor([1e-6, 1e-6, 1e-6], dtype=torch.float64)
    copies = Ritz(torch.tensor([1.0, 1.0 + 1e-12, 2.0], dtype=torch.float64), rho, torch.eye(3))
    assert copies.errors[:2].max() < 1e-11 and copies.errors[2] < 1e-11
    bulk = Ritz(torch.linspace(0, 1, 6, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64), torch.eye(6))
    assert torch.equal(bulk.errors, bulk.residuals)
    one = Ritz(torch.ones(3, dtype=torch.float64), rho, torch.eye(3))
    assert torch.equal(one.errors, one.residuals)


def test_a_diagonal_map_and_its_zeros():
    found = eigenvalues(Diagonal((SPECTRA["a small null space"],)), 4, "smallest", method="lanczos", tol=1e-6)
    assert found.values[:2].abs().max() == 0 and found.converged
    assert eigenvalues(Diagonal((torch.zeros(5),)), 3, method="lanczos").values.tolist() == [0, 0, 0]
