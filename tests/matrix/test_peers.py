"""The recipes against public implementations in float64, where these are installed; torch's Muon always."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import _muon

import precond

SHAPES = [(6, 4), (4, 6), (5, 5), (9, 3)]


def draws(shape, count, seed=0):
    """A start and gradients whose columns differ in scale."""
    make = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 0.3, shape[1], dtype=torch.float64)
    start, *gradients = (torch.randn(shape, generator=make, dtype=torch.float64) for _ in range(count + 1))
    return start, [g * scale for g in gradients]


def run(optimizer, p, gradients):
    for g in gradients:
        p.grad = g.to(p.dtype, copy=True)
        optimizer.step()
    return p.detach()


def relative(a, b, start):
    """How far apart two ends are, as a share of the way."""
    return float((a.double() - b.double()).norm() / (b.double() - start.double()).norm())


def in_float64(grad, coefficients, steps, eps):
    """torch's iteration without its bfloat16."""
    a, b, c = coefficients
    X = grad.T if grad.size(0) > grad.size(1) else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if grad.size(0) > grad.size(1) else X


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_is_torch_s_formula_to_rounding(shape, options, engine, monkeypatch):
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", in_float64)
    start, gradients = draws(shape, 12)
    ends = []
    for make in (torch.optim.Muon, lambda p, **more: precond.muon(p, engine=engine, **more)):
        p = nn.Parameter(start.clone())
        optimizer = make([p], **{"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": None, **options})
        ends.append(run(optimizer, p, gradients))
    assert relative(ends[1], ends[0], start) < 1e-12


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (320, 320), (512, 600)])
def test_muon_in_bfloat16_is_near_to_the_polynomial(shape, monkeypatch):
    """Within 2.5 %, and twice what torch's loses: a product of factors of the Gram matrix rounds more often."""
    monkeypatch.setattr("precond.algebra.precision.multiplies_bfloat16", lambda: True)
    start, gradients = draws(shape, 3)
    ends = {}
    for name, make in {
        "polynomial": lambda p: precond.muon(p, lr=0.02, adjust_lr_fn=None, engine="loop"),
        "full": lambda p: precond.muon(p, lr=0.02, adjust_lr_fn=None, arithmetic="full"),
        "ours": lambda p: precond.muon(p, lr=0.02, adjust_lr_fn=None),
        "torch": lambda p: torch.optim.Muon(p, lr=0.02),
    }.items():
        p = nn.Parameter(start.clone() if name == "polynomial" else start.float())
        ends[name] = run(make([p]), p, gradients)
    away = {name: relative(end, ends["polynomial"], start) for name, end in ends.items()}
    assert away["full"] < 1e-4
    assert away["ours"] < 0.025 and away["ours"] < 2 * away["torch"]


def test_muon_goes_on_from_torch_s_state_and_back():
    start, gradients = draws((6, 4), 12)
    p, q, r = (nn.Parameter(start.clone()) for _ in range(3))
    theirs, ours = torch.optim.Muon([p], lr=0.02), precond.muon([q], lr=0.02, adjust_lr_fn=None)
    run(theirs, p, gradients[:5])
    with torch.no_grad():
        q.copy_(p)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[q]["momentum_buffer"], theirs.state[p]["momentum_buffer"])
    run(ours, q, gradients[5:8])
    with torch.no_grad():
        r.copy_(q)
    back = torch.optim.Muon([r], lr=0.5)
    back.load_state_dict(ours.state_dict())
    run(back, r, gradients[8:])
    run(theirs, p, gradients[5:])
    assert relative(r, p, start) < 0.1  # bfloat16 there
    assert back.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_soap_takes_pytorch_optimizer_s_steps_from_its_state(shape, engine):
    """To 2e-6: it takes its QR decomposition in float32, its weight decay after the step, and adds ε before the correction of r."""
    peer = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed (extra [bench])")
    options = {"lr": 0.01, "betas": (0.9, 0.95), "precondition_frequency": 5, "eps": 1e-12, "weight_decay": 0.0}
    start, gradients = draws(shape, 40)
    p = nn.Parameter(start.clone())
    theirs = peer.SOAP([p], **options)
    run(theirs, p, gradients[:13])
    q, middle = nn.Parameter(p.detach().clone()), p.detach().clone()
    ours = precond.soap([q], engine=engine, **options)
    known, mine = theirs.state[p], ours.state[q]
    mine["left"].copy_(known["GG"][0])
    mine["right"].copy_(known["GG"][1])
    mine["left_basis"].copy_(known["Q"][0])
    mine["right_basis"].copy_(known["Q"][1])
    mine["exp_avg_sq"].copy_(known["exp_avg_sq"])
    mine["exp_avg"].copy_(known["Q"][0].T @ known["exp_avg"] @ known["Q"][1])
    mine["step"].fill_(theirs.param_groups[0]["step"] - 1)  # its first step moved nothing
    run(theirs, p, gradients[13:])
    run(ours, q, gradients[13:])
    assert relative(q, p, middle) < 2e-6


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_shampoo_is_pytorch_optimizer_s(shape):
    peer = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed (extra [bench])")
    start, gradients = draws(shape, 12)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(peer.Shampoo([p], lr=0.1, matrix_eps=1e-3), p, gradients)
    ours = precond.shampoo(
        [q], lr=0.1, betas=(0.0, 0.999), shampoo_beta=-1, graft="none", precondition_frequency=1, matrix_eps=0.0, initial=1e-3,
        weight_decay=0.0,
    )  # fmt: skip
    run(ours, q, gradients)
    assert relative(q, p, start) < 1e-9


def test_a_state_of_its_own_goes_through_torch_save(tmp_path):
    for name in ("muon", "soap", "shampoo"):
        start, gradients = draws((6, 4), 8)
        p = nn.Parameter(start.clone())
        optimizer = precond.RECIPES[name]([p], lr=0.02)
        run(optimizer, p, gradients[:4])
        torch.save(optimizer.state_dict(), tmp_path / name)
        q = nn.Parameter(p.detach().clone())
        resumed = precond.RECIPES[name]([q], lr=0.5)
        resumed.load_state_dict(copy.deepcopy(torch.load(tmp_path / name, weights_only=True)))
        assert torch.equal(run(optimizer, p, gradients[4:]), run(resumed, q, gradients[4:]))
