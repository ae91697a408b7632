"""timm: its models, its factory and registry of optimizers, its schedulers, scaler, averages and checkpoints."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import precond
from integrations.table import RECIPES, check_same, check_state, loop, loss_fn
from precond.integrations import MicroBatches

try:
    timm = pytest.importorskip("timm", reason="timm is not installed: make integrations")
except RuntimeError as error:  # a torchvision for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, dispatch_clip_grad

each = pytest.mark.parametrize("recipe", RECIPES)
CLASSES = {
    "adamw": (precond.AdamW, {}),
    "auto": (precond.optim.Auto, {}),
    "muon": (precond.optim.Muon, {}),
    "soap": (precond.optim.SOAP, {}),
    "whitening": (precond.optim.Whitening, {}),
    "adam(inputs=BNP())": (precond.Adam, {"inputs": precond.BNP()}),
    "SAM in z": (precond.AdamW, {"regularizers": [precond.SAM(0.05)]}),
}


def vit():
    torch.manual_seed(1)
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "in_chans": 1}
    return timm.create_model("vit_tiny_patch16_224", **options)


def resnet():
    torch.manual_seed(1)
    return timm.create_model("resnet10t", stem_width=8, channels=(4, 4, 8, 8), num_classes=3, in_chans=1)


def images(count=4, size=8):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, 1, size, size, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(count)
    ]


def run(model, optimizer, scheduler, data, accumulate=1, scaler=None, clip=0.3, ema=None):
    """As timm's train.py, with second gradients repeated before what it does with gradients."""
    inner = None if scaler is None else scaler._scaler
    micro = MicroBatches(optimizer, inner)
    updates = 0

    def forward(x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
            return loss_fn(model(x), y) / accumulate

    def backward(x, y):
        loss = forward(x, y)
        (loss if inner is None else inner.scale(loss)).backward()

    def clipped():
        dispatch_clip_grad(model.parameters(), value=clip, mode="norm")

    optimizer.zero_grad()
    for k, (x, y) in enumerate(data):
        need_update = (k + 1) % accumulate == 0
        if scaler is not None and not optimizer.probes:
            scaler(forward(x, y), optimizer, clip_grad=clip, parameters=model.parameters(), need_update=need_update)
        else:
            micro.backward(backward, x, y)
            if need_update and inner is None:
                micro.repeat()
                clipped()
                optimizer.step()
            elif need_update:
                micro.repeat()
                inner.unscale_(optimizer)
                clipped()
                inner.step(optimizer)
                inner.update()
        if need_update:
            updates += 1
            optimizer.zero_grad()
            scheduler.step_update(num_updates=updates)
            if ema is not None:
                ema.update(model)
    scheduler.step(1)


def cosine(optimizer):
    return create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, step_on_epochs=False, updates_per_epoch=4)[0]


class Updates:
    """timm's scheduler as the loop steps one."""

    def __init__(self, optimizer):
        self.scheduler, self.count = cosine(optimizer), 0

    def step(self):
        self.count += 1
        self.scheduler.step_update(num_updates=self.count)


@each
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_script(recipe, accumulate):
    model = vit()
    optimizer = RECIPES[recipe](model)
    ema = ModelEmaV3(model, decay=0.5)
    run(model, optimizer, cosine(optimizer), images(), accumulate, ema=ema)
    other = vit()
    reference = RECIPES[recipe](other)
    loop(other, reference, images(), accumulate, clip=0.3, scheduler=Updates(reference))
    check_same(model, other)
    check_state(optimizer, reference)
    assert optimizer.param_groups[0]["lr"] != 0.01
    assert any(not torch.equal(p, q) for p, q in zip(ema.module.parameters(), model.parameters(), strict=True))


@each
def test_the_scaler_and_clipping(recipe):
    """timm's NativeScaler unscales and clips; with SAM the script's own lines do."""
    model, other = vit(), vit()
    optimizer, reference = RECIPES[recipe](model), RECIPES[recipe](other)
    run(model, optimizer, cosine(optimizer), images(), accumulate=2, scaler=NativeScaler("cpu"))
    scaler = torch.amp.GradScaler("cpu")
    loop(other, reference, images(), 2, 0.3, Updates(reference), autocast=torch.bfloat16, scaler=scaler)
    check_same(model, other)
    check_state(optimizer, reference)


@each
@pytest.mark.parametrize("make", [vit, resnet])
def test_the_factory(recipe, make):
    """A line registers a class; groups that remember their model are made by ``param_group_fn``."""
    cls, options = CLASSES[recipe]
    default_registry.register(OptimInfo(f"precond-{cls.__name__}", cls, has_betas=cls is not precond.optim.Auto))
    model = make()
    groups = partial(precond.decay_groups, weight_decay=0.05)
    optimizer = create_optimizer_v2(model, f"precond-{cls.__name__}", lr=0.01, param_group_fn=groups, **options)
    assert type(optimizer) is cls and [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    model.train()
    run(model, optimizer, cosine(optimizer), images(2, size=16 if make is resnet else 8))
    assert optimizer.last.gradients == (2 if "SAM" in recipe else 1)
    observing = optimizer.observes
    if observing:
        with pytest.raises(TypeError) as caught:
            create_optimizer_v2(model, f"precond-{cls.__name__}", lr=0.01, **options)
        assert "pass the model itself" in str(caught.value)[:80]
    else:
        create_optimizer_v2(model, f"precond-{cls.__name__}", lr=0.01, weight_decay=0.05, layer_decay=0.7, **options)


@each
def test_checkpoints(recipe, tmp_path):
    model = vit()
    optimizer = RECIPES[recipe](model)
    run(model, optimizer, cosine(optimizer), images())
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0)
    again = vit()
    resumed = RECIPES[recipe](again)
    timm.models.resume_checkpoint(again, str(tmp_path / "last.pth.tar"), resumed, log_info=False)
    for one in ((model, optimizer), (again, resumed)):
        run(*one, cosine(one[1]), images())
    check_same(model, again)
    check_state(optimizer, resumed)
    copy.deepcopy(model)
