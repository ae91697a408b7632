"""Every kind of map against a dense matrix built by hand: verbs, transposes, products, damping, edges."""

from __future__ import annotations

import math

import pytest
import torch

from precond.algebra import maps, vec
from precond.algebra.maps import (
    BlockDiagonal,
    Dense,
    Diagonal,
    GramOnly,
    Identity,
    InverseRoot,
    Kronecker,
    LinearMap,
    Product,
    Rotation,
    RowMatrix,
    Scaled,
    Sliced,
    Spiked,
    Standardizing,
    SymmetricKronecker,
    Tiled,
    Transposed,
    Woodbury,
    completed,
)
from precond.algebra.maps.stacked import OfMembers

GENERATOR = torch.Generator().manual_seed(0)
DTYPE = torch.float64


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=DTYPE)


def positive(*shape):
    return draw(*shape).abs() + 0.3


def square(n):
    return torch.eye(n, dtype=DTYPE) + 0.4 * draw(n, n) / max(n, 1) ** 0.5


def vector(like):
    return tuple(draw(*t.shape) for t in like)


def diag(*tensors):
    return torch.diag(torch.cat([t.reshape(-1) for t in tensors]))


def eye(n):
    return torch.eye(n, dtype=DTYPE)


def block(*matrices):
    return torch.block_diag(*matrices)


def arrow(rows, mean, std, beta=1.0, bias=True):
    """U·diag(1/σ, β) on (w of every row, then all b), row r with μ[r], σ[r]."""
    n = mean.shape[-1]
    P = diag(*(1 / std[r] for r in range(rows)), *([torch.full((rows,), beta, dtype=DTYPE)] if bias else []))
    if bias:
        for r in range(rows):
            P[rows * n + r, r * n : (r + 1) * n] = -mean[r] / std[r]
    return P


# --- the table: name → (map, its matrix, the blocks in which it is damped) ------------------------------------------------
# Two tensors, (4, 3) and (4,), wherever the kind allows it; so that the same rows can be multiplied.

LIKE = (torch.zeros(4, 3, dtype=DTYPE), torch.zeros(4, dtype=DTYPE))
W, B, ALL = torch.arange(12), torch.arange(12, 16), torch.arange(16)
ROWS = [torch.cat([torch.arange(3 * r, 3 * r + 3), torch.tensor([12 + r])]) for r in range(4)]
DD, H, FULL = (draw(4, 3), positive(4)), (positive(4, 3), positive(4)), square(16)
A, K, MEAN, STD, MEAN2, STD2 = square(4), square(3), draw(3), positive(3), draw(2, 3), positive(2, 3)
R, R2 = square(3)[None], torch.stack([square(3), square(3)])
FIRST_TWO = [0, 0, 1, 1]
BASIS, SPIKES, REST = torch.linalg.qr(draw(3, 2)).Q, positive(2), positive(2)


def spiked(U, s, a):
    """The matrix with eigenvalues s on the columns of U, and a on the rest."""
    whole = torch.linalg.qr(torch.cat([U, eye(3)], 1)).Q[:, :3]
    return whole @ torch.diag(torch.cat([s, a.expand(3 - len(s))])) @ whole.T


def root_of_inverse(M):
    """M^(−1/2), symmetric."""
    k, U = torch.linalg.eigh(M)
    return (U * k**-0.5) @ U.T


FEW, MANY = draw(5, 16), draw(20, 16)
LAYER = {
    "woodbury-wide": (Woodbury(FEW, 0.3, LIKE), root_of_inverse(FEW.T @ FEW + 0.3 * eye(16)), [ALL]),
    "woodbury-tall": (Woodbury(MANY, 0.3, LIKE), root_of_inverse(MANY.T @ MANY + 0.3 * eye(16)), [ALL]),
    "identity": (Identity(LIKE), eye(16), [ALL]),
    "scaled": (Scaled(Identity(LIKE), 2.5), 2.5 * eye(16), [ALL]),
    "scaled-dense": (Scaled(Dense(FULL, LIKE), 0.5), 0.5 * FULL, [ALL]),
    "diagonal": (Diagonal(DD), diag(*DD), [W, B]),
    "inverse-root": (InverseRoot(H), diag(*H) ** 0.5 @ torch.linalg.inv(diag(*H)), [W, B]),
    "dense": (Dense(FULL, LIKE), FULL, [ALL]),
    "standardizing": (Standardizing(MEAN, STD, LIKE), arrow(4, MEAN.expand(4, 3), STD.expand(4, 3)), [ALL]),
    "standardizing-β": (Standardizing(MEAN, STD, LIKE, 0.7), arrow(4, MEAN.expand(4, 3), STD.expand(4, 3), 0.7), [ALL]),
    "standardizing-groups": (Standardizing(MEAN2, STD2, LIKE), arrow(4, MEAN2[FIRST_TWO], STD2[FIRST_TWO]), [ALL]),
    "standardizing-centered": (Standardizing(0 * MEAN, STD, LIKE), arrow(4, 0 * MEAN.expand(4, 3), STD.expand(4, 3)), [ALL]),
    "row-matrix": (RowMatrix(R, LIKE, maps.Layout()), block(*4 * [R[0]], eye(4)), [ALL]),
    "row-matrix-groups": (RowMatrix(R2, LIKE, maps.Layout(2)), block(*R2[FIRST_TWO], eye(4)), [ALL]),
    "spiked": (
        Spiked(BASIS[None], SPIKES[None], REST[:1], LIKE, maps.Layout()),
        block(*4 * [spiked(BASIS, SPIKES, REST[0])], eye(4)),
        [ALL],
    ),
    "spiked-one": (
        Spiked(BASIS[None, :, :1], SPIKES[None, :1], REST[:1], LIKE, maps.Layout()),
        block(*4 * [spiked(BASIS[:, :1], SPIKES[:1], REST[0])], eye(4)),
        [ALL],
    ),
    "spiked-groups": (
        Spiked(torch.stack([BASIS, BASIS.flip(0)]), torch.stack([SPIKES, 3 * SPIKES]), REST, LIKE, maps.Layout(2)),
        block(*2 * [spiked(BASIS, SPIKES, REST[0])], *2 * [spiked(BASIS.flip(0), 3 * SPIKES, REST[1])], eye(4)),
        [ALL],
    ),
    "blocks": (BlockDiagonal([((1,), Dense(A)), ((0,), Kronecker(A, K, LIKE[:1]))], LIKE), block(torch.kron(A, K), A), [W, B]),
    "blocks-rest": (BlockDiagonal([((1,), Dense(A))], LIKE), block(eye(12), A), [W, B]),
    "blocks-none": (BlockDiagonal([], LIKE), eye(16), [ALL]),
    "blocks-swapped": (
        BlockDiagonal([((1, 0), Dense(FULL))], LIKE),
        FULL[torch.cat([ALL[4:], ALL[:4]])][:, torch.cat([ALL[4:], ALL[:4]])],
        [ALL],
    ),
    "sliced": (
        Sliced([(0, 1, slice(0, 4), Standardizing(MEAN, STD, LIKE))], LIKE),
        arrow(4, MEAN.expand(4, 3), STD.expand(4, 3)),
        [ALL],
    ),
}


def on(*shapes):
    return tuple(torch.zeros(shape, dtype=DTYPE) for shape in shapes)


D1, D3, C1, C2 = positive(2), positive(3), square(1), square(6)
WIDE, WIDE_STD = draw(6), positive(6)


def half(S):
    s, V = torch.linalg.eigh(S)
    return V @ torch.diag(s.sqrt()) @ V.T


SA, SK, SB, SC = (square(n) @ square(n).T for n in (4, 3, 3, 6))
SA, SK, SB, SC = ((S + S.T) / 2 + 0.2 * eye(len(S)) for S in (SA @ SA.T, SK @ SK.T, SB @ SB.T, SC @ SC.T))
O4, O3, O6 = (torch.linalg.qr(square(n)).Q.contiguous() for n in (4, 3, 6))


def reflected(U):
    """Reflections that take orthonormal columns to unit vectors, multiplied."""
    Q, A = eye(len(U)), U.clone()
    for k in range(U.shape[1]):
        v = torch.cat([0 * A[:k, k], A[k:, k]])
        v[k] = v[k] + torch.copysign(v.norm(), v[k])
        H = eye(len(U)) - 2 * torch.outer(v, v) / (v @ v)
        Q, A = Q @ H, H @ A
    return Q


R4, R3, R6 = reflected(O4[:, :2]), reflected(O3[:, :1]), reflected(O6[:, :5])
OTHERS = {
    "rotation": (Rotation(O4, O3, on((4, 3))), torch.kron(O4, O3), None),
    "rotation-left": (Rotation(O4, None, on((4, 3))), torch.kron(O4, eye(3)), None),
    "rotation-conv": (Rotation(None, O6, on((4, 3, 2, 1))), torch.kron(eye(4), O6), None),
    "rotation-few": (Rotation(completed(O4[:, :2]), completed(O3[:, :1]), on((4, 3))), torch.kron(R4, R3), None),
    "rotation-few-and-all": (Rotation(O4, completed(O6[:, :5]), on((4, 3, 2))), torch.kron(O4, R6), None),
    "rotation-none-yet": (Rotation(completed(eye(4)[:, :2]), None, on((4, 3))), eye(12), None),
    "kronecker": (Kronecker(A, K, on((4, 3))), torch.kron(A, K), None),
    "kronecker-left": (Kronecker(A, None, on((4, 3))), torch.kron(A, eye(3)), None),
    "kronecker-right": (Kronecker(None, K, on((4, 3))), torch.kron(eye(4), K), None),
    "kronecker-neither": (Kronecker(None, None, on((4, 3))), eye(12), None),
    "kronecker-conv": (Kronecker(A, C2, on((4, 3, 2, 1))), torch.kron(A, C2), None),
    "kronecker-vector": (Kronecker(A, None, on((4,))), A, None),
    "kronecker-one": (Kronecker(C1, C1, on((1, 1))), C1 @ C1, None),
    "kronecker-scalar": (Kronecker(C1, None, on(())), C1, None),
    "kronecker-no-rows": (Kronecker(square(0), K, on((0, 3))), eye(0), None),
    "kronecker-no-columns": (Kronecker(A, square(0), on((4, 0))), eye(0), None),
    "diagonal-one": (Diagonal((D1[:1],)), diag(D1[:1]), None),
    "diagonal-scalar-and-empty": (Diagonal((D1[0], D3[:0], D3.view(3, 1))), diag(D1[0], D3), [[0], [1, 2, 3]]),
    "inverse-root-empty": (InverseRoot((D3[:0].view(0, 5),)), eye(0), None),
    "identity-empty": (Identity(on((0,))), eye(0), None),
    "dense-empty": (Dense(square(0), on((0, 4))), eye(0), None),
    "dense-scalar": (Dense(C1, on((), (0,))), C1, None),
    "standardizing-no-bias": (
        Standardizing(MEAN, STD, on((4, 3))),
        arrow(4, MEAN.expand(4, 3), STD.expand(4, 3), bias=False),
        None,
    ),
    "standardizing-conv": (
        Standardizing(WIDE, WIDE_STD, on((2, 3, 2), (2,))), arrow(2, WIDE.expand(2, 6), WIDE_STD.expand(2, 6)), None
    ),
    "standardizing-one": (Standardizing(MEAN[:1], STD[:1], on((1, 1), (1,))), arrow(1, MEAN[:1, None], STD[:1, None]), None),
    "standardizing-no-rows": (Standardizing(MEAN, STD, on((0, 3), (0,))), eye(0), None),
    "row-matrix-no-bias": (RowMatrix(R, on((4, 3)), maps.Layout()), block(*4 * [R[0]]), None),
    "spiked-no-bias": (
        Spiked(BASIS[None], SPIKES[None], REST[:1], on((4, 3)), maps.Layout()), block(*4 * [spiked(BASIS, SPIKES, REST[0])]), None
    ),
    "spiked-columns": (
        Spiked(BASIS[None], SPIKES[None], REST[:1], on((3, 4)), maps.Layout(transposed=True)),
        torch.kron(spiked(BASIS, SPIKES, REST[0]), eye(4)),
        None,
    ),
    "symmetric": (SymmetricKronecker(SA, SK, on((4, 3))), torch.kron(half(SA), half(SK)), None),
    "symmetric-left": (SymmetricKronecker(SA, None, on((4, 3))), torch.kron(half(SA), eye(3)), None),
    "symmetric-conv": (SymmetricKronecker(None, SC, on((2, 3, 2))), torch.kron(eye(2), half(SC)), None),
    "symmetric-vector": (SymmetricKronecker(SA, None, on((4,))), half(SA), None),
    "symmetric-no-rows": (SymmetricKronecker(square(0), SK, on((0, 3))), eye(0), None),
    "tiled": (
        Tiled([
                (slice(0, 1), slice(0, 3), Kronecker(None, K, on((1, 3)))),
                (slice(1, 4), slice(0, 2), SymmetricKronecker(SB, None, on((3, 2)))),
                (slice(1, 4), slice(2, 3), Kronecker(SB, None, on((3, 1)))),
            ], on((4, 3))),
        None,
        None,
    ),
    "sliced-two": (
        Sliced(
            [
                (0, 2, slice(0, 2), Standardizing(MEAN, STD, on((2, 3), (2,)))),
                (1, 2, slice(2, 3), Standardizing(WIDE, WIDE_STD, on((1, 6), (1,)))),
            ],
            on((2, 3), (1, 6), (3,)),
        ),
        None,
        None,
    ),
}  # fmt: skip
two, one = arrow(2, MEAN.expand(2, 3), STD.expand(2, 3)), arrow(1, WIDE[None], WIDE_STD[None])
sliced = eye(15)
first, second = torch.tensor([0, 1, 2, 3, 4, 5, 12, 13]), torch.tensor([6, 7, 8, 9, 10, 11, 14])
sliced[first[:, None], first], sliced[second[:, None], second] = two, one
tiled, tiles = eye(12), [torch.arange(3), torch.tensor([3, 4, 6, 7, 9, 10]), torch.tensor([5, 8, 11])]
for tile, of_tile in zip(tiles, (K, torch.kron(half(SB), eye(2)), SB), strict=True):
    tiled[tile[:, None], tile] = of_tile
OTHERS["tiled"] = (OTHERS["tiled"][0], tiled, tiles)
OTHERS["sliced-two"] = (OTHERS["sliced-two"][0], sliced, [first, second])
TABLE = LAYER | OTHERS
TABLE |= {f"{name}ᵀ": (P.T, matrix.T, None) for name, (P, matrix, _) in TABLE.items()}


def close(found, expected, tolerance=1e-11):
    found = vec.flatten(found) if isinstance(found, tuple) else found
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def verbs(P, matrix, like):
    """All verbs of a map are those of a matrix."""
    v = vector(like)
    flat, inverse = vec.flatten(v).to(DTYPE), torch.linalg.inv(matrix)
    before = [t.clone() for t in v]
    for found, expected in {
        P.mv: matrix @ flat, P.rmv: matrix.T @ flat, P.gram: matrix @ matrix.T @ flat,
        P.solve: inverse @ flat, P.rsolve: inverse.T @ flat, P.gram_solve: inverse.T @ inverse @ flat,
    }.items():  # fmt: skip
        out = found(v)
        close(out, expected)
        assert [t.shape for t in out] == [t.shape for t in v]
    assert all(map(torch.equal, v, before))  # arguments are left alone
    close(P.to_dense(), matrix)
    p = tuple(t.clone() for t in vector(like))
    expected = 0.5 * vec.flatten(p).to(DTYPE) - 2 * matrix @ flat
    P.add_to(p, v, 0.5, -2.0)
    close(p, expected)


@pytest.mark.parametrize("name", TABLE)
def test_verbs(name):
    P, matrix, _ = TABLE[name]
    verbs(P, matrix, P.like)
    verbs(P.T, matrix.T, P.like)
    verbs(P.T.T, matrix, P.like)
    assert not P.diagonal or torch.equal(matrix, torch.diag(torch.diag(matrix)))


def test_a_rotation_is_added_to_a_weight_that_lies_otherwise_in_memory():
    P, matrix, _ = TABLE["rotation-conv"]
    (p,), (v,) = vector(P.like), vector(P.like)
    p = p.to(memory_format=torch.channels_last)
    expected = 0.5 * p.flatten() + matrix @ v.flatten()
    P.add_to((p,), (v,), 0.5, 1.0)
    close(p.flatten(), expected)


@pytest.mark.parametrize("outer", LAYER)
@pytest.mark.parametrize("inner", LAYER)
def test_products(outer, inner):
    (P, p, _), (Q, q, _) = LAYER[outer], LAYER[inner]
    verbs(P @ Q, p @ q, LIKE)
    verbs((P @ Q).T, q.T @ p.T, LIKE)
    verbs(Q.T @ P.T, q.T @ p.T, LIKE)
    assert (P @ Q).diagonal == (P.diagonal and Q.diagonal)


SCALES = (0.5, -2.0)


def conjugated(matrix, v, sizes, scales):
    scale = torch.cat([torch.full((n,), s, dtype=DTYPE) for n, s in zip(sizes, scales, strict=True)])
    return matrix @ (scale * torch.linalg.solve(matrix, vec.flatten(v)))


@pytest.mark.parametrize("outer", LAYER)
@pytest.mark.parametrize("inner", LAYER)
def test_each_tensor_of_z_is_scaled(outer, inner):
    (P, p, _), (Q, q, _) = LAYER[outer], LAYER[inner]
    v = vector(LIKE)
    for S, s in ((P, p), (P @ Q, p @ q), (BlockDiagonal([((0, 1), P @ Q)], LIKE), p @ q)):
        close(S.conjugated(v, SCALES), conjugated(s, v, (12, 4), SCALES), 1e-8)
        close(S.conjugated(v, (3.0, 3.0)), 3 * vec.flatten(v))


def test_z_is_scaled_tensor_by_tensor_without_a_root_of_each():
    """P = BQ of which QQᵀ alone is stated, one Q for each tensor: PΛP⁻¹ = BΛB⁻¹."""
    B, b, _ = LAYER["standardizing"]
    Q = BlockDiagonal([([i], maps.Unrooted(Diagonal((positive(*t.shape),)))) for i, t in enumerate(LIKE)], LIKE)
    v = vector(LIKE)
    close((B @ Q).conjugated(v, SCALES), conjugated(b, v, (12, 4), SCALES))
    with pytest.raises(ValueError, match="states M = P Pᵀ and no root P"):
        (B @ maps.Unrooted(Diagonal(H))).conjugated(v, SCALES)


def test_z_of_members_side_by_side_is_scaled():
    """Two maps on tensors (2, …), and numbers of each member's own, some of which the members share."""

    class Pairs:
        all_tensors = (*LIKE, *LIKE)

        def gathered(self, v):
            return tuple(torch.stack([v[j], v[j + 2]]) for j in range(2))

        def scattered(self, v):
            return (v[0][0], v[1][0], v[0][1], v[1][1])

    class Sheared(LinearMap):
        def mv(self, v):
            return v[0], v[1] - shear * v[0].sum(-1)

        def rmv(self, v):
            raise AssertionError("not asked for")

        def solve(self, v):
            return v[0], v[1] + shear * v[0].sum(-1)

    shear = draw(2, 1)
    sums = torch.kron(eye(4), torch.ones(1, 3, dtype=DTYPE))
    matrix = block(*(eye(16) - c * torch.nn.functional.pad(sums, (0, 4, 12, 0)) for c in shear))
    v = vector(Pairs.all_tensors)
    for scales in ((0.5, -2.0, 0.5, -2.0), (0.5, -2.0, 3.0, -2.0), (0.5, torch.tensor(1.5), 3.0, 0.0)):
        close(
            OfMembers(Sheared(), Pairs()).conjugated(v, scales),
            conjugated(matrix, v, (12, 4, 12, 4), [float(x) for x in scales]),
        )


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ("identity", "dense", Dense), ("standardizing", "identity", Standardizing), ("diagonal", "inverse-root", Diagonal),
        ("dense", "diagonal", Dense), ("diagonal", "dense", Dense), ("dense", "dense", Dense),
        ("dense", "standardizing", Product),
    ],
)  # fmt: skip
def test_products_in_their_simplest_form(a, b, kind):
    assert type(LAYER[a][0] @ LAYER[b][0]) is kind


def of_blocks(matrix, delta, blocks, root):
    """(M⁻¹ + δd̄I)⁻¹ of each block, or P(I + δd̄PᵀP)^(−1/2)."""
    out = torch.zeros_like(matrix)
    for i in blocks:
        i = torch.as_tensor(i)
        P = matrix[i[:, None], i]
        M_inverse = torch.linalg.inv(P @ P.T)
        t = delta * torch.diag(M_inverse).mean()
        if root:
            s, V = torch.linalg.eigh(P.T @ P)
            out[i[:, None], i] = P @ V @ torch.diag((1 + t * s) ** -0.5) @ V.T
        else:
            out[i[:, None], i] = torch.linalg.inv(M_inverse + t * eye(len(i)))
    return out


@pytest.mark.parametrize("delta", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("name", LAYER | OTHERS)
def test_damped(name, delta):
    P, matrix, blocks = TABLE[name]
    blocks = [range(len(matrix))] if blocks is None and len(matrix) else blocks or []
    Q = P.damped(delta)
    v = vector(P.like)
    close(Q.gram(v), of_blocks(matrix, delta, blocks, root=False) @ vec.flatten(v))
    verbs(Q, Q.to_dense() if len(matrix) else matrix, P.like)
    assert (Q is P) == (delta == 0) or isinstance(P, BlockDiagonal | Scaled | Sliced)
    if any(word in name for word in ("identity", "scaled", "inverse-root", "dense", "kronecker", "row-matrix", "blocks")):
        close(Q.to_dense(), of_blocks(matrix, delta, blocks, root=True))
    close(P.damped(1e-12).gram(v), matrix @ matrix.T @ vec.flatten(v), 1e-9)


def test_damping_of_a_product_is_the_inner_ones():
    """In the outer map's coordinates, where the entries live whose tiny denominators it is for."""
    P, Q = LAYER["standardizing"][0], LAYER["inverse-root"][0]
    close((P @ Q).damped(0.3).to_dense(), P.to_dense() @ Q.damped(0.3).to_dense())
    assert (P @ Q).damped(0) is not P


RANK_2 = draw(4, 2)
SINGULAR, HOLES = RANK_2 @ RANK_2.T, torch.tensor([0.0, 2.0, 0.5, 0.0], dtype=DTYPE)


@pytest.mark.parametrize(
    ("P", "matrix"),
    [
        (Dense(SINGULAR, on((4,))), SINGULAR),
        (Kronecker(SINGULAR, K, on((4, 3))), torch.kron(SINGULAR, K)),
        (Diagonal((HOLES,)), torch.diag(HOLES)),
        (InverseRoot((torch.tensor([math.inf, 4.0], dtype=DTYPE),)), torch.diag(torch.tensor([0.0, 0.5], dtype=DTYPE))),
        (GramOnly(SINGULAR @ SINGULAR, on((4,))), SINGULAR),
        (RowMatrix(SINGULAR[None], on((3, 4), (3,)), maps.Layout()), block(*3 * [SINGULAR], eye(3))),
    ],
    ids=["dense", "kronecker", "diagonal", "inverse-root", "gram-only", "row-matrix"],
)  # fmt: skip
def test_singular_maps_are_damped_over_their_range(P, matrix):
    v = vector(P.like)
    flat, M = vec.flatten(v), matrix @ matrix.T
    s, V = torch.linalg.eigh(M)
    keep = s > 1e-12 * s.max()
    s, V = s[keep], V[:, keep]
    t = 0.2 * (1 / s).mean()
    close(P.gram(v), M @ flat)
    close(P.damped(0.2).gram(v), (V / (1 / s + t)) @ V.T @ flat)


@pytest.mark.parametrize("h", [(math.inf, math.inf), (math.inf,)])
def test_a_dead_tensor_stays_where_it_is_whatever_the_damping(h):
    P = InverseRoot((torch.tensor(h, dtype=DTYPE), torch.tensor([4.0], dtype=DTYPE)))
    v = vector(P.like)
    moved = P.damped(0.1).gram(v)
    assert torch.equal(moved[0], torch.zeros_like(v[0]))
    close(moved[1], v[1] / 4.4)
    assert all(torch.equal(f(v)[0], torch.zeros_like(v[0])) for f in (P.mv, P.gram, P.solve, P.rsolve))


def test_a_map_known_by_its_gram_matrix_alone():
    M = FULL @ FULL.T
    P = GramOnly(M, LIKE)
    v = vector(LIKE)
    close(P.gram(v), M @ vec.flatten(v))
    close(P.gram_solve(v), torch.linalg.solve(M, vec.flatten(v)))
    close(P.damped(0.3).gram(v), of_blocks(FULL, 0.3, [ALL], root=False) @ vec.flatten(v))
    Q = LAYER["standardizing"][0] @ P
    close(Q.gram(v), LAYER["standardizing"][1] @ M @ LAYER["standardizing"][1].T @ vec.flatten(v))
    close(Q.gram_solve(Q.gram(v)), vec.flatten(v))
    assert not P.root and not Q.root and not P.T.root and not BlockDiagonal([((0, 1), P)]).root
    for refused in (P.mv, P.rmv, P.solve, P.rsolve, P.T.gram, Q.mv):
        with pytest.raises(ValueError, match=r"states M = P Pᵀ and no root P"):
            refused(v)
    with pytest.raises(ValueError, match="no root P"):
        P.to_dense()


def test_a_dense_matrix_keeps_the_dtype_of_its_vectors():
    v = (torch.ones(4, 3), torch.ones(4))
    P = Dense(FULL)
    for f in (P.mv, P.rmv, P.solve, P.rsolve, P.gram):
        assert {t.dtype for t in f(v)} == {torch.float32}


class Projection(LinearMap):
    """The first of all tensors: singular, without damping."""

    def mv(self, v):
        return (v[0], *vec.zeros_like(v[1:]))

    rmv = mv


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Dense(torch.zeros(2, 3)), ValueError, "must be square"),
        (lambda: Dense(torch.zeros(4)), ValueError, "must be square"),
        (lambda: Dense(FULL).mv((torch.zeros(3),)), ValueError, "16 rows, the parameters have 3 entries"),
        (lambda: Identity().to_dense(), ValueError, "give it `like`"),
        (lambda: Kronecker(A, K).damped(0.1), ValueError, "give `like` to damp it"),
        (lambda: Standardizing(MEAN, STD).damped(0.1), ValueError, "give `like` to damp it"),
        (lambda: Projection().solve(LIKE), NotImplementedError, "no inverse"),
        (lambda: Projection().rsolve(LIKE), NotImplementedError, "no inverse"),
        (lambda: Projection().damped(0.1), NotImplementedError, "set damping=0"),
        (lambda: Identity() @ 2.0, TypeError, "unsupported operand"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_new_map_has_the_rest_by_default():
    P = Projection()
    v = vector(LIKE)
    close(P.gram(v), torch.cat([v[0].reshape(-1), torch.zeros(4, dtype=DTYPE)]))
    assert isinstance(P.T, Transposed) and P.T.T is P and P.damped(0) is P


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_sort_a_weight_by_rows_of_inputs(transposed, kernel, groups):
    """(out, in/groups, …), of transposed convolutions (in, out/groups, …), as (groups, rows, inputs of a row)."""
    layout = maps.Layout(groups, transposed)
    weight = draw(4, 6, *kernel)
    seen = layout.view(weight)
    assert torch.equal(layout.back(seen, weight), weight)
    out = weight if not transposed else torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])
    assert torch.equal(seen, out.reshape(groups, len(out) // groups, -1))
