"""The five verbs of a space against dense matrices, with tensors that take no part; and what its terms are."""

from __future__ import annotations

import pytest
import torch

from precond.algebra import vec
from precond.algebra.maps import Dense, Diagonal, GramOnly
from precond.algebra.spaces import Cotangent, P, Tangent, Z

GENERATOR = torch.Generator().manual_seed(1)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


SHAPES = ((2, 2), (), (3,))
N = 8
v = tuple(draw(*shape) for shape in SHAPES)
FLAT = vec.flatten(v)
A, D = torch.eye(N, dtype=torch.float64) + 0.3 * draw(N, N), tuple(draw(*shape).abs() + 0.5 for shape in SHAPES)
MAPS = {"dense": (Dense(A), A), "diagonal": (Diagonal(D), torch.diag(vec.flatten(D)))}
MASKS = [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]


def projection(takes_part):
    return torch.diag(vec.flatten(tuple(torch.full_like(t, float(m)) for t, m in zip(v, takes_part, strict=True))))


@pytest.mark.parametrize("takes_part", MASKS)
@pytest.mark.parametrize("name", ["p", *MAPS])
def test_verbs(name, takes_part):
    matrix = torch.eye(N, dtype=torch.float64) if name == "p" else MAPS[name][1]
    space = P(takes_part) if name == "p" else Z(MAPS[name][0], takes_part)
    Pi = projection(takes_part)
    for found, expected in {
        space.project: Pi,
        space.push: matrix @ Pi,
        space.pull: Pi @ matrix.T,
        space.solve: Pi @ torch.linalg.inv(matrix),
        space.sharp: matrix @ Pi @ matrix.T,
    }.items():
        torch.testing.assert_close(vec.flatten(found(v)), expected @ FLAT)
    length = (Pi @ matrix.T @ FLAT).norm()
    torch.testing.assert_close(space.dual_norm(v), length)
    torch.testing.assert_close(space.dual_norm(v, space.sharp(v)), length)
    if name == "p":
        assert isinstance(space.raised(v), Cotangent) and space.raised(v).vec is v
    else:
        assert isinstance(space.raised(v), Tangent) and space.raised(v).vec is v


def test_where_all_take_part_sharp_needs_m_alone():
    space = Z(GramOnly(A @ A.T), (True, True, True))
    torch.testing.assert_close(vec.flatten(space.sharp(v)), A @ A.T @ FLAT)
    torch.testing.assert_close(space.dual_norm(v), (A.T @ FLAT).norm())
    with pytest.raises(ValueError, match="states M = P Pᵀ and no root P"):
        Z(GramOnly(A @ A.T), (True, False, True)).sharp(v)


def test_the_length_of_nothing_is_zero_not_nan():
    tiny = GramOnly(torch.eye(N, dtype=torch.float64) * -1e-30)  # M that rounding made indefinite
    assert Z(tiny, (True, True, True)).dual_norm(v) == 0
    assert P((True, True, True)).dual_norm(vec.zeros_like(v)) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([torch.tensor([1.0, -2.0])], True),
        ([torch.tensor([3e38, 3e38])], True),  # their sum is not
        ([torch.tensor([6e4] * 9, dtype=torch.float16), torch.tensor([1e300], dtype=torch.float64)], True),
        ([torch.tensor([torch.inf, -torch.inf])], False),
        ([torch.ones(3), torch.tensor([1.0, torch.nan])], False),
        ([torch.ones(3), torch.zeros(0), torch.tensor(-torch.inf)], False),
        ([torch.zeros(0)], True),
        ([], True),
    ],
)
def test_all_finite(values, expected):
    assert vec.all_finite(tuple(values)) is expected
