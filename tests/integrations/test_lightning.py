"""Lightning's Trainer, automatic and manual: what a changed optimizer line gives is what the plain loop gives."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import precond
from integrations.table import RECIPES, batches, check_same, check_state, loop, loss_fn, net

lightning = pytest.importorskip("lightning", reason="Lightning is not installed: make integrations")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from precond.integrations.lightning import SecondGradients  # noqa: E402

each = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Module(lightning.LightningModule):
    """A net, a recipe on the module itself, a scheduler, and batches that are passed by."""

    def __init__(self, recipe, dtype=torch.float64, skips=(), factors=None, scheduled=False, **more):
        super().__init__()
        self.net, self.recipe, self.skips, self.scheduled, self.more = net(dtype), recipe, skips, scheduled, more
        self.factors = factors or {}
        self.logged = 0

    def training_step(self, batch, index):
        if index in self.skips:
            return None
        loss = loss_fn(self.net(batch[0]), batch[1]) * self.factors.get(index, 1)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        self.logged += 1
        return loss

    def configure_optimizers(self):
        optimizer = RECIPES[self.recipe](self, **self.more)
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Module):
    """Manual optimization, as its documentation writes it; second gradients by ``probe``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_fn(self.net(batch[0]), batch[1]))
        while optimizer.probe():
            self.manual_backward(loss_fn(self.net(batch[0]), batch[1]))
        optimizer.step()


def fit(module, data, epochs=1, path=None, **options):
    options.setdefault("callbacks", [])
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=path)
    return trainer


def plain(recipe, data, dtype=torch.float64, **options):
    """The same by the loop; a scheduler where one is asked for by ``scheduled``."""
    model = net(dtype)
    optimizer = RECIPES[recipe](model)
    if options.pop("scheduled", False):
        options["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    loop(model, optimizer, data, **options)
    return model, optimizer


@each
def test_automatic_optimization(recipe):
    module = Module(recipe)
    trainer = fit(module, batches())
    model, optimizer = plain(recipe, batches())
    check_same(module.net, model)
    check_state(trainer.optimizers[0], optimizer)


@each
def test_manual_optimization(recipe):
    module = Manual(recipe)
    trainer = fit(module, batches())
    model, optimizer = plain(recipe, batches())
    check_same(module.net, model)
    check_state(trainer.optimizers[0], optimizer)


@each
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accumulation_clipping_and_a_scheduler(recipe, accumulate):
    """Statistics and second gradients of all micro-batches; what is clipped is what is descended."""
    module = Module(recipe, scheduled=True)
    callbacks = [SecondGradients()] if "SAM" in recipe else []
    trainer = fit(module, batches(), accumulate_grad_batches=accumulate, gradient_clip_val=0.3, callbacks=callbacks)
    model, optimizer = plain(recipe, batches(), accumulate=accumulate, clip=0.3, scheduled=True)
    check_same(module.net, model)
    check_state(trainer.optimizers[0], optimizer)
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_sam_over_micro_batches_without_the_callback_is_refused():
    with pytest.raises(RuntimeError, match=r"zero_grad.*repeat all micro-batches.*SecondGradients"):
        fit(Module("SAM in z"), batches(), accumulate_grad_batches=2)


def mixed(precision):
    """The trainer's options; on a CPU it replaces float16 by bfloat16 unless the plugin is given."""
    return {"plugins": [MixedPrecision(precision, "cpu")]}


PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@each
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_mixed_precision_and_clipping(recipe, precision, clip):
    """The trainer unscales and clips; only second gradients are unscaled by the optimizer, and then ``max_norm`` clips."""
    data = batches(6, torch.float32)
    factors = {3: 1e6}  # the gradient of that batch overflows at the first scale in float16, in bfloat16 it does not
    scaled = precision == "16-mixed"
    callbacks = [SecondGradients()] if "SAM" in recipe else []
    module = Module(recipe, torch.float32, factors=factors)
    if "SAM" in recipe and scaled and clip is not None:
        with pytest.raises(ValueError, match="pass max_norm to the optimizer and drop gradient_clip_val"):
            fit(module, data, **mixed(precision), gradient_clip_val=clip, callbacks=callbacks)
        return
    trainer = fit(module, data, **mixed(precision), gradient_clip_val=clip, callbacks=callbacks)
    scaler = torch.amp.GradScaler("cpu") if scaled else None

    def loss(model, batch):
        (index,) = (i for i, other in enumerate(data) if other is batch)
        return loss_fn(model(batch[0]), batch[1]) * factors.get(index, 1)

    model, optimizer = plain(recipe, data, torch.float32, autocast=PRECISIONS[precision], scaler=scaler, clip=clip, loss=loss)
    check_same(module.net, model)
    check_state(trainer.optimizers[0], optimizer)
    if scaled:
        assert trainer.precision_plugin.scaler.get_scale() == scaler.get_scale() < 2**16


def test_sam_under_a_scaler_without_the_callback_is_refused():
    with pytest.raises(RuntimeError, match="SAM needs a second gradient"):
        fit(Module("SAM in z", torch.float32), batches(2, torch.float32), **mixed("16-mixed"))


def test_differences_of_clipped_gradients_are_refused():
    module = Module("adamw", regularizers=[precond.GradientNorm(0.01)])
    with pytest.raises(ValueError, match="pass max_norm to the optimizer and drop gradient_clip_val"):
        fit(module, batches(2), gradient_clip_val=0.3, callbacks=[SecondGradients()])
    fit(Module("adamw", regularizers=[precond.GradientNorm(0.01)], max_norm=0.3), batches(2), callbacks=[SecondGradients()])


@each
def test_a_batch_that_training_step_passes_by(recipe):
    """No step, no statistics, no error: as if the batch had not been."""
    data = batches(5)
    module = Module(recipe, skips=(2,))
    trainer = fit(module, data, callbacks=[SecondGradients()])
    model, optimizer = plain(recipe, data[:2] + data[3:])
    check_same(module.net, model)
    check_state(trainer.optimizers[0], optimizer)
    fit(Module(recipe, skips=(2,)), data)


@each
def test_resuming_from_a_checkpoint(recipe, tmp_path):
    """Two epochs, with a checkpoint and a new process's objects between them."""
    whole = Module(recipe, scheduled=True)
    end = fit(whole, batches(4), epochs=2)
    first = fit(Module(recipe, scheduled=True), batches(4), epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = Module(recipe, scheduled=True)
    resumed = fit(second, batches(4), epochs=2, path=tmp_path / "half.ckpt")
    check_same(second.net, whole.net)
    check_state(resumed.optimizers[0], end.optimizers[0])


@each
def test_weight_averaging_with_batch_statistics(recipe):
    """SWA's last epoch gathers batch statistics, without a backward; EMA copies the module."""
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    module = Module(recipe)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(module, batches(4), epochs=3, callbacks=[averaging, *([SecondGradients()] if "SAM" in recipe else [])])
    assert torch.cat([p.flatten() for p in module.parameters()]).isfinite().all()
    assert module.net[1].num_batches_tracked > 0
    averaged = Module(recipe)
    fit(averaged, batches(4), epochs=1, callbacks=[EMAWeightAveraging(decay=0.5)])
    model, _ = plain(recipe, batches(4))
    assert not torch.equal(averaged.net[0].weight, model[0].weight)


class Noisy(nn.Module):
    """Notes the random numbers that it draws."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        mask = torch.rand_like(x)
        self.drawn.append(mask)
        return x * mask


@pytest.mark.parametrize(("accumulate", "callbacks"), [(1, []), (1, [SecondGradients()]), (2, [SecondGradients()])])
@pytest.mark.parametrize("kind", [Module, Manual])
def test_second_passes_see_the_same_masks(kind, accumulate, callbacks):
    """Also where training_step calls the module's parts and never the module itself."""
    module = kind("SAM in z")
    noisy = Noisy()
    module.net.insert(3, noisy)
    if kind is Manual and accumulate > 1:
        pytest.skip("manual optimization accumulates by itself")
    options = {} if kind is Manual else {"accumulate_grad_batches": accumulate}
    fit(module, batches(4), callbacks=callbacks, **options)
    for window in range(0, len(noisy.drawn), 2 * accumulate):
        first, second = noisy.drawn[window : window + accumulate], noisy.drawn[window + accumulate : window + 2 * accumulate]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({mask.sum().item() for mask in noisy.drawn}) == 4


def test_second_passes_are_not_logged():
    """The epoch's mean loss is that of the four clean passes."""
    ends = []
    for recipe, callbacks in (("SAM in z", [SecondGradients()]), ("SAM in z", [])):
        module = Module(recipe)
        trainer = fit(module, batches(4), callbacks=callbacks)
        ends.append(trainer.callback_metrics["loss"].item())
        assert module.logged == 8
    losses = []
    model = net()
    optimizer = RECIPES["SAM in z"](model)

    def noted(model, batch):
        losses.append(loss_fn(model(batch[0]), batch[1]))
        return losses[-1]

    loop(model, optimizer, batches(4), loss=noted)
    assert ends[0] == pytest.approx(torch.stack(losses[::2]).mean().item(), rel=1e-6)


def test_the_wrapper_acts_on_the_optimizer():
    """Lightning's wrapper imitates the class: what it inherits must not write to the wrapper."""

    class Looks(Manual):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            wrapper = self.optimizers()
            assert isinstance(wrapper, precond.PreconditionedGD) and wrapper is not wrapper.optimizer
            assert wrapper.last is wrapper.optimizer.last and not wrapper.probing and wrapper.probes
            assert str(wrapper.explain()) == str(wrapper.optimizer.explain())
            wrapper.map()
            assert not {"_pending", "_bound", "last", "state"} & wrapper.__dict__.keys()

    fit(Looks("SAM in z"), batches(2))


def test_groups_are_frozen_and_thawed_by_finetuning():
    from lightning.pytorch.callbacks import BaseFinetuning

    class Thaw(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.net[0])

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.01)

    class Head(Module):
        def configure_optimizers(self):
            return precond.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    module = Head("adamw")
    start = module.net[0].weight.clone()
    trainer = fit(module, batches(4), epochs=2, callbacks=[Thaw()])
    assert len(trainer.optimizers[0].param_groups) == 2 and not torch.equal(module.net[0].weight, start)
