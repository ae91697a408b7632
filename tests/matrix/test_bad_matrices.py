"""Matrices that are zero, of rank one, enormous, thin or empty; factors that have no eigenvalues; options out of range."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import precond
from matrix.test_peers import run
from precond import SOAP, Momentum, Muon, OutputFactor, PreconditionedGD, Shampoo
from precond.algebra.maps import Kronecker, SymmetricKronecker
from precond.optim.preconditioners import roots
from precond.optim.preconditioners.eigenbases import begin

MAKE = {
    "muon": lambda p: precond.muon(p, lr=0.01),
    "muon, exact": lambda p: precond.muon(p, lr=0.01, root="eigh"),
    "muon, loop": lambda p: precond.muon(p, lr=0.01, engine="loop"),
    "soap": lambda p: precond.soap(p, lr=0.01, precondition_frequency=2),
    "soap, loop": lambda p: precond.soap(p, lr=0.01, precondition_frequency=2, engine="loop"),
    "soap, drift": lambda p: precond.soap(p, lr=0.01, precondition_frequency=2, sides="smaller", drift=0.1),
    "soap, rank": lambda p: precond.soap(p, lr=0.01, precondition_frequency=2, rank=1),
    "soap, rank, drift, loop": lambda p: precond.soap(p, lr=0.01, precondition_frequency=2, rank=1, drift=0.1, engine="loop"),
    "shampoo": lambda p: precond.shampoo(p, lr=0.01, precondition_frequency=2),
    "shampoo, newton": lambda p: precond.shampoo(p, lr=0.01, precondition_frequency=1, method="newton"),
    "shampoo, plain": lambda p: precond.shampoo(p, lr=0.01, precondition_frequency=2, graft="none"),
    "shampoo, qr": lambda p: precond.shampoo(p, lr=0.01, precondition_frequency=2, method="qr", graft="sgd", shampoo_beta=-1),
    "outputs": lambda p: PreconditionedGD(p, lr=0.01, preconditioner=OutputFactor()),
}
each = pytest.mark.parametrize("name", MAKE)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zero", "zero, then not", "rank one", "tiny", "large", "one entry"])
def test_gradients_that_tell_little(name, kind, dtype):
    """Steps stay finite, and where the gradient says nothing at all nothing moves."""
    shape = (6, 4)
    make = torch.Generator().manual_seed(1)
    g = torch.randn(shape, generator=make)
    entry = torch.zeros(shape)
    entry[2, 1] = 3.0
    gradients = {
        "zero": [0 * g] * 5,
        "zero, then not": [0 * g] * 3 + [g] * 3,
        "rank one": [g[:, :1] @ g[:1]] * 5,
        "tiny": [1e-30 * g] * 5,
        "large": [1e15 * g, g, 1e15 * g, g],
        "one entry": [entry] * 5,
    }[kind]
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(MAKE[name]([p]) if name != "outputs" else MAKE[name](named(p)), p, gradients)
    assert p.isfinite().all()
    decay = 1 if name == "outputs" else (1 - 0.01 * (0.1 if "muon" in name else 0.01)) ** 5
    if kind == "zero":
        torch.testing.assert_close(p, torch.full_like(p, decay), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    elif kind != "tiny" and dtype != torch.bfloat16:
        assert (p.double() - decay).abs().max() > 1e-3


def named(p):
    model = nn.Module()
    model.weight = p
    return model


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_any_size(name, dtype):
    """From 1e-40, whose squares vanish, to 1e30, whose squares overflow: nothing becomes NaN."""
    for exponent in (-40, *range(-24, -16), -10, 10, *range(17, 22), 30):
        p, make = nn.Parameter(torch.ones(6, 4, dtype=dtype)), torch.Generator().manual_seed(1)
        optimizer = MAKE[name](named(p) if name == "outputs" else [p])
        if name in ("outputs", "shampoo, plain"):
            optimizer.param_groups[0]["lr"] = 1e-40  # their steps are as long as gradients are
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a statistic of gradients holds inf or NaN")
            run(optimizer, p, [10.0**exponent * torch.randn(6, 4, generator=make) for _ in range(6)])
        assert p.isfinite().all(), exponent


@each
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (0, 3), (3, 0), (5,), (), (0,), (2, 3, 2, 2), (1, 3, 1)])
def test_shapes(name, shape):
    p, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(3, 2))
    optimizer = MAKE[name]([p, other])
    run(optimizer, other, [torch.randn(3, 2)])
    run(optimizer, p, [torch.randn(shape) for _ in range(5)])
    assert p.isfinite().all() and (p.numel() == 0 or not torch.equal(p, torch.ones(shape)))
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("preconditioner", "kept"),
    [
        (SOAP(max_dim=5), {"left"}),
        (SOAP(max_dim=3), set()),
        (SOAP(sides="smaller"), {"left"}),
        (SOAP(sides="right"), {"right"}),
        (Shampoo(sides="smaller", max_dim=3), set()),
        (Shampoo(max_dim=5), {"left.0"}),
        (Shampoo(block=3), {"left.0", "right.0", "left.3", "right.3"}),
    ],
)
def test_sides_over_the_limit_are_left_alone_or_cut(preconditioner, kept):
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = PreconditionedGD([p], lr=0.01, preconditioner=preconditioner)
    run(optimizer, p, [torch.randn(4, 6) for _ in range(3)])
    assert kept <= optimizer.state[p].keys() and ("right" in kept) == ("right" in optimizer.state[p])
    assert p.isfinite().all()


def fail(times):
    """torch.linalg.eigh, whose iteration does not converge so many times."""
    calls, real = [], torch.linalg.eigh

    def eigh(S):
        calls.append(S.dtype)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(S)

    return eigh, calls


def test_an_eigendecomposition_that_fails_is_tried_again_in_float64(monkeypatch):
    S = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    eigh, calls = fail(2)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    values, V = roots.decomposed(S)
    assert calls == [torch.float32, torch.float64, torch.float64] and values.dtype == V.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 3.0]), rtol=1e-3, atol=0)
    Q = torch.zeros(1, 3, 3)
    assert begin(S[None], Q).all()
    torch.testing.assert_close(Q[0].abs(), torch.eye(3)[:, [0, 2, 1]])


def test_of_many_bases_those_of_matrices_that_fail_stay(monkeypatch):
    """All are decomposed at once, and where that fails one by one."""
    S = torch.stack([torch.diag(torch.tensor([1.0, 2.0, x])) for x in (3.0, torch.nan, 4.0)])
    Q = torch.full((3, 3, 3), 7.0)
    with pytest.warns(UserWarning, match="holds inf or NaN"):
        assert begin(S, Q).tolist() == [True, False, True]
    assert torch.equal(Q[0].abs(), torch.eye(3)[:, [2, 1, 0]]) and torch.equal(Q[0], Q[2]) and (Q[1] == 7).all()
    fine, at_once = torch.zeros(2, 3, 3), S[[0, 2]]
    with monkeypatch.context() as patched:
        eigh, calls = fail(1)
        patched.setattr(torch.linalg, "eigh", eigh)
        assert begin(at_once, fine).all() and len(calls) == 3
    torch.testing.assert_close(fine, Q[[0, 2]])


@pytest.mark.parametrize("name", ["soap", "shampoo", "outputs"])
def test_where_it_fails_for_good_training_goes_on_and_says_so_once(name, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", fail(10**9)[0])
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = MAKE[name](named(p) if name == "outputs" else [p])
    with pytest.warns(UserWarning, match="no eigenvalues that converge: the basis or root before is kept"):
        run(optimizer, p, [torch.randn(4, 4)])
    assert p.isfinite().all() and not torch.equal(p, torch.ones(4, 4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(40):
            run(optimizer, p, [torch.randn(4, 4)])
    assert len(seen) <= 1 and p.isfinite().all()


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_soap_takes_the_eigenbasis_later_where_it_failed_or_nothing_was_seen(engine, monkeypatch):
    """A first gradient of zero (LoRA's) or a failure leaves the identity; the next gradient's eigenbasis is taken itself."""
    shape, make = (4, 6), torch.Generator().manual_seed(2)
    gradients = [torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(4)]
    for kind in ("zero", "fails"):
        p = nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = precond.soap([p], precondition_frequency=4, engine=engine)
        if kind == "zero":
            run(optimizer, p, [0 * gradients[0]])
        else:
            with monkeypatch.context() as patched, pytest.warns(UserWarning, match="no eigenvalues that converge"):
                patched.setattr(torch.linalg, "eigh", fail(10**9)[0])
                run(optimizer, p, gradients[:1])
        state = optimizer.state[p]
        assert kind == "fails" or torch.equal(state["left_basis"], torch.eye(4))
        run(optimizer, p, gradients[1:2])
        rotated = state["left_basis"].T @ state["left"] @ state["left_basis"]
        torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-10)
        run(optimizer, p, gradients[2:])
        assert p.isfinite().all() and not torch.equal(state["left_basis"], torch.eye(4))


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_muon_s_exact_root_falls_back_on_the_iteration_and_says_so(engine, monkeypatch):
    ends, g = [], torch.randn(6, 4)
    for root in ("eigh", "newton-schulz"):
        p = nn.Parameter(torch.ones(6, 4))
        optimizer = precond.muon([p], lr=0.01, root=root, engine=engine, arithmetic="full")
        with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as seen:
            patched.setattr(torch.linalg, "eigh", fail(10**9)[0])
            warnings.simplefilter("default")
            for _ in range(3):
                ends.append(run(optimizer, p, [g]).clone())
        assert len(seen) == (root == "eigh") and all("Newton–Schulz takes the root" in str(w.message) for w in seen)
    for a, b in zip(ends[:3], ends[3:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("root", ["eigh", "newton-schulz"])
def test_a_gradient_of_nan_goes_through_muon_as_through_torch_s(root):
    p = nn.Parameter(torch.ones(6, 4))
    run(precond.muon([p], lr=0.01, root=root), p, [torch.full((6, 4), torch.nan)])
    assert p.isnan().all()


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_penalty_s_map_survives_eigenvalues_that_do_not_converge(failures, monkeypatch):
    """Damped maps and roots are eigendecompositions, too."""
    A, B = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0, 4.0]))
    for make in (lambda: SymmetricKronecker(A, B, (torch.ones(2, 3),)), lambda: Kronecker(A, B, (torch.ones(2, 3),))):
        expected = make().damped(0.1).gram((torch.ones(2, 3),))[0]
        with monkeypatch.context() as patched:
            patched.setattr(torch.linalg, "eigh", fail(failures)[0])
            torch.testing.assert_close(make().damped(0.1).gram((torch.ones(2, 3),))[0], expected, rtol=1e-3, atol=0)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", fail(10**9)[0])
        with pytest.raises(torch.linalg.LinAlgError, match="of 2 rows do not converge"):
            SymmetricKronecker(A, B).mv((torch.ones(2, 3),))


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_a_gradient_of_inf_is_refused_whole_or_kept_out_of_the_bases(name):
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = precond.RECIPES[name]([p], lr=0.01, precondition_frequency=1, nonfinite="skip")
    run(optimizer, p, [torch.randn(4, 4)])
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    run(optimizer, p, [torch.full((4, 4), torch.inf)])
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[p].items())
    q = nn.Parameter(torch.ones(4, 4))
    other = precond.RECIPES[name]([q], lr=0.01, precondition_frequency=1)
    with pytest.warns(UserWarning, match="holds inf or NaN"):
        run(other, q, [torch.randn(4, 4), torch.full((4, 4), torch.inf), torch.randn(4, 4)])
    bases = [v for k, v in other.state[q].items() if "basis" in k or "root" in k]
    assert bases and all(v.isfinite().all() for v in bases)


def test_enormous_gradients_have_a_direction():
    for engine in ("auto", "loop"):
        p, g = nn.Parameter(torch.zeros(6, 4)), torch.randn(6, 4)
        q = nn.Parameter(torch.zeros(6, 4))
        run(precond.muon([p], lr=0.1, engine=engine, weight_decay=0.0, arithmetic="full"), p, [1e30 * g])
        run(precond.muon([q], lr=0.1, engine=engine, weight_decay=0.0, arithmetic="full"), q, [g])
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", [2, 3, 4, 6])
@each
def test_a_checkpoint_before_or_after_a_refresh(name, at, tmp_path):
    make = torch.Generator().manual_seed(3)
    gradients = [torch.randn(6, 4, generator=make) for _ in range(10)]
    p, q = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    give = named if name == "outputs" else lambda x: [x]
    optimizer = MAKE[name](give(p))
    run(optimizer, p, gradients[:at])
    torch.save([optimizer.state_dict(), p], tmp_path / "at")
    state, saved = torch.load(tmp_path / "at", weights_only=True)
    with torch.no_grad():
        q.copy_(saved)
    resumed = MAKE[name](give(q))
    resumed.load_state_dict(state)
    assert torch.equal(run(optimizer, p, gradients[at:]), run(resumed, q, gradients[at:]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Muon(steps=0), "steps must be > 0"),
        (lambda: Muon(steps=2.5), "steps must be a whole number"),
        (lambda: Muon(coefficients=(1.0, 2.0)), "coefficients must hold 3 numbers"),
        (lambda: Muon(root="newton"), "did you mean 'newton-schulz'"),
        (lambda: Muon(scale="rms"), "scale must be one of"),
        (lambda: precond.muon([nn.Parameter(torch.ones(2, 2))], adjust_lr_fn="match"), "adjust_lr_fn must be one of"),
        (lambda: SOAP(rank=0), "rank must be > 0"),
        (lambda: SOAP(decay=1.0), r"decay must lie in \[0, 1\)"),
        (lambda: SOAP(drift=1.5), r"drift must lie in \[0, 1\)"),
        (lambda: Muon(steps=100), "steps must be less than 100"),
        (lambda: SOAP(every=0), "every must be > 0"),
        (lambda: SOAP(every=2.5), "every must be a whole number"),
        (lambda: SOAP(sides="top"), "sides must be one of"),
        (lambda: Shampoo(power=0.3, method="newton"), "whole 1/power"),
        (lambda: Shampoo(graft="adam"), "graft must be one of"),
        (lambda: Shampoo(block=0), "block must be > 0"),
        (lambda: Shampoo(block=3.5), "block must be a whole number"),
        (lambda: OutputFactor(power=0.0), "power must be > 0"),
    ],
)
def test_options_out_of_range(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def step(optimizer, params, count):
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()


@pytest.mark.parametrize("recipe", ["soap", "shampoo"])
def test_groups_may_differ_in_what_they_rotate(recipe):
    """Two groups' limits make blocks of different number: each group has its own plan."""
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "max_precond_dim": 1}]
    optimizer = precond.RECIPES[recipe](groups, lr=0.01)
    step(optimizer, params, 3)
    assert [any("left" in k for k in optimizer.state[p]) for p in params] == [True, False, False]
    assert not any(torch.equal(p, torch.ones_like(p)) for p in params)


@pytest.mark.parametrize("recipe", ["soap", "shampoo"])
def test_limits_may_change_in_mid_training(recipe):
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    optimizer = precond.RECIPES[recipe](params, lr=0.01)
    (group,) = optimizer.param_groups
    for limit, block in ((8, 8), (5, 8), (1, 8), (8, 3), (8, 8)):
        group["max_precond_dim"] = limit
        if recipe == "shampoo":
            group["block_size"] = block
        step(optimizer, params, 3)
        kept = [k for k in optimizer.state[params[0]] if k.startswith(("left", "right"))]
        assert any(k.startswith("right") for k in kept) == (limit == 8) and bool(kept) == (limit > 1)
        precond.RECIPES[recipe](params).load_state_dict(optimizer.state_dict())
    assert all(p.isfinite().all() for p in params)


def test_the_smaller_side_of_a_row_is_none():
    """One output of 4096 inputs asks for no matrix of 4096²."""
    for shape, kept in (((1, 7), set()), ((7, 1), set()), ((2, 7), {"left"}), ((7, 2), {"right"})):
        p = nn.Parameter(torch.ones(shape))
        state = precond.soap([p], sides="smaller").state[p]
        assert state.keys() & {"left", "right"} == kept


def test_the_fused_muon_s_map_is_that_of_its_corrected_average():
    p, q, g = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4)), torch.randn(6, 4)
    maps = []
    for w, engine in ((p, "fused"), (q, "loop")):
        optimizer = PreconditionedGD([w], lr=0.1, preconditioner=Muon(arithmetic="full"), momentum=Momentum(0.9), engine=engine)
        run(optimizer, w, [g, g])
        maps.append(optimizer.map().gram((g,))[0])
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-5)
