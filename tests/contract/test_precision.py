"""Loss scaling, autocast and 16-bit parameters do not change what is computed."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import precond
from contract.table import DEVICE, OWN, batches, closure, flat, net, snapshot, train
from contract.test_second_pass import GRADIENTS, PROBING, loss_of
from precond import SAM, Dense, Fixed, PreconditionedGD

each = pytest.mark.parametrize("name", PROBING)


def scaled_steps(model, optimizer, scaler, data, before_step=lambda: None):
    for t, batch in enumerate(data):
        torch.manual_seed(t)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        while optimizer.probe(grad_scale=scaler.get_scale()):
            scaler.scale(loss_of(model, batch)).backward()
        before_step()
        scaler.step(optimizer)
        scaler.update()


@each
def test_scales_that_are_powers_of_two_change_no_bit(name):
    ends = []
    for scale in (1.0, 2.0**7, 2.0**12):
        model = net(torch.float32)
        optimizer = precond.adamw(model, lr=0.003, regularizers=[PROBING[name]])
        scaled_steps(model, optimizer, torch.amp.GradScaler("cpu", init_scale=scale), batches(4, torch.float32))
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@each
def test_unscaling_and_clipping_before_the_step(name):
    ends = []
    for unscale in (False, True):
        model = net(torch.float32)
        optimizer = precond.adamw(model, lr=0.003, regularizers=[PROBING[name]])
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

        def between(scaler=scaler, optimizer=optimizer, model=model, unscale=unscale):
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)

        scaled_steps(model, optimizer, scaler, batches(4, torch.float32), between)
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("name", "which"), [(name, k + 1) for name in PROBING for k in range(GRADIENTS[name])])
def test_overflow_in_any_pass_skips_and_backs_off(name, which):
    model = net(torch.float32)
    optimizer = precond.adamw(model, regularizers=[PROBING[name]])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_steps(model, optimizer, scaler, batches(2, torch.float32))
    before, states = flat(model), snapshot(optimizer)
    backward = 0

    def poison(g):
        nonlocal backward
        backward += 1
        return torch.full_like(g, torch.inf) if backward == which else g

    handle = model.conv.weight.register_hook(poison)
    scaled_steps(model, optimizer, scaler, batches(1, torch.float32))
    handle.remove()
    assert torch.equal(flat(model), before) and scaler.get_scale() == 512.0 and optimizer.last.skipped
    assert backward == which  # no gradient is evaluated in vain
    assert all(torch.equal(a, b) for a, b in zip(states, snapshot(optimizer), strict=True))
    scaled_steps(model, optimizer, scaler, batches(1, torch.float32))
    assert not torch.equal(flat(model), before) and flat(model).isfinite().all()


MATRIX = torch.eye(243) + 0.05 * torch.randn(243, 243, generator=torch.Generator().manual_seed(0))
UNDER_AUTOCAST = {
    **{name: OWN[name] for name in OWN if "whitening" in name or "bnp" in name.lower() or "SAM" in name},
    "dense map": lambda p, **more: PreconditionedGD(
        p, lr=0.01, preconditioner=Fixed(Dense(MATRIX.to(DEVICE))), regularizers=[SAM(0.5)], **more
    ),
}


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_around_the_step_is_autocast_around_the_forward(name, engine):
    """Neither its cached 16-bit weights nor 16-bit arithmetic may enter the second pass or the step."""
    ends = []
    for outside in (False, True):
        model = net(torch.float32)
        optimizer = UNDER_AUTOCAST[name](model, engine=engine)
        for batch in batches(3, torch.float32):

            def run(model=model, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(model, batch)
                loss.backward()
                return loss

            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16) if outside else nullcontext():
                optimizer.step(run)
        ends.append(flat(model))
    assert torch.equal(*ends)


@each
def test_16_bit_parameters_with_compensation_may_be_probed_and_resumed(name):
    def make(model, **more):
        return precond.adamw(model, lr=1e-3, regularizers=[PROBING[name]], rounding="kahan", **more)

    data = batches(8, torch.bfloat16)
    model = net(torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer, data[:4])
    assert {t.dtype for e in optimizer.state.values() for k, t in e.items() if k not in ("residual", "step")} == {torch.float32}
    other = net(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    successor = make(other, nonfinite="propagate")
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = []
    for m, o in ((model, optimizer), (other, successor)):
        train(m, o, data[4:])
        ends.append(flat(m))
    assert torch.equal(*ends) and ends[0].isfinite().all()


def test_compensated_bfloat16_follows_float32():
    """200 small steps: nearest rounding stands still, compensation does not (R26)."""
    distance = {}
    for rounding in ("nearest", "kahan"):
        ends = []
        for dtype in (torch.float32, torch.bfloat16):
            model = net(torch.float32, dropout=0.0).to(dtype)
            optimizer = precond.adamw(model, lr=1e-5, weight_decay=0.0, rounding=rounding)
            (batch,) = batches(1, dtype)
            start = flat(model).float()
            for _ in range(200):
                optimizer.step(closure(model, optimizer, batch))
            ends.append(flat(model).float() - start)
        distance[rounding] = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
    assert distance["nearest"] > 0.5 > 0.3 > distance["kahan"]
