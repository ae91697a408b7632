"""Lightning's Trainer with automatic optimization: a callback for second gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from precond.integrations.microbatches import MicroBatches, check_clipping
from precond.optim.optimizer import PreconditionedGD


class SecondGradients(Callback):
    """Second gradients (SAM, gradient norms) over all micro-batches of ``accumulate_grad_batches``, and under every precision.

    Without it the optimizer calls Lightning's closure again: that serves without accumulation and without a GradScaler
    (``precision="16-mixed"``), and logs in ``training_step`` twice. Where the closure will not do, the step raises.

    Example:
        ``Trainer(accumulate_grad_batches=4, callbacks=[precond.integrations.lightning.SecondGradients()])``
    """

    def __init__(self) -> None:
        self._micro: MicroBatches | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._micro = None
        if not pl_module.automatic_optimization or not trainer.optimizers:
            return
        optimizer = trainer.optimizers[0]
        if not isinstance(optimizer, PreconditionedGD) or not optimizer.probes:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        clips = bool(trainer.gradient_clip_val)
        check_clipping(optimizer, clips, "drop gradient_clip_val of the Trainer")
        if clips and scaler is not None:
            raise ValueError(
                "pass max_norm to the optimizer and drop gradient_clip_val: the optimizer unscales gradients itself"
            )
        self._micro = MicroBatches(optimizer, scaler)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._micro is not None and not trainer.fit_loop._skip_backward:
            self._micro.add(_pass, trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._micro is None:
            return
        if trainer.fit_loop._skip_backward:
            # Weight averaging gathers batch statistics; the gradients are those of a step that was taken.
            self._micro.optimizer.zero_grad()
        with _unlogged(pl_module):
            self._micro.repeat()


def _pass(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
    """A micro-batch forward and backward, as the automatic optimization does it."""
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    out = trainer.strategy.training_step(*((batch, batch_idx) if indexed else (batch,)))
    loss = out if out is None or isinstance(out, torch.Tensor) else out["loss"]
    if loss is not None:
        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """What ``training_step`` logs at a probed point is not the training's."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    module.log = module.log_dict = nothing
    try:
        yield
    finally:
        del module.log, module.log_dict
