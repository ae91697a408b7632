"""torch's own utilities around any optimizer: averaged models, schedulers, plain loops with accumulation and scalers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import precond
from integrations.table import RECIPES, batches, check_same, check_state, loop, loss_fn, net, windows
from precond.integrations import MicroBatches
from precond.optim.optimizer.closures import LossClosure

RECIPES = {**RECIPES, "whitening, SAM in z": lambda p: precond.whitening(p, lr=0.01, regularizers=[precond.SAM(0.05)])}
each = pytest.mark.parametrize("recipe", RECIPES)


@each
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["SWA", "EMA"])
def test_averaged_models(recipe, average):
    """A copied model observes nothing, and gathering its batch statistics moves no state of the optimizer's."""
    model = net()
    optimizer = RECIPES[recipe](model)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=average is not None)
    scheduler = SWALR(optimizer, swa_lr=0.005, anneal_epochs=2)
    for batch in batches(4):
        loop(model, optimizer, [batch], scheduler=scheduler)
        averaged.update_parameters(model)
    state = copy.deepcopy(optimizer.state_dict())
    update_bn([x for x, _ in batches(4)], averaged)
    update_bn([x for x, _ in batches(4)], model)
    twin = net()
    other = RECIPES[recipe](twin)
    loop(twin, other, batches(4), scheduler=SWALR(other, swa_lr=0.005, anneal_epochs=2))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert torch.equal(state["state"][0]["step"], optimizer.state_dict()["state"][0]["step"])
    loop(model, optimizer, batches(6)[4:])
    loop(twin, other, batches(6)[4:])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(p, q) for p, q in zip(averaged.module.parameters(), model.parameters(), strict=True))


FORMS = ["nothing returned", "no gradient changed", "after probe", "no call"]


@each
@pytest.mark.parametrize("form", FORMS)
def test_closures_that_leave_the_gradient(recipe, form):
    """``step`` after such a closure is ``step()``; nothing that layers received before it is lost."""
    model, twin = net(), net()
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](twin)
    loop(twin, other, batches(4))
    for x, y in batches(4):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        while optimizer.probe():
            loss_fn(model(x), y).backward()
        out = {"nothing returned": None, "no gradient changed": loss.detach(), "after probe": 0.0, "no call": None}[form]
        optimizer.step() if form == "no call" else optimizer.step(lambda out=out: out)
    check_same(model, twin)
    check_state(optimizer, other)


@each
def test_nothing_to_do(recipe):
    """No gradient at all: no step, with a closure that returns None or without."""
    model = net()
    optimizer = RECIPES[recipe](model)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    optimizer.step(lambda: None)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def accumulating(model, optimizer, window):
    """A step whose closure adds the last micro-batch to the others' gradients."""
    for x, y in window[:-1]:
        (loss_fn(model(x), y) / len(window)).backward()

    def closure():
        x, y = window[-1]
        loss = loss_fn(model(x), y) / len(window)
        loss.backward()
        return loss

    optimizer.step(closure)


@each
def test_a_closure_of_the_last_micro_batch(recipe):
    """Statistics are those of all micro-batches; a second gradient would be of the last alone, and is refused."""
    model, twin = net(), net()
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](twin)
    if optimizer.probes:
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"zero_grad.*of its last batch alone.*repeat all micro-batches"):
            accumulating(model, optimizer, batches(2))
        assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        return
    for window in windows(batches(), 2):
        optimizer.zero_grad()
        accumulating(model, optimizer, window)
    loop(twin, other, batches(), accumulate=2)
    check_same(model, twin)
    check_state(optimizer, other)


ORDERS = ["zero, forward", "forward, zero", "model.zero_grad", "zeros"]


@each
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", ["closure", "calls"])
def test_where_gradients_are_cleared(recipe, order, form):
    """In whatever order a loop clears, runs forward and goes backward, statistics are those of the step's own forwards."""
    model, twin = net(), net()
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](twin)
    for x, y in batches(4):

        def backward(x=x, y=y):
            if order != "forward, zero":
                clear()
            loss = loss_fn(model(x), y)
            if order == "forward, zero":
                clear()
            loss.backward()
            return loss

        def clear():
            if order == "model.zero_grad":
                model.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=order != "zeros")

        if form == "closure":
            optimizer.step(backward)
        else:
            backward()
            while optimizer.probe():
                backward()
            optimizer.step()
    loop(twin, other, batches(4))
    check_same(model, twin)
    check_state(optimizer, other)


@each
def test_a_look_before_a_closure_does_not_count(recipe):
    model, twin = net(), net()
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](twin)
    for x, y in batches(4):
        model(3 * x).sum()

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    loop(twin, other, batches(4))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    check_state(optimizer, other)


@each
@pytest.mark.parametrize("order", ["zero, forward", "forward, zero"])
def test_a_step_that_a_scaler_skips_is_as_if_it_had_not_been(recipe, order):
    model, twin = net(torch.float32), net(torch.float32)
    optimizer, other = RECIPES[recipe](model), RECIPES[recipe](twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = batches(5, torch.float32)
    for k, (x, y) in enumerate(data):

        def backward(x=x, y=y, k=k):
            loss = loss_fn(model(x), y) * (1e38 if k == 2 else 1.0)
            if order == "forward, zero":
                optimizer.zero_grad()
            scaler.scale(loss).backward()

        if order == "zero, forward":
            optimizer.zero_grad()
        backward()
        while optimizer.probe(scaler.get_scale()):
            scaler.scale(loss_fn(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    loop(twin, other, data[:2] + data[3:], scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # another scale in the last steps
    assert scaler.get_scale() == 2.0**9


class Noisy(nn.Module):
    """Draws its mask anew in each forward, and notes it."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        self.drawn.append(torch.rand_like(x))
        return x * self.drawn[-1]


def test_each_micro_batch_sees_its_own_masks_again():
    """Whatever else draws random numbers between them."""
    model = net()
    noisy = Noisy()
    model.insert(3, noisy)
    optimizer = RECIPES["SAM in z"](model)
    micro = MicroBatches(optimizer)
    for x, y in batches(3):
        torch.rand(3)
        micro.backward(lambda x, y: loss_fn(model(x), y).backward(), x, y)
    before = torch.get_rng_state()
    micro.repeat()
    optimizer.step()
    assert all(torch.equal(noisy.drawn[k], noisy.drawn[k + 3]) for k in range(3)) and len(noisy.drawn) == 6
    assert torch.equal(before, torch.get_rng_state())


def test_a_pass_that_raises_when_repeated_leaves_parameters_as_they_were():
    model = net()
    optimizer = RECIPES["SAM in z"](model)
    micro = MicroBatches(optimizer)
    calls = 0

    def backward(x, y):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        loss_fn(model(x), y).backward()

    before = [p.clone() for p in model.parameters()]
    micro.backward(backward, *batches(1)[0])
    with pytest.raises(KeyboardInterrupt):
        micro.repeat()
    assert not optimizer.probing and all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_micro_batches_keep_nothing_where_no_second_gradient_is_wanted():
    micro = MicroBatches(precond.adamw(net()))
    micro.backward(lambda: None)
    assert not micro._parts
    with pytest.raises(TypeError, match="got AdamW"):
        MicroBatches(torch.optim.AdamW(net().parameters()))


def test_only_second_gradients_and_replicas_leave_unscaling_to_the_step():
    for recipe, make in RECIPES.items():
        assert make(net())._step_supports_amp_scaling == ("SAM" in recipe)


def test_a_loss_closure_still_must_return_the_loss():
    with pytest.raises(TypeError, match="must return the loss"):
        precond.adamw(net()).step(LossClosure(lambda: None))


def test_micro_batches_of_an_interrupted_step_are_forgotten():
    model = net()
    micro = MicroBatches(RECIPES["SAM in z"](model))
    micro.backward(lambda: model(batches(1)[0][0]).sum().backward())
    with pytest.raises(ZeroDivisionError):
        micro.backward(lambda: 1 / 0)
    micro.repeat()
    assert not micro._parts and micro.optimizer._pending is None
