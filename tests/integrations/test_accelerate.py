"""Accelerate: prepared model and optimizer, accumulation, clipping, 16 bits, checkpoints."""

from __future__ import annotations

import pytest
import torch

from integrations.table import RECIPES, batches, check_same, check_state, loop, loss_fn, net

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: make integrations")

from precond.integrations import MicroBatches  # noqa: E402

each = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(autouse=True)
def fresh():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make(recipe, dtype=torch.float64, steps=20, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = net(dtype)
    optimizer = RECIPES[recipe](model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def run(accelerator, model, optimizer, scheduler, data, clip=0.3):
    micro = MicroBatches(optimizer, accelerator.scaler)

    def backward(x, y):
        accelerator.backward(loss_fn(model(x), y))

    for x, y in data:
        with accelerator.accumulate(model):
            micro.backward(backward, x, y)
            if accelerator.sync_gradients:
                micro.repeat()
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def plain(recipe, data, dtype=torch.float64, **options):
    model = net(dtype)
    optimizer = RECIPES[recipe](model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    loop(model, optimizer, data, clip=0.3, scheduler=scheduler, **options)
    return model, optimizer


@each
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop(recipe, accumulate):
    accelerator, model, optimizer, scheduler = make(recipe, gradient_accumulation_steps=accumulate)
    run(accelerator, model, optimizer, scheduler, batches())
    other, reference = plain(recipe, batches(), accumulate=accumulate)
    check_same(model, other)
    check_state(optimizer.optimizer, reference)
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


@each
def test_bfloat16(recipe):
    accelerator, model, optimizer, scheduler = make(recipe, torch.float32, mixed_precision="bf16")
    run(accelerator, model, optimizer, scheduler, batches(4, torch.float32))
    other, _ = plain(recipe, batches(4, torch.float32), torch.float32, autocast=torch.bfloat16)
    check_same(model, other)


@each
def test_float16_and_an_overflow(recipe):
    """A scaler in the wrapper, as on a GPU: the step is skipped, and the wrapper says so."""
    accelerator, model, optimizer, _ = make(recipe, torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    accelerator.scaler = scaler
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer.optimizer, scaler=scaler)
    accelerator._optimizers = [wrapped]
    micro = MicroBatches(wrapped, scaler)
    before = [p.clone() for p in model.parameters()]

    def backward(factor):
        x, y = batches(1, torch.float32)[0]
        scaler.scale(loss_fn(model(x), y) * factor).backward()

    micro.backward(backward, 1e38)
    micro.repeat()
    scaler.unscale_(optimizer.optimizer) if "SAM" not in recipe else None
    wrapped.step()
    wrapped.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2**15
    assert wrapped.step_was_skipped or "SAM" in recipe
    micro.backward(backward, 1.0)
    micro.repeat()
    wrapped.step()
    assert not torch.equal(before[0], next(model.parameters())) and not wrapped.step_was_skipped


@each
def test_resuming(recipe, tmp_path):
    first = make(recipe)
    run(*first, batches(4))
    first[0].save_state(tmp_path)
    second = make(recipe)
    second[0].load_state(tmp_path)
    for one in (first, second):
        run(*one, batches(8)[4:])
    check_same(first[1], second[1])
    check_state(first[2].optimizer, second[2].optimizer)
    assert first[2].param_groups[0]["lr"] == second[2].param_groups[0]["lr"]


def test_second_gradients_without_the_helper_are_refused():
    accelerator, model, optimizer, _ = make("SAM in z")
    x, y = batches(1)[0]
    accelerator.backward(loss_fn(model(x), y))
    with pytest.raises(RuntimeError, match="SAM needs a second gradient"):
        optimizer.step()
