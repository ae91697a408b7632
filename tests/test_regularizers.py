"""What penalties are, beyond what the oracle says of whole steps: terms, identities between them, scales, edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import precond
from precond import (
    L1,
    L2,
    RMS,
    SAM,
    AdaGrad,
    Dense,
    Diagonal,
    Fixed,
    GradientNorm,
    GramOnly,
    LossClosure,
    PreconditionedGD,
    Route,
    TimesLr,
    is_matrix,
    vec,
)
from precond.algebra.spaces import Cotangent, Instead, P, Prox, Tangent, Z
from precond.optim.regularizers import At

GENERATOR = torch.Generator().manual_seed(5)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


N = 6
A, B, p, g = torch.eye(N).double() + 0.4 * draw(N, N), draw(N, N), draw(N), draw(N)
M, H = A @ A.T, B + B.T
CUTS = (2, 3, 1)


def split(flat):
    return tuple(flat.split(CUTS))


def evaluated(regularizer, lam=0.3, found=(), memo=None, matrix=A, takes_part=(True,) * 3, root=True):
    """Where a penalty of one λ = ρ is evaluated, with lr = 0.1, P = ``matrix`` (or M alone) and H given."""
    P_map = Dense(matrix, split(p)) if root else GramOnly(matrix @ matrix.T, split(p))
    space = P(takes_part) if regularizer.space == "p" else Z(P_map, takes_part)
    values = [lam if part else 0.0 for part in takes_part]
    return At(
        split(p), split(g), [0.1] * 3, lambda name: values, takes_part, lambda: space, lambda: P_map, torch.float64,
        found, lambda v: split(H @ vec.flatten(v)), memo,
    )  # fmt: skip


def soft(x, t):
    return x.sign() * (x.abs() - t).clamp_min(0)


z, y = torch.linalg.solve(A, p), A.T @ g
LENGTH = {"p": g.norm(), "z": y.norm()}
TERMS = [
    (L2(0.3, "p"), Cotangent, 0.6 * p),
    (L2(0.3, "z"), Tangent, 0.6 * p),
    (L1(0.3, "p"), Cotangent, 0.3 * p.sign()),
    (L1(0.3, "z"), Tangent, 0.3 * A @ z.sign()),
    (L1(0.3, "z", proximal=True), Prox, A @ soft(z, 0.03)),
    (GradientNorm(0.3, "p", method="exact"), Cotangent, 0.6 * H @ g),
    (GradientNorm(0.3, "z", method="exact"), Cotangent, 0.6 * H @ M @ g),  # eq. (12)
    (GradientNorm(0.3, "p", 1, method="exact"), Cotangent, 0.3 * H @ g / LENGTH["p"]),
    (GradientNorm(0.3, "z", 1, method="exact"), Cotangent, 0.3 * H @ M @ g / LENGTH["z"]),
    (GradientNorm(0.3, "z", 1, 1, method="exact"), Cotangent, 0.3 * H @ A @ y.sign()),
    (GradientNorm(0.3, "z", 2, 1, method="exact"), Cotangent, 0.6 * y.abs().sum() * H @ A @ y.sign()),
]


@pytest.mark.parametrize(("regularizer", "kind", "expected"), TERMS)
def test_terms_in_closed_form(regularizer, kind, expected):
    term = regularizer.term(evaluated(regularizer))
    assert type(term) is kind
    found = term.apply(split(p)) if kind is Prox else term.formed() if kind is Tangent else term.vec
    torch.testing.assert_close(vec.flatten(found), expected)


T = {"p": p.abs() + 0.2, "z": z.abs() + 0.2}
BALLS = [
    (SAM(0.3, "p"), 0.3 * g / g.norm()),
    (SAM(0.3, "z"), 0.3 * M @ g / y.norm()),
    (SAM(0.3, "p", True, 0.2), 0.3 * T["p"] ** 2 * g / (T["p"] * g).norm()),
    (SAM(0.3, "z", True, 0.2), 0.3 * A @ (T["z"] ** 2 * y) / (T["z"] * y).norm()),
]


@pytest.mark.parametrize(("sam", "expected"), BALLS)
def test_sam_climbs_to_the_rim_of_its_ball_and_stands_in_place_of_the_gradient(sam, expected):
    (tangent,) = sam.probe(evaluated(sam))
    delta = tangent.formed()
    torch.testing.assert_close(vec.flatten(delta), expected)
    in_space = torch.linalg.solve(A, vec.flatten(delta)) if sam.space == "z" else vec.flatten(delta)
    scaled = in_space / T[sam.space] if sam.adaptive else in_space
    assert scaled.norm() == pytest.approx(0.3)
    term = sam.term(evaluated(sam, found=(split(z),)))
    assert isinstance(term, Instead) and term.vec[0] is not None and torch.equal(vec.flatten(term.vec), z)


@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("q", [1, 1.5, 2, 3, math.inf])
def test_the_direction_of_a_gradient_norm(q, power, space):
    """⟨λd, g⟩ = λs‖y‖^s by Euler's theorem, d = P w with w dual to y: ‖w‖_q* = s‖y‖_q^(s−1); and the value logged."""
    penalty = GradientNorm(0.3, space, power, q)
    at = evaluated(penalty)
    root = A if space == "z" else torch.eye(N).double()
    length = torch.linalg.vector_norm(root.T @ g, q)
    d = vec.flatten(penalty.direction(at).formed())
    assert float(d @ g) == pytest.approx(float(0.3 * power * length**power))
    dual = math.inf if q == 1 else 1 if q == math.inf else q / (q - 1)
    w = torch.linalg.solve(root, d)
    assert torch.linalg.vector_norm(w, dual) == pytest.approx(float(0.3 * power * length ** (power - 1)))
    assert float(penalty.value(at)) == pytest.approx(float(0.3 * length**power))


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (L2(0.3, "p"), 0.3 * p.square().sum()), (L2(0.3, "z"), 0.3 * z.square().sum()),
        (L1(0.3, "p"), 0.3 * p.abs().sum()), (L1(0.3, "z"), 0.3 * z.abs().sum()),
        (SAM(0.3, "p"), 0.3 * g.norm()), (SAM(0.3, "z"), 0.3 * y.norm()),
    ],
)  # fmt: skip
def test_values_for_logging(penalty, expected):
    assert float(penalty.value(evaluated(penalty))) == pytest.approx(float(expected))


def test_the_length_of_z_is_known_by_the_metric_alone():
    assert float(L2(0.3, "z").value(evaluated(L2(0.3, "z"), root=False))) == pytest.approx(float(0.3 * z.square().sum()))


def test_ties_of_the_largest_entry_share_the_subgradient():
    penalty = GradientNorm(0.3, "p", 1, math.inf)
    at = evaluated(penalty)
    at.g = split(torch.tensor([2.0, -2.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    expected = 0.1 * torch.tensor([1.0, -1.0, 0, 0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(vec.flatten(penalty.direction(at).formed()), expected)


@pytest.mark.parametrize(
    "penalty", [GradientNorm(0.3, q=2, method="exact"), GradientNorm(0.3, power=1, method="exact"), SAM(0.3)]
)
def test_m_alone_will_do_for_q_2(penalty):
    def term(root):
        at = evaluated(penalty, root=root)
        return penalty.probe(at)[0].formed() if penalty.probes else penalty.term(at).vec

    torch.testing.assert_close(term(root=False), term(root=True))


def test_one_learning_rate_on_the_device_is_one_number_to_every_tensor():
    """TimesLr of a tensor is the same λ everywhere: M alone will do."""
    params = [nn.Parameter(t.clone()) for t in split(p)]
    opt = PreconditionedGD(
        params, torch.tensor(0.1), preconditioner=Fixed(GramOnly(M)), regularizers=[GradientNorm(TimesLr(1.0), method="exact")]
    )
    opt.step(LossClosure(lambda: vec.flatten(tuple(params)).square().sum() / 2))
    expected = p - 0.1 * M @ p - 0.02 * M @ M @ p
    torch.testing.assert_close(vec.flatten(tuple(q.detach() for q in params)), expected)


def test_for_other_q_the_root_matters():
    """math.md: P and PQ are roots of one M; the penalties of their 1-norms are 35 % and more apart."""
    Q = torch.linalg.qr(draw(N, N))[0]
    penalty = GradientNorm(0.3, q=1, method="exact")
    first, second = (vec.flatten(penalty.term(evaluated(penalty, matrix=root)).vec) for root in (A, A @ Q))
    assert (first - second).norm() > 0.1 * first.norm()


@pytest.mark.parametrize(
    ("method", "signs"), [("forward", [1.0]), ("backward", [-1.0]), ("central", [1.0, -1.0]), ("exact", [])]
)
@pytest.mark.parametrize("step", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_step_of_a_finite_difference_is_relative_to_the_parameters(dtype, step, method, signs):
    penalty = GradientNorm(7.0, method=method, step=step)
    at = evaluated(penalty, lam=7.0, memo={})
    at.dtype = dtype
    deltas = [vec.flatten(d.formed()) for d in penalty.probe(at)]
    default = {
        torch.float64: (1e-7, 1e-5), torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 3e-2), torch.float16: (3e-3, 1e-2)
    }[dtype][method == "central"]  # fmt: skip
    direction = M @ g / (M @ g).norm()
    for delta, sign in zip(deltas, signs, strict=True):
        torch.testing.assert_close(delta, sign * (step or default) * p.norm() * direction)


def test_the_step_is_relative_to_the_parameters_that_take_part():
    penalty = GradientNorm(0.3, "p", step=0.01)
    at = evaluated(penalty, takes_part=(True, False, True), memo={})
    delta = penalty.probe(at)[0].formed()
    assert not delta[1].any()
    assert vec.norm(delta) == pytest.approx(0.01 * float(torch.cat([split(p)[0], split(p)[2]]).norm()))


# --- identities of whole steps -------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        make = torch.Generator().manual_seed(2)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("x", torch.randn(9, 3, generator=make))
        with torch.no_grad():
            for q in self.parameters():
                q.copy_(torch.randn(q.shape, generator=make) * 0.5)
        self.to(dtype)

    def loss(self):
        return nn.functional.softplus(self.b(torch.tanh(self.a(self.x)))).square().mean()


def end(
    preconditioner, *penalties, steps=2, dtype=torch.float64, prepare=lambda net: None, lr=0.03, loss=Net.loss, params=None
):
    net = Net(dtype)
    prepare(net)
    opt = PreconditionedGD(net, lr, preconditioner=preconditioner, regularizers=penalties)
    for _ in range(steps):
        opt.step(LossClosure(lambda: loss(net)))
    return torch.cat([q.detach().reshape(-1) for q in net.parameters()])


@pytest.mark.parametrize("preconditioner", [Fixed(), RMS()])
def test_sam_is_a_gradient_norm_by_forward_difference(preconditioner):
    """g + (λ/ρ)[g(p + δ) − g] with λ = ρ: the member β = 1 of the family (math.md §4)."""
    rho, start = 0.1, torch.cat([q.detach().reshape(-1) for q in Net().parameters()])
    penalty = GradientNorm(rho, "p", power=1, step=rho / float(start.norm()))
    found, expected = (end(preconditioner, x, steps=1) for x in (penalty, SAM(rho, "p")))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_adaptive_sam_in_z_is_asam_in_p_for_diagonal_p_without_a_floor():
    for preconditioner in (RMS(), AdaGrad()):
        in_z, in_p = (end(preconditioner, SAM(0.1, space, True, eta=0.0, damping=0)) for space in "zp")
        torch.testing.assert_close(in_z, in_p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "penalty", [L2(0.1), L2(0.1, "p"), GradientNorm(0.1, method="exact"), GradientNorm(0.1, "p"), SAM(0.1)]
)
def test_in_plain_coordinates_both_spaces_are_one(penalty):
    other = type(penalty)(**{**vars(penalty), "space": "p"})
    assert torch.equal(end(Fixed(), penalty), end(Fixed(), other))


@pytest.mark.parametrize("lam", [0.0, 0])
@pytest.mark.parametrize(
    "preconditioner", [Fixed(), RMS(), Fixed(Dense(torch.eye(26).double() * 2)) @ RMS()], ids=["I", "rms", "@"]
)
@pytest.mark.parametrize(
    "make",
    [L2, L1, lambda x: L1(x, proximal=True), GradientNorm, lambda x: GradientNorm(x, power=1, q=1), SAM,
     lambda x: SAM(x, adaptive=True), lambda x: GradientNorm(x, method="central"), lambda x: GradientNorm(x, method="exact")],
)  # fmt: skip
def test_a_penalty_of_nothing_is_nothing(make, preconditioner, lam):
    torch.testing.assert_close(end(preconditioner, make(lam)), end(preconditioner), rtol=1e-13, atol=1e-13)


ALL = [
    L2(0.1), L2(0.1, "p"), L1(0.1), L1(0.1, "p"), L1(0.1, proximal=True), L1(0.1, "p", proximal=True), SAM(0.1), SAM(0.1, "p"),
    SAM(0.1, adaptive=True), SAM(0.1, "p", True), SAM(0.1, adaptive=True, eta=0.0), GradientNorm(0.1, method="central"),
    *(GradientNorm(0.1, s, k, q, "exact") for s in "pz" for k in (1, 2) for q in (1, 2, math.inf)),
    *(GradientNorm(0.1, s, k) for s in "pz" for k in (1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("penalty", ALL, ids=repr)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("dead", ["some", "all"])
def test_zero_gradients_make_no_nan(dead, eps, penalty):
    """A layer that the loss does not see, or all of them; parameters at zero; and P zero there (ε = 0)."""

    def prepare(net):
        net.b.bias.data[0] = 0.0

    def loss(net):
        return (net.a.weight.square().sum() if dead == "some" else 0.0) + sum(0.0 * q.sum() for q in net.parameters())

    for preconditioner in (RMS(eps=eps), AdaGrad(eps=eps), RMS(0.9, eps, start="first_gradient")):
        found = end(preconditioner, penalty, prepare=prepare, loss=loss)
        assert found.isfinite().all()


@pytest.mark.parametrize("method", ["forward", "central", "exact"])
@pytest.mark.parametrize(
    "preconditioner", [RMS(0.9), Route([("*.bias", RMS(0.9)), (is_matrix, AdaGrad())]), Fixed()], ids=["rms", "route", "I"]
)
@pytest.mark.parametrize("missing", ["frozen", "unused", "detached"])
def test_parameters_without_a_gradient_are_passed_over(missing, preconditioner, method):
    """Those that do not train, or that the loss does not reach, change nothing for the others; all methods agree."""

    def prepare(net):
        if missing == "frozen":
            net.a.weight.requires_grad_(False)

    def loss(net):
        if missing == "unused":
            return net.b(torch.tanh(net.x @ torch.ones(3, 4, dtype=net.x.dtype))).square().mean()
        bias = net.a.bias.detach() if missing == "detached" else net.a.bias
        return net.b(torch.tanh(nn.functional.linear(net.x, net.a.weight, bias))).square().mean()

    exact = end(preconditioner, GradientNorm(0.1, method="exact"), prepare=prepare, loss=loss)
    found = end(preconditioner, GradientNorm(0.1, method=method), prepare=prepare, loss=loss)
    start = torch.cat([q.detach().reshape(-1) for q in Net().parameters()])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    still = {"frozen": slice(0, 12), "unused": slice(0, 16), "detached": slice(12, 16)}[missing]
    assert torch.equal(found[still], start[still]) and (found != start).sum() == len(start) - (still.stop - still.start)


@pytest.mark.parametrize(("method", "error"), [("forward", 1e-2), ("backward", 1e-2), ("central", 3e-3)])
@pytest.mark.parametrize("space", ["p", "z"])
def test_finite_differences_in_float32_with_their_default_step(space, method, error):
    """pitfalls R13: 3e-3 of the penalty's gradient one-sided, 6e-4 central."""

    def penalty_of(method, dtype):
        options = {"steps": 1, "dtype": dtype, "lr": 1.0}
        plain = end(RMS(0.9), **options)
        return (end(RMS(0.9), GradientNorm(1.0, space, method=method), **options) - plain).double()

    exact = penalty_of("exact", torch.float64)
    assert (penalty_of(method, torch.float32) - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize(
    "preconditioner", [Fixed(), RMS(0.9), Fixed(Diagonal(tuple(torch.full((2,), x) for x in (2.0, -3.0))))]
)
def test_proximal_steps_make_exact_zeros_and_subgradients_do_not(preconditioner, space):
    def zeros(proximal):
        params = [nn.Parameter(torch.tensor([0.5, -1e-4])), nn.Parameter(torch.tensor([1e-4, 3.0]))]
        opt = PreconditionedGD(params, 0.1, preconditioner=preconditioner, regularizers=[L1(0.2, space, proximal)])
        opt.step(LossClosure(lambda: sum((q**2).sum() for q in params)))
        return [(q == 0).tolist() for q in params]

    assert zeros(True) == [[False, True], [True, False]]
    assert zeros(False) == [[False, False], [False, False]]


@pytest.mark.parametrize(
    ("preconditioner", "allowed"),
    [
        (Fixed(), True), (RMS(), True), (RMS() @ AdaGrad(), True), (Fixed(Diagonal((torch.ones(2),))), True),
        (Route([(is_matrix, RMS())]), True), (Fixed(Dense(torch.eye(2))), False), (RMS() @ Fixed(Dense(torch.eye(2))), False),
        (Route([(is_matrix, Fixed(Dense(torch.eye(2))))]), False),
    ],
)  # fmt: skip
def test_a_threshold_in_p_needs_a_diagonal_m_and_says_so_at_once(preconditioner, allowed):
    params = [nn.Parameter(torch.ones(2))]
    options = {"preconditioner": preconditioner, "regularizers": [L1(0.1, "p", proximal=True)]}
    if allowed:
        PreconditionedGD(params, **options)
    else:
        with pytest.raises(ValueError, match=r"needs a diagonal M.*use proximal=False or space='z'"):
            PreconditionedGD(params, **options)


@pytest.mark.parametrize("statistics_from", ["loss", "total"])
def test_probing_in_p_may_feed_the_statistics(statistics_from):
    """``"total"``: P from the gradient at p + δ, as wrappers around Adam do; ``"loss"``: from the clean one."""
    net = Net()
    opt = PreconditionedGD(net, preconditioner=RMS(0.0), regularizers=[SAM(0.5, "p")], statistics_from=statistics_from)
    net.loss().backward()
    clean = net.a.weight.grad.clone()
    while opt.probe():
        net.loss().backward()
    perturbed = net.a.weight.grad.clone()
    opt.step()
    seen = clean if statistics_from == "loss" else perturbed
    torch.testing.assert_close(opt.state[net.a.weight]["r"], seen.square())


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ([0.1], True), ([0.1, 0.1], True), ([1, 1.0], True), ([0.1, 0.0], False), ([TENSOR := torch.tensor(0.1), TENSOR], True),
        ([TENSOR, torch.tensor(0.1)], False), ([TENSOR, 0.0], False), ([0.0, TENSOR], False),
        ([torch.tensor(0.1, device="meta")] * 2, True),
    ],
)  # fmt: skip
def test_uniform_reads_no_tensor(values, same):
    assert vec.uniform(values) is same


@pytest.mark.parametrize("penalty", [SAM(0.05, adaptive=True), GradientNorm(0.1, q=1), L1(0.1, space="z")], ids=repr)
@pytest.mark.parametrize("kind", ["recurrent", "transposed", "weight norm"])
def test_a_root_that_some_layers_lack_is_missed_at_once(kind, penalty):
    """``auto`` chooses by layers: where it orthogonalizes one matrix by one, M alone is stated."""
    made = {
        "recurrent": lambda: torch.nn.LSTM(5, 4),
        "transposed": lambda: torch.nn.ConvTranspose2d(3, 4, 3),
        "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 8)),
    }
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(5, 5), "odd": made[kind]()})
    with pytest.raises(ValueError, match=r"depends on the root P.* states no root.*\(it acts on odd\."):
        precond.auto(model, regularizers=[penalty])
    precond.auto(model["first"], regularizers=[penalty])
