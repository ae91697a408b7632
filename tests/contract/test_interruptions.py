"""A step that is not taken leaves nothing behind: the training goes on as if it had not been tried."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from contract.table import EVERY, OWN, Net, batches, closure, flat, net, snapshot, train
from contract.test_second_pass import PROBING, loss_of, two_calls
from precond import RMS, GradientNorm, LossClosure, PreconditionedGD

each = pytest.mark.parametrize("name", PROBING)


class Stop(BaseException):
    """As KeyboardInterrupt is: no Exception."""


def everything(model, optimizer):
    values = [*model.parameters(), *model.buffers(), torch.get_rng_state(), *snapshot(optimizer)]
    return [v.detach().clone() for v in values]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# SAM with statistics of the clean gradient has folded that in, and let it go, by its second pass: one buffer, not two.
LETS_GO = {
    "RMS, SAM in z",
    "RMS, adaptive SAM in z",
    "BNP with AdaGrad, SAM in z",
    "route, SAM in p, warm-up",
    "muon, SAM in z",
    "shampoo, sums, tiles, adaptive SAM in z",
    "SOAP, SAM in z, heavy ball",
    "auto, SAM in p",
}
PASSES = [(name, 1) for name in EVERY] + [(n, 2) for n in OWN if ("SAM" in n or "gradient norm" in n) and n not in LETS_GO]


@pytest.mark.parametrize(("name", "at"), PASSES)
def test_a_closure_that_raises_leaves_no_trace(name, at):
    ends = []
    for disturbed in (False, True):
        model = net()
        optimizer = EVERY[name](model)
        train(model, optimizer, batches(3))
        if disturbed:
            buffers = [b.clone() for b in model.buffers()]
            calls = 0

            def run(model=model, optimizer=optimizer):
                nonlocal calls
                calls += 1
                loss = closure(model, optimizer, batches(1, seed=9)[0])()
                if calls == at:
                    raise Stop
                return loss

            with pytest.raises(Stop):
                optimizer.step(run)
            for b, value in zip(model.buffers(), buffers, strict=True):
                b.copy_(value)  # the clean pass moved them, as it should
        train(model, optimizer, batches(3, seed=2))
        ends.append(flat(model))
    assert torch.equal(*ends)


@each
def test_two_calls_interrupted_and_restored(name):
    model = net()
    optimizer = precond.adamw(model, regularizers=[PROBING[name]])
    two_calls(model, optimizer, batches(2))
    optimizer.zero_grad()
    (batch,) = batches(1, seed=3)
    loss_of(model, batch).backward()
    clean = [p.grad.clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    before = everything(model, optimizer)
    with pytest.raises(Stop):
        while optimizer.probe():
            loss_of(model, batch)
            raise Stop
    assert optimizer.probing and not torch.equal(flat(model), torch.cat([t.flatten() for t in before[:6]]))
    optimizer.restore()
    optimizer.restore()  # twice is harmless
    assert same(before, everything(model, optimizer)) and not optimizer.probing
    assert places == [p.data_ptr() for p in model.parameters()]
    if "SAM" in name:  # which lets the clean gradient go
        loss_of(model, batch).backward()
    else:
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), clean, strict=True))
    while optimizer.probe():
        loss_of(model, batch).backward()
    optimizer.step()
    assert not same(before[:6], everything(model, optimizer)[:6])


@pytest.mark.parametrize("form", ["closure", "two calls"])
@each
def test_micro_batches_see_the_same_masks_in_every_pass(name, form):
    """K backward calls in each pass (R5): masks repeat, statistics move K times, random numbers go on as after one pass."""
    model = net()
    masks: list[torch.Tensor] = []
    model.drop.register_forward_hook(lambda m, args, out: masks.append((out == 0).clone()))
    optimizer = precond.adamw(model, lr=0.003, regularizers=[PROBING[name]])
    parts = batches(4)

    def backward():
        return sum(_scaled(model, part, len(parts)) for part in parts)

    torch.manual_seed(0)
    if form == "closure":
        optimizer.step(lambda: (optimizer.zero_grad(), backward())[1])
    else:
        backward()
        while optimizer.probe():
            backward()
        optimizer.step()
    after = torch.rand(2)
    passes = optimizer.last.gradients
    assert len(masks) == 4 * passes and all(torch.equal(masks[i], masks[i % 4]) for i in range(len(masks)))
    assert not torch.equal(masks[0], masks[1]) and model.norm.num_batches_tracked == 4
    plain = net()
    torch.manual_seed(0)
    for part in parts:
        loss_of(plain, part)
    assert torch.equal(after, torch.rand(2)) and torch.equal(model.norm.running_var, plain.norm.running_var)


def _scaled(model, part, count):
    loss = loss_of(model, part) / count
    loss.backward()
    return loss.detach()


def test_forwards_that_do_not_train_do_not_count():
    """An evaluation between step and forward does not decide which masks are repeated."""
    ends = []
    for evaluate in (False, True):
        model = net()
        optimizer = precond.adamw(model, lr=0.01, regularizers=[precond.SAM(0.05)])
        for batch in batches(3):
            if evaluate:
                model.eval()
                loss_of(model, batch)
                model.train()
            torch.manual_seed(4)
            loss_of(model, batch).backward()
            while optimizer.probe():
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, lambda n: nn.BatchNorm2d(n, momentum=None)])
@each
def test_frozen_statistics_do_for_parameters_what_the_model_would(name, norm):
    ends = []
    for whole in (True, False):
        model = Net(dropout=0.0).double()
        model.norm = norm(4).double()
        model.load_state_dict(net().state_dict())
        optimizer = precond.adamw(model if whole else model.parameters(), regularizers=[PROBING[name]])
        optimizer._warned = True
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            while optimizer.probe():
                with precond.frozen_statistics(model):
                    loss_of(model, batch).backward()
            optimizer.step()
        assert model.norm.num_batches_tracked == 3
        ends.append(torch.cat([flat(model), model.norm.running_mean, model.norm.running_var]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("space", ["z", "p"])
def test_infinite_second_derivatives_change_nothing(space, policy):
    """|p|^1.5 at 0: the gradient is 0, the Hessian infinite."""
    p = nn.Parameter(torch.zeros(3))
    penalty = GradientNorm(0.1, method="exact", space=space)
    optimizer = PreconditionedGD([p], preconditioner=RMS(), regularizers=[penalty], nonfinite=policy)
    run = LossClosure(lambda: p.abs().pow(1.5).sum())
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="second derivative"):
            optimizer.step(run)
    else:
        optimizer.step(run)
        assert optimizer.last.skipped
    assert (
        torch.equal(p, torch.zeros(3))
        and optimizer.state[p]["step"] == 0
        and torch.equal(optimizer.state[p]["r"], torch.zeros(3))
    )


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("name", [n for n in OWN if "bnp" in n.lower() or "whitening" in n])
def test_what_a_skipped_step_saw_of_inputs_is_forgotten(name, policy):
    ends = []
    for disturbed in (False, True):
        model = net()
        optimizer = OWN[name](model, nonfinite=policy)
        train(model, optimizer, batches(2))
        if disturbed:
            buffers = [b.clone() for b in model.buffers()]
            ((x, y),) = batches(1, seed=9)
            x[0, 0, 0, 0] = torch.inf
            loss_of(model, (x, y)).backward()
            try:
                while optimizer.probe():
                    loss_of(model, (x, y)).backward()
                optimizer.step()
            except FloatingPointError:
                assert policy == "raise"
            for b, value in zip(model.buffers(), buffers, strict=True):
                b.copy_(value)
        optimizer.zero_grad()
        two_calls(model, optimizer, batches(2, seed=2))
        ends.append(flat(model))
    assert torch.equal(*ends) and ends[0].isfinite().all()
