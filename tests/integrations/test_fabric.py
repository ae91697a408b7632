"""Lightning Fabric: a loop of one's own with wrapped model and optimizer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import precond
from integrations.table import RECIPES, batches, check_same, check_state, loop, loss_fn, net, windows

lightning = pytest.importorskip("lightning", reason="Lightning is not installed: make integrations")

from precond.integrations import MicroBatches  # noqa: E402

each = pytest.mark.parametrize("recipe", RECIPES)


def run(fabric, model, optimizer, data, accumulate=1, clip=None):
    micro = MicroBatches(optimizer)

    def backward(x, y):
        fabric.backward(loss_fn(model(x), y) / accumulate)

    for window in windows(data, accumulate):
        optimizer.zero_grad()
        for k, (x, y) in enumerate(window):
            with fabric.no_backward_sync(model, enabled=k + 1 < accumulate):
                micro.backward(backward, x, y)
        micro.repeat()
        if clip is not None:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()


def as_fabric(model, batch, dtype=torch.float64):
    """The loss with Fabric's conversions: inputs to its precision, outputs to float32."""
    return loss_fn(model(batch[0].to(dtype)).float(), batch[1])


def make(recipe, precision="64-true", dtype=torch.float64):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = net(dtype)
    return fabric, *fabric.setup(model, RECIPES[recipe](model))


@each
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop(recipe, accumulate):
    fabric, model, optimizer = make(recipe)
    run(fabric, model, optimizer, batches(), accumulate, clip=0.3)
    other = net()
    reference = RECIPES[recipe](other)
    loop(other, reference, batches(), accumulate, clip=0.3, loss=as_fabric)
    check_same(model.module, other)
    check_state(optimizer.optimizer, reference)


@each
def test_bfloat16_and_probe_on_the_wrapper(recipe):
    fabric, model, optimizer = make(recipe, "bf16-mixed", torch.float32)
    for x, y in batches(4, torch.float32):
        optimizer.zero_grad()
        fabric.backward(loss_fn(model(x), y))
        while optimizer.probe():
            fabric.backward(loss_fn(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
    other = net(torch.float32)
    narrow = partial(as_fabric, dtype=torch.bfloat16)
    loop(other, RECIPES[recipe](other), batches(4, torch.float32), clip=0.3, autocast=torch.bfloat16, loss=narrow)
    check_same(model.module, other)


@each
def test_closures(recipe):
    fabric, model, optimizer = make(recipe)
    for x, y in batches(4):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            fabric.backward(loss)
            return loss

        optimizer.step(closure)
    other = net()
    loop(other, RECIPES[recipe](other), batches(4), loss=as_fabric)
    check_same(model.module, other)


@each
def test_resuming(recipe, tmp_path):
    fabric, model, optimizer = make(recipe)
    run(fabric, model, optimizer, batches(4))
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    again, model2, optimizer2 = make(recipe)
    again.load(tmp_path / "half.ckpt", {"model": model2, "optimizer": optimizer2})
    for one in ((fabric, model, optimizer), (again, model2, optimizer2)):
        run(*one, batches(8)[4:])
    check_same(model.module, model2.module)
    check_state(optimizer.optimizer, optimizer2.optimizer)


def test_the_wrapper_acts_on_the_optimizer():
    _, model, optimizer = make("SAM in z")
    assert isinstance(optimizer, precond.PreconditionedGD)
    nn.functional.mse_loss(model(torch.ones(2, 6)), torch.zeros(2, 3, dtype=torch.float64)).backward()
    assert optimizer.probe() and optimizer.probing and optimizer.optimizer.probing
    optimizer.restore()
    assert not optimizer.optimizer.probing
    assert not {"_pending", "_bound", "last", "state"} & optimizer.__dict__.keys()
