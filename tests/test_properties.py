"""Laws that hold for all shapes, dtypes, maps, partitions and losses: hypothesis looks for a counterexample."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precond import L1, L2, RMS, SAM, AdaGrad, Fixed, GradientNorm, LossClosure, PreconditionedGD, TimesLr
from precond.algebra import vec
from precond.algebra.maps import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Identity,
    InverseRoot,
    Kronecker,
    Layout,
    RowMatrix,
    Scaled,
    Spiked,
    Standardizing,
)
from precond.optim.blocks import join

SEARCH = settings(max_examples=400, deadline=None, derandomize=True)
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-11}

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])
shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=3)


class Draw:
    """Tensors from a seed."""

    def __init__(self, seed, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def positive(self, *shape):
        return self(*shape).abs() + 0.5

    def square(self, n):
        """An orthogonal matrix, stretched by up to 2 in each direction."""
        Q = torch.linalg.qr(self(n, n))[0] if n else self(0, 0)
        return Q * (0.5 + 1.5 * torch.rand(n, generator=self.generator, dtype=torch.float64).to(self.dtype))

    def vector(self, like):
        return tuple(self(*t.shape) for t in like)


def sides(shape):
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def of_one(draw, kind, shape):
    """A map on one tensor, or of a layer where a second tensor can be its bias."""
    like = (torch.zeros(shape, dtype=draw.dtype),)
    rows, columns = sides(shape)
    match kind:
        case "kronecker":
            return Kronecker(draw.square(rows), draw.square(columns), like)
        case "kronecker-left":
            return Kronecker(draw.square(rows), None, like)
        case "standardizing" if shape:
            return Standardizing(draw(columns), draw.positive(columns), like)
        case "rows" if shape:
            return RowMatrix(draw.square(columns)[None], like, Layout())
        case "spiked" if shape and columns:
            basis = torch.linalg.qr(draw.square(columns)).Q[:, : (columns + 1) // 2]
            return Spiked(basis[None], draw.positive(1, basis.shape[1]), draw.positive(1), like, Layout())
        case "inverse-root":
            return InverseRoot((draw.positive(*shape),))
    return Diagonal((draw.positive(*shape),))


ATOMS = [
    "identity", "scaled", "dense", "diagonal", "inverse-root", "kronecker", "kronecker-left", "standardizing", "rows", "spiked", "layer"
]  # fmt: skip
trees = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(st.tuples(st.just("@"), inner, inner), st.tuples(st.just("T"), inner)),
    max_leaves=4,
)


def build(draw, tree, like):
    """The map of a tree of kinds, on the tensors of ``like``."""
    if isinstance(tree, tuple):
        parts = [build(draw, t, like) for t in tree[1:]]
        return parts[0] @ parts[1] if tree[0] == "@" else parts[0].T
    match tree:
        case "identity":
            return Identity(like)
        case "scaled":
            return Scaled(Dense(draw.square(vec.flatten(like).numel()), like), 1.5)
        case "dense":
            return Dense(draw.square(vec.flatten(like).numel()), like)
        case "layer" if len(like) > 1 and like[0].ndim and like[1].shape == like[0].shape[:1]:
            n = sides(like[0].shape)[1]
            arrow = Standardizing(draw(n), draw.positive(n), like[:2], 0.7)
            return BlockDiagonal([((0, 1), arrow)], like)
    return BlockDiagonal([((i,), of_one(draw, tree, t.shape)) for i, t in reversed(list(enumerate(like)))], like)


@st.composite
def spaces(draw):
    """(source of tensors, an example vector), often a weight with its bias."""
    source = Draw(draw(seeds), draw(dtypes))
    layer = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda s: [s, s[:1]])
    return source, tuple(torch.zeros(s, dtype=source.dtype) for s in draw(shapes | layer))


def near(a, b, dtype):
    a, b = vec.flatten(a), vec.flatten(b)
    assert a.dtype == b.dtype == dtype
    assert (a - b).norm() <= TOLERANCE[dtype] * (1 + a.norm())


@SEARCH
@given(spaces(), trees, trees)
def test_maps_obey_the_laws_of_linear_maps(space, first, second):
    draw, like = space
    P, Q = build(draw, first, like), build(draw, second, like)
    u, v = draw.vector(like), draw.vector(like)
    scale = 1 + float(vec.norm(P.mv(u)) * vec.norm(v))
    assert abs(float(vec.dot(P.mv(u), v) - vec.dot(u, P.rmv(v)))) <= TOLERANCE[draw.dtype] * scale  # ⟨Pu, v⟩ = ⟨u, Pᵀv⟩
    laws = [
        (P.mv(vec.add(u, v, 2.0)), vec.add(P.mv(u), P.mv(v), 2.0)),
        (P.solve(P.mv(v)), v),
        (P.mv(P.solve(v)), v),
        (P.rsolve(P.rmv(v)), v),
        (P.gram(v), P.mv(P.rmv(v))),
        (P.T.mv(v), P.rmv(v)),
        (P.T.gram(v), P.rmv(P.mv(v))),
        (P.T.T.mv(v), P.mv(v)),
        ((P @ Q).mv(v), P.mv(Q.mv(v))),
        ((P @ Q).gram(v), P.mv(Q.gram(P.rmv(v)))),
        ((P @ Q).T.mv(v), (Q.T @ P.T).mv(v)),
        ((P @ Q).solve(v), Q.solve(P.solve(v))),
    ]
    for left, right in laws:
        near(left, right, draw.dtype)
        assert [t.shape for t in left] == [t.shape for t in like]


@SEARCH
@given(spaces(), st.sampled_from([kind for kind in ATOMS if kind != "scaled"]), st.floats(0.01, 10))
def test_damping_shortens_and_more_of_it_shortens_more(space, kind, delta):
    draw, like = space
    P, v = build(draw, kind, like), draw.vector(like)
    lengths = [float(vec.dot(v, P.damped(d).gram(v))) for d in (2 * delta, delta, 0.0)]
    slack = TOLERANCE[draw.dtype] * (1 + lengths[-1])
    assert -slack <= lengths[0] <= lengths[1] + slack <= lengths[2] + 2 * slack
    Q = P.damped(delta)
    near(Q.gram(v), Q.mv(Q.rmv(v)), draw.dtype)
    near(Q.solve(Q.mv(v)), v, draw.dtype)


@SEARCH
@given(spaces(), st.sampled_from([1, 1.5, 2, 3, math.inf]))
def test_vectors_are_one_flat_vector(space, q):
    draw, like = space
    a, b = draw.vector(like), draw.vector(like)
    flat = vec.flatten(a)
    assert all(map(torch.equal, vec.unflatten(flat, a), a))
    expected = torch.linalg.vector_norm(flat, q) if flat.numel() else flat.new_zeros(())
    torch.testing.assert_close(vec.norm(a, q).to(expected.dtype), expected)
    torch.testing.assert_close(vec.dot(a, b), flat @ vec.flatten(b))
    for found, expected in [
        (vec.add(a, b, 0.5), flat + 0.5 * vec.flatten(b)),
        (vec.sub(a, b), flat - vec.flatten(b)),
        (vec.mul(a, b), flat * vec.flatten(b)),
        (vec.div(a, b), flat / vec.flatten(b)),
        (vec.scale(a, 2.0), 2 * flat),
        (vec.scale(a, torch.tensor(2.0)), 2 * flat),
        (vec.scale(a, [2.0] * len(a)), 2 * flat),
        (vec.scale(a, [torch.tensor(2.0)] * len(a)), 2 * flat),
    ]:
        torch.testing.assert_close(vec.flatten(found), expected)


@st.composite
def partitions(draw, n):
    """A partition of range(n) as blocks in any order."""
    labels = draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
    order = draw(st.permutations(range(n)))
    return [tuple(i for i in order if labels[i] == k) for k in sorted(set(labels))]


def as_sets(partition):
    return {frozenset(block) for block in partition}


@SEARCH
@given(st.integers(0, 7).flatmap(lambda n: st.tuples(partitions(n), partitions(n), partitions(n), st.just(n))))
def test_the_join_is_the_finest_partition_that_both_refine(case):
    a, b, c, n = case
    joined = join(a, b)
    assert sorted(i for block in joined for i in block) == list(range(n))
    linked = {(i, j) for block in a + b for i, j in combinations(sorted(block), 2)}
    reach = {i: {i} for i in range(n)}  # closure of "in one block of a or of b"
    for _ in range(n):
        for i, j in linked:
            reach[i] = reach[j] = reach[i] | reach[j]
            for k in reach[i]:
                reach[k] = reach[i]
    assert as_sets(joined) == {frozenset(r) for r in reach.values()}
    assert as_sets(join(b, a)) == as_sets(joined)
    assert as_sets(join(joined, b)) == as_sets(joined)
    assert as_sets(join(join(a, b), c)) == as_sets(join(a, join(b, c)))
    assert as_sets(join(a, a)) == as_sets(a)
    for block in a:  # within a block, the order of a's blocks
        (home,) = [x for x in joined if set(block) <= set(x)]
        assert tuple(i for i in home if i in block) == block


PENALTIES = {
    "none": (),
    "L2": (L2(0.1),),
    "L1": (L1(0.1),),
    "L1-prox": (L1(0.3, proximal=True),),
    "GN": (GradientNorm(TimesLr(0.5), method="exact", damping=0.0),),
    "GN-1-1": (GradientNorm(0.1, "z", 1, 1, "exact", damping=0.0), L2(0.1)),
    "GN-2-inf": (GradientNorm(0.1, "z", 2, math.inf, "exact", damping=0.0),),
    "SAM": (SAM(0.1, damping=0.0),),
    "ASAM": (SAM(0.1, adaptive=True, damping=0.0),),
}
INNER = [Fixed(), RMS(0.9, 0.1), AdaGrad(0.1), RMS(0.5, 0.1) @ AdaGrad(0.3)]


def descend(preconditioner, penalties, loss, start, steps=2):
    params = [torch.nn.Parameter(t.clone()) for t in start]
    opt = PreconditionedGD(params, 0.05, preconditioner=preconditioner, regularizers=penalties)
    for _ in range(steps):
        opt.step(LossClosure(lambda: loss(tuple(params))))
    return tuple(p.detach() for p in params)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.filterwarnings("ignore:the optimizer was given parameters")
@settings(SEARCH, max_examples=40)
@given(spaces().filter(lambda s: vec.flatten(s[1]).numel() > 0), trees, st.sampled_from(INNER))
def test_descent_in_z_is_descent_of_the_reparametrized_loss(penalty, space, tree, inner):
    """P @ Q on L from p = Pz goes where Q goes on z ↦ L(Pz) from z: what adapts, adapts in z."""
    draw, like = space
    P, z = build(draw, tree, like), draw.vector(like)
    n = vec.flatten(like).numel()
    A, target = draw(n + 1, n), draw(n + 1)

    def loss(p):
        return torch.nn.functional.softplus(A @ vec.flatten(p) / n**0.5 - target).square().mean()

    in_z = descend(inner, PENALTIES[penalty], lambda z: loss(P.mv(z)), z)
    in_p = descend(Fixed(P) @ inner, PENALTIES[penalty], loss, P.mv(z))
    near(in_p, P.mv(in_z), draw.dtype)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.filterwarnings("ignore:the optimizer was given parameters")
@settings(SEARCH, max_examples=40)
@given(spaces().filter(lambda s: vec.flatten(s[1]).numel() > 1), seeds)
def test_for_q_2_only_the_gram_matrix_matters(power, space, seed):
    """P and PQ with orthogonal Q are two roots of one M."""
    draw, like = space
    n = vec.flatten(like).numel()
    P = Dense(draw.square(n), like)
    Q = Dense(torch.linalg.qr(Draw(seed, draw.dtype)(n, n))[0], like)
    A, start = draw(n + 1, n), draw.vector(like)
    penalty = GradientNorm(0.1, "z", power, 2, "exact", damping=0.5)
    ends = [
        descend(Fixed(root), [penalty], lambda p: (A @ vec.flatten(p)).square().mean() / 2, start, steps=1)
        for root in (P, P @ Q)
    ]
    near(*ends, draw.dtype)
