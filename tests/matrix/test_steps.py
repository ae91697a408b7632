"""Matrix preconditioners step by step against explicit matrices (oracles.py), beyond the sweeps of tests/test_oracle.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import oracle
import precond
from matrix import oracles
from matrix.test_peers import relative, run
from precond import L2, RMS, SAM, SOAP, GradientNorm, LossClosure, Momentum, Muon, PreconditionedGD, Shampoo, Whitening
from precond.optim.preconditioners.newton_schulz import JORDAN, Iteration, polynomial
from precond.optim.preconditioners.roots import inverse_root, largest_eigenvalue

DRAW = torch.Generator().manual_seed(7)


def draw(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


def explicit(preconditioner, theirs, shape, steps=9, **options):
    """A step of each with the same gradients: W ← W − αM g, to 1e-9 of the way."""
    start, gradients = draw(*shape), [draw(*shape) for _ in range(steps)]
    p = nn.Parameter(start.clone())
    optimizer = PreconditionedGD([p], lr=0.1, preconditioner=preconditioner, **options)
    q = start.clone()
    for g in gradients:
        run(optimizer, p, [g])
        theirs.see(g)
        P = theirs.P()
        q = q - 0.1 * (P @ P.T @ g.reshape(-1)).reshape(shape)
        assert relative(p, q, start) < 1e-9


@pytest.mark.parametrize("shape", [(4, 4), (5, 5), (3, 3, 1)])
def test_soap_with_both_sides(shape):
    n = shape[0]
    explicit(SOAP(0.9, every=3), oracles.SOAP(n, n, 0.9, every=3), shape)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(9, 9), (9, 10), (4, 9), (9, 3), (9, 3, 4)])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_soap_with_leading_eigenvectors(shape, rank, engine):
    """Of sides longer than 4r; shorter ones keep all of theirs."""
    theirs = oracles.SOAP(shape[0], math.prod(shape[1:]), 0.9, every=3, rank=rank)
    explicit(SOAP(0.9, every=3, rank=rank), theirs, shape, engine=engine)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shape", [(9, 10), (4, 9), (9, 3), (9, 3, 4)])
@pytest.mark.parametrize(
    "options", [{}, {"maximize": True, "factor_frequency": 2}, {"sides": "left"}, {"sides": "right"}], ids=str
)
def test_the_kernel_of_leading_eigenvectors_takes_the_loop_s_steps(shape, rank, options):
    start, gradients = draw(*shape), [draw(*shape) for _ in range(9)]
    ends = []
    for engine in ("fused", "loop"):
        p = nn.Parameter(start.clone())
        optimizer = precond.soap([p], lr=0.02, precondition_frequency=3, rank=rank, weight_decay=0.3, engine=engine, **options)
        ends.append(run(optimizer, p, gradients))
    assert relative(*ends, start) < 1e-10


@pytest.mark.parametrize("method", ["eigh", "qr", "newton"])
def test_methods_of_shampoo_s_roots(method):
    """The basis that is followed step by step nears the exact one; the iteration ends at it."""
    start, gradients = draw(5, 5), [draw(5, 5) for _ in range(3)]
    ends = []
    for preconditioner in (Shampoo(every=1, damping=0.01), Shampoo(every=1, damping=0.01, method=method)):
        p = nn.Parameter(start.clone())
        ends.append(run(PreconditionedGD([p], lr=0.1, preconditioner=preconditioner), p, gradients + 60 * gradients[-1:]))
    assert relative(ends[1], ends[0], start) < {"eigh": 1e-15, "newton": 1e-11, "qr": 2e-2}[method]


@pytest.mark.parametrize(("shape", "block"), [((5, 7), 3), ((4, 6, 2), 4), ((7, 2), 4), ((3, 3), 3)])
def test_tiles_are_matrices_of_their_own(shape, block):
    start, gradients = draw(*shape), [draw(*shape) for _ in range(3)]
    p = nn.Parameter(start.clone())
    optimizer = PreconditionedGD([p], lr=0.1, preconditioner=Shampoo(every=1, block=block, damping=0.1))
    end = run(optimizer, p, gradients).reshape(shape[0], -1)
    matrices = [t.reshape(shape[0], -1) for t in (start, *gradients)]
    pieces = [-(-n // -(-n // block)) for n in matrices[0].shape]  # of equal length, but for the last
    for i in range(0, shape[0], pieces[0]):
        for j in range(0, matrices[0].shape[1], pieces[1]):
            q, *g = (m[i : i + pieces[0], j : j + pieces[1]].clone() for m in matrices)
            theirs = oracles.Shampoo(*q.shape, damping=0.1)
            for x in g:
                theirs.see(x)
                q = q - 0.1 * (theirs.M() @ x.reshape(-1)).reshape(q.shape)
            torch.testing.assert_close(end[i : i + pieces[0], j : j + pieces[1]], q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graft", ["adagrad", "rms"])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_steps_have_the_grafted_length(graft, decay):
    """‖M g‖ is ‖g/(√r + ε)‖, r the sum of g² or its mean, corrected for its start."""
    shape, rho, eps = (4, 3), 0.8, 1e-3
    p, theirs = nn.Parameter(draw(*shape)), oracles.Shampoo(*shape, decay=decay, damping=0.1)
    P = Shampoo(decay=decay, damping=0.1, every=1, graft=graft, graft_decay=rho, graft_eps=eps)
    optimizer, seen = PreconditionedGD([p], lr=1.0, preconditioner=P), []
    for t in range(1, 6):
        g, before = draw(*shape), p.detach().clone()
        seen.append(g)
        theirs.see(g)
        run(optimizer, p, [g])
        weights = [1.0 if graft == "adagrad" else (1 - rho) * rho ** (t - 1 - k) / (1 - rho**t) for k in range(t)]
        r = sum(w * x**2 for w, x in zip(weights, seen, strict=True))
        step = (theirs.M() @ g.reshape(-1)).view(shape)
        expected = step * (g / (r.sqrt() + eps)).norm() / step.norm()
        # Roots of matrices of 4 rows damped at a tenth: some hundred roundings.
        torch.testing.assert_close(before - p.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("graft", "length"), [("sgd", lambda g: g), ("adagrad", lambda g: g.sign()), ("rms", lambda g: g.sign())]
)
def test_the_first_step_has_the_grafted_length(graft, length):
    p, g = nn.Parameter(draw(4, 6)), draw(4, 6)
    before = p.detach().clone()
    run(PreconditionedGD([p], lr=1.0, preconditioner=Shampoo(graft=graft, damping=1e-3)), p, [g])
    torch.testing.assert_close((p - before).norm(), length(g).norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 2)])
@pytest.mark.parametrize("penalty", ["none", "L2 in p", "SAM"])
def test_muon_is_made_of_the_clean_momentum(penalty, shape, exact):
    """M from the average of ∇L alone, applied to the average of what is descended: ∇L + 2λp, or ∇L at p + δ."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    A, start, beta = draw(rows * columns, rows * columns) / 4, draw(*shape), 0.7
    H = A @ A.T + torch.eye(len(A), dtype=torch.float64)
    mix = oracle.Momentum(beta, "nesterov", dampening=beta)
    ours = {"none": [], "L2 in p": [L2(0.2, "p")], "SAM": [SAM(0.1, "p")]}[penalty]
    p = nn.Parameter(start.clone())
    optimizer = PreconditionedGD(
        [p], lr=0.05, preconditioner=Muon(root="eigh" if exact else "newton-schulz"), regularizers=ours,
        momentum=Momentum(beta, "nesterov", dampening=beta),
    )  # fmt: skip
    theirs = oracles.Muon(
        rows, columns, lambda seen: mix.of_history([x.reshape(-1) for x in seen]).view(rows, columns),
        max(1.0, rows / columns) ** 0.5, exact,
    )  # fmt: skip
    x, descended = start.reshape(-1).clone(), []
    for _ in range(5):
        optimizer.step(LossClosure(lambda: (p.reshape(-1) @ H @ p.reshape(-1)) / 2))
        g = H @ x
        theirs.see(g)
        a = {"none": g, "L2 in p": g + 0.4 * x, "SAM": H @ (x + 0.1 * g / g.norm())}[penalty]
        descended.append(a)
        x = x - 0.05 * theirs.M() @ mix.of_history(descended)
        assert relative(p.reshape(-1), x, start.reshape(-1)) < 1e-9
    assert ("clean" in optimizer.state[p]) == (penalty != "none")


def test_a_preconditioner_may_have_an_average_of_its_own():
    weight, bias, g = nn.Parameter(draw(4, 3)), nn.Parameter(draw(4)), [draw(4, 3), draw(4, 3)]
    start = weight.detach().clone(), bias.detach().clone()
    optimizer = precond.muon([weight, bias], lr=0.1, momentum=0.5, nesterov=False, weight_decay=0.0, betas=(0.9, 0.99))
    for x in g:
        weight.grad, bias.grad = x.clone(), x[:, 0].clone()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], 0.25 * g[0] + 0.5 * g[1])
    torch.testing.assert_close(optimizer.state[bias]["momentum_buffer"], 0.09 * g[0][:, 0] + 0.1 * g[1][:, 0])
    twin = nn.Parameter(start[1].clone())
    run(torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0), twin, [x[:, 0] for x in g])
    torch.testing.assert_close(bias, twin)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (5, 6), (260, 420), (300, 257)])
def test_newton_schulz_in_any_form_is_what_it_makes_of_singular_values(shape, steps):
    X = draw(*shape)
    X = X / X.norm()
    U, sigma, V = torch.linalg.svd(X, full_matrices=False)
    expected = U @ torch.diag(oracles.quintic(sigma, steps)) @ V
    end, gram = Iteration(JORDAN, steps)(X.clone(), lambda *shapes: [torch.empty(s, dtype=X.dtype) for s in shapes])
    torch.testing.assert_close(end, expected, rtol=1e-9, atol=1e-9)
    left = shape[0] <= shape[1]
    torch.testing.assert_close(gram, X @ X.T if left else X.T @ X)
    Q = polynomial(gram, JORDAN, steps)
    torch.testing.assert_close(Q @ X if left else X @ Q, expected, rtol=1e-8, atol=1e-8)


SPECTRA = {
    "power law": lambda i: 1 / (1 + i),
    "steep": lambda i: (1 + i) ** -2,
    "one large": lambda i: torch.where(i == 0, 1.0, 0.01),
    "half": lambda i: torch.where(i < len(i) / 2, 1.0, 0.01),
    "exponential": lambda i: torch.exp(-12 * i / len(i)),
    "rank 3": lambda i: torch.where(i < 3, 1.0, 0.0),
}


@pytest.mark.parametrize("shape", [(256, 640), (640, 256), (64, 256)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_newton_schulz_in_bfloat16_bears_uneven_singular_values(kind, shape):
    """It loses at most four times what torch's own does (3.1 in 61 draws), where that is little, and no more where that is much.

    In Gram form throughout, rounding makes negative eigenvalues that grow to a hundred times the step.
    """
    s = min(shape)
    sigma = SPECTRA[kind](torch.arange(s, dtype=torch.float64))
    generator = torch.Generator().manual_seed(7)  # of its own: what is drawn does not depend on the tests before
    U, V = (torch.linalg.qr(torch.randn(n, s, generator=generator, dtype=torch.float64))[0] for n in shape)
    X = U * sigma @ V.T
    exact = Iteration(JORDAN, 5)(X / X.norm(), lambda *shapes: [torch.empty(x, dtype=torch.float64) for x in shapes])[0]
    narrow, scale = X.bfloat16(), float(1 / X.norm())
    end = Iteration(JORDAN, 5)(narrow, lambda *shapes: [torch.empty(x, dtype=torch.bfloat16) for x in shapes], scale)[0]
    ours, theirs = (
        float((x.double() - exact).norm() / exact.norm())
        for x in (end, torch.optim._muon._zeropower_via_newtonschulz(X, JORDAN, 5, 1e-7))
    )
    assert ours < max(4 * theirs, 0.03) and ours < max(1.2 * theirs, 0.06)


@pytest.mark.parametrize("name", ["muon", "soap", "soap, left", "soap, conv"])
def test_fused_steps_in_float32_are_the_loop_s(name):
    make = {
        "muon": lambda p, **more: precond.muon(p, arithmetic="full", **more),
        "soap": lambda p, **more: precond.soap(p, precondition_frequency=3, **more),
        "soap, left": lambda p, **more: precond.soap(p, precondition_frequency=3, sides="left", **more),
        "soap, conv": lambda p, **more: precond.soap(p, precondition_frequency=3, sides="right", **more),
    }[name]
    shape = (9, 3, 3) if name == "soap, conv" else (40, 40)
    start, gradients = draw(*shape).float(), [draw(*shape).float() for _ in range(8)]
    ends = []
    for engine in ("fused", "loop"):
        p = nn.Parameter(start.clone())
        ends.append(run(make([p], lr=0.02, engine=engine), p, gradients))
    assert relative(ends[0], ends[1], start) < 2e-4


LAYOUTS = {
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "a slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("make", [precond.muon, precond.soap, precond.shampoo], ids=lambda f: f.__name__)
def test_the_layout_in_memory_changes_nothing(make, layout, of):
    options = {"arithmetic": "full"} if make is precond.muon else {"precondition_frequency": 2}
    start, gradients, ends = draw(6, 3, 2, 2), [draw(6, 3, 2, 2) for _ in range(5)], []
    for laid in (lambda x: x.clone(), LAYOUTS[layout]):
        p = nn.Parameter(laid(start) if of != "gradient" else start.clone())
        optimizer = make([p], lr=0.01, **options)
        for g in gradients:
            p.grad = laid(g) if of != "parameter" else g.clone()
            optimizer.step()
        ends.append(p.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_momentum_of_soap_follows_its_frame():
    """Kept in rotated coordinates it is, rotated back, the plain average of gradients, whatever the bases did."""
    p, gradients = nn.Parameter(draw(5, 5)), [draw(5, 5) for _ in range(12)]
    optimizer = precond.soap([p], lr=0.01, precondition_frequency=2, betas=(0.8, 0.9))
    run(optimizer, p, gradients)
    state = optimizer.state[p]
    back = state["left_basis"] @ state["exp_avg"] @ state["right_basis"].T
    average = sum(0.2 * 0.8 ** (11 - k) * g for k, g in enumerate(gradients))
    torch.testing.assert_close(back, average, rtol=1e-10, atol=1e-10)


def test_a_basis_is_left_alone_until_it_has_turned():
    p, q = nn.Parameter(draw(5, 5)), nn.Parameter(draw(5, 5))
    lazy, eager = precond.soap([p], drift=0.9, precondition_frequency=2), precond.soap([q], drift=0.0, precondition_frequency=2)
    g = draw(5, 5)
    for optimizer, w in ((lazy, p), (eager, q)):
        run(optimizer, w, [g])
        first = optimizer.state[w]["left_basis"].clone()
        run(optimizer, w, [draw(5, 5) for _ in range(5)])
        assert torch.equal(first, optimizer.state[w]["left_basis"]) == (optimizer is lazy)


@pytest.mark.parametrize("factors", [2, 3])
def test_factors_may_be_updated_less_often(factors):
    p, gradients = nn.Parameter(draw(4, 4)), [draw(4, 4) for _ in range(7)]
    run(precond.soap([p], factor_frequency=factors, shampoo_beta=0.5), p, gradients)
    optimizer = precond.soap([p], factor_frequency=factors, shampoo_beta=0.5)
    run(optimizer, p, gradients)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for g in gradients[::factors]:
        expected = 0.5 * expected + 0.5 * g @ g.T
    torch.testing.assert_close(optimizer.state[p]["left"], expected)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_inverse_roots(power, method, condition):
    Q = torch.linalg.qr(draw(12, 12))[0]
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 12, dtype=torch.float64) * 37
    found = inverse_root(Q * s @ Q.T, power, 1e-5, method)
    torch.testing.assert_close(found, Q * (s + 37e-5) ** -power @ Q.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "to"), [(2, 1e-14), (32, 1e-13), (300, 0.04)])
@pytest.mark.parametrize("kind", ["even", "steep", "centered", "rank one", "identity"])
def test_the_largest_eigenvalue(n, to, kind):
    """Never above it by more than rounding; a constant vector, which centered statistics map to zero, is no bad case.

    Of 300 by 32 steps to 0.103 (log(n (k−1)⁴)/(k−1))² in the mean over starts, whatever the gap (Kuczyński and Woźniakowski, 1992).
    """
    Q = torch.linalg.qr(draw(n, n))[0]
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    S = {
        "even": lambda: draw(n, 2 * n),
        "steep": lambda: Q * torch.arange(1, n + 1).double() ** -1,
        "centered": lambda: H @ draw(n, 2 * n),
        "rank one": lambda: draw(n, 1),
        "identity": lambda: torch.eye(n, dtype=torch.float64),
    }[kind]()
    S = S @ S.T
    exact = torch.linalg.eigvalsh(S)[-1]
    found = largest_eigenvalue(S)
    assert exact * (1 - to) <= found <= exact * (1 + 1e-12)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x)


def test_kfac_is_b_times_a_inverse():
    """On one layer after one step: dW = (B/β + ε)⁻¹ G A⁻¹ with G in whitened coordinates for B; no bias left out."""
    model, x, y = Layer(), draw(50, 3) @ torch.diag(torch.tensor([1.0, 5.0, 0.2]).double()) + 0.3, draw(50, 4)
    W, b = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    optimizer = PreconditionedGD(
        model,
        lr=1.0,
        preconditioner=precond.Whitening(damping=0.0, every=1, shrinkage=0.0) @ precond.OutputFactor(damping=0.1, every=1),
    )
    before = model(x)
    nn.functional.mse_loss(before, y).backward()
    optimizer.step()  # the covariance is known after it: the root is taken then
    start = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    first = torch.cat([model.layer.bias.grad[:, None], model.layer.weight.grad], 1)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    G = torch.cat([model.layer.bias.grad[:, None], model.layer.weight.grad], 1)
    optimizer.step()
    H = torch.cat([torch.ones(50, 1, dtype=torch.float64), x], 1)
    A = H.T @ H / 50
    X = H - torch.tensor([1.0, 0, 0, 0]).double() * 0
    assert X.shape == H.shape
    # In the first step inputs were standardized, their correlations not yet taken.
    mean, std = x.mean(0), x.std(0, unbiased=False)
    P1 = torch.eye(4, dtype=torch.float64)
    P1[1:, 1:], P1[0, 1:] = torch.diag(1 / std), -mean / std
    B = 0.0475 * first @ P1 @ P1.T @ first.T + 0.05 * G @ torch.linalg.inv(A) @ G.T
    normal = B / B.diagonal().mean()
    M = torch.linalg.inv(normal + 0.1 * torch.linalg.eigvalsh(normal).max() * torch.eye(4, dtype=torch.float64))
    step = M @ G @ torch.linalg.inv(A)
    torch.testing.assert_close(start[0] - model.layer.weight, step[:, 1:], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(start[1] - model.layer.bias, step[:, 0], rtol=1e-6, atol=1e-9)
    assert not torch.equal(W, model.layer.weight) and not torch.equal(b, model.layer.bias)


@pytest.mark.parametrize(
    "inner", [Muon(), SOAP(every=2), Shampoo(0.5, 0.9, sides="left", damping=0.1)], ids=lambda x: type(x).__name__
)
def test_in_whitened_coordinates_a_scale_of_inputs_is_nothing(inner):
    """An invertible change of the inputs is undone by whitening: M of the composition moves the outputs alike."""
    x, y = draw(200, 3), draw(200, 4)
    outputs = []
    for scale in (torch.ones(3, dtype=torch.float64), torch.tensor([100.0, 0.01, 3.0]).double()):
        model = Layer()
        with torch.no_grad():
            model.layer.weight.copy_(torch.arange(12.0).view(4, 3) / 10 / scale)
            model.layer.bias.zero_()
        optimizer = PreconditionedGD(
            model,
            lr=0.05,
            preconditioner=Whitening(damping=0.0, root="cholesky", every=1, shrinkage=0.0) @ inner,
            momentum=Momentum(0.5),
        )
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x * scale), y).backward()
            optimizer.step()
        outputs.append(model(x * scale).detach())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: Muon(), lambda: SOAP(), lambda: Shampoo()])
def test_what_their_maps_allow(make):
    root_needed = GradientNorm(0.1, q=1)
    if isinstance(make(), Muon):
        for refused in (root_needed, precond.L1(0.1), SAM(0.1, adaptive=True)):
            with pytest.raises(ValueError, match=r"no root|singular"):
                refused.validate(make())
    else:
        for allowed in (root_needed, precond.L1(0.1), SAM(0.1, adaptive=True)):
            allowed.validate(make())
    assert make().needs == "block"
    assert RMS().needs == "entry"
